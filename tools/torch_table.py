"""What the installed torch makes of residual add + RMSNorm + quantization in front of an opaque product.

    python tools/torch_table.py        # puts the row of this torch into docs/torch.md
    make torch-table TORCH=2.14.1      # the same in an environment with another torch

Code is generated for an H100 and its launches are counted; nothing runs on a GPU.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import normquant as nq
from normquant.compile import FusionReport, clear, reports

PAGE = Path(__file__).parents[1] / "docs" / "torch.md"
PASS, NESTED = "post_grad_custom_pre_pass", "triton.nested_reduction"
M, K, N, GROUP = 64, 1024, 512, 128
NOT_HERE = "no such option"


@torch.library.custom_op("torch_table::product", mutates_args=())
def product(data: torch.Tensor, scale: torch.Tensor, n: int) -> torch.Tensor:
    """A block-scaled product that Inductor calls and does not see into."""
    raise NotImplementedError("code is generated and never run")


@product.register_fake
def _(data: torch.Tensor, scale: torch.Tensor, n: int) -> torch.Tensor:
    return torch.empty(data.shape[0], n, dtype=torch.bfloat16, device=data.device)


def site(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + residual  # [M, K] bf16
    groups = F.rms_norm(h, (K,), weight, 1e-6).float().unflatten(-1, (-1, GROUP))  # [M, G, 128]
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448.0  # [M, G]
    data = (groups / scale.unsqueeze(-1)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return product(data.flatten(-2), scale, N), h


class CountedPass(CustomGraphPass):
    """A pass that counts how often Inductor runs it."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.runs = inner, 0

    def __call__(self, graph: Graph) -> None:
        self.runs += 1
        self.inner(graph)

    def uuid(self) -> Any:
        return self.inner.uuid()


@dataclass(frozen=True)
class Compiled:
    """launches: kernels, the product not among them. runs: of the pass."""

    launches: int
    runs: int
    reports: tuple[FusionReport, ...]


def compiled(policy: str, dynamic: bool, **options: Any) -> Compiled:
    bf16 = {"dtype": torch.bfloat16}
    inputs = torch.empty(M, K, **bf16), torch.empty(M, K, **bf16), torch.empty(K, **bf16)
    chosen = nq.inductor_options(policy) | options
    counted = CountedPass(chosen[PASS])
    clear()
    report = nq.audit(site, inputs, "h100", chosen | {PASS: counted}, dynamic)
    return Compiled(len(report.launches) - report.externs["torch_table.product"], counted.runs, reports())


def kernels(policy: str, **options: Any) -> str:
    """Launches with a fixed and with a dynamic number of rows."""
    if not set(options) <= set(config.get_config_copy()):
        return NOT_HERE
    return ", ".join(str(compiled(policy, dynamic, **options).launches) for dynamic in (False, True))


def row() -> tuple[str, ...]:
    fused = [compiled("always", dynamic) for dynamic in (False, True)]
    sites = (f"{len(f.reports[-1].fused)} of {len(f.reports[-1].sites)}" for f in fused)
    return (
        torch.__version__.partition("+")[0],
        triton_version(),
        kernels("never"),
        kernels("never", **{NESTED: False}),
        kernels("never", **{NESTED: True}),
        kernels("native"),
        ", ".join(str(f.launches) for f in fused),
        ", ".join(sites),
        ", ".join(str(f.runs) for f in fused),
    )


def triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def with_row(page: str, cells: tuple[str, ...]) -> str:
    """The page with the row of this torch, which has to have one."""
    line = "| " + " | ".join(cells) + " |"
    page, found = re.subn(rf"^\| {re.escape(cells[0])} \|.*$", line, page, flags=re.M)
    if not found:
        raise SystemExit(f"{PAGE} has no row for torch {cells[0]}; add one:\n{line}")
    return page


if __name__ == "__main__":
    made = row()
    print(" | ".join(made))
    PAGE.write_text(with_row(PAGE.read_text(), made))
    sys.exit(0)
