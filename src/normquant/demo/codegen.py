"""What Inductor generates for the layer on an H100, stock and with normquant; needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph

from normquant.audit.program import Program, ProgramLaunch
from normquant.audit.result import AuditReport
from normquant.compile.fusions.candidate import module_path
from normquant.compile.recording import PASS, Recorder
from normquant.demo.deepseek_layer import Dims, build_fake, fake_inputs, forward

MATRIX_PRODUCTS = ("normquant.block_fp8_linear", "aten.bmm", "aten.mm", "aten.addmm", "aten.baddbmm")


@dataclass(frozen=True)
class NormLaunches:
    """One norm of the layer: its module, its width K, and what is launched from its input to the matrix products."""

    name: str
    k: int
    launches: tuple[ProgramLaunch, ...]

    @property
    def bytes(self) -> int:
        """DRAM bytes of the launches."""
        return sum(launch.bytes for launch in self.launches)


@dataclass(frozen=True)
class Compiled:
    """One compile of the layer. fusion: normquant's FusionReport, None for the stock compile."""

    report: AuditReport
    norms: tuple[NormLaunches, ...]
    fusion: Any = None

    @property
    def kernels(self) -> tuple[ProgramLaunch, ...]:
        """Every launch that is not a matrix product: generated kernels and the quantization ops, one kernel each."""
        return tuple(launch for launch in self.report.launches if not is_matrix_product(launch))

    @property
    def bytes(self) -> int:
        """DRAM bytes of `kernels`."""
        return sum(launch.bytes for launch in self.kernels)


def compile_layer(
    dims: Dims,
    tokens: int,
    target: str,
    options: dict[str, Any] | None = None,
    fusion: Callable[[], Any] = lambda: None,
) -> Compiled:
    """Compile the layer for `target` with Inductor `options`; without any, as plain torch.compile does.

    fusion: called after the compile, gives the FusionReport of the pass in `options`.

    Raises ImportError or RuntimeError, naming what to install, where code cannot be generated.
    """
    from normquant.audit import audit

    recorder = Recorder((options or {}).get(PASS))

    def make_inputs() -> tuple[Any, ...]:
        return (build_fake(dims), *fake_inputs(dims, tokens))

    report = audit(forward, make_inputs, target, {**(options or {}), PASS: recorder})
    if recorder.before is None or len(report.programs) != 1:
        raise RuntimeError(f"the layer compiled to {len(report.programs)} graphs; 1 is expected")
    return Compiled(report, find_norms(report.programs[0], norm_weights(recorder.before.graph)), fusion())


def norm_weights(graph: Graph) -> dict[str, str]:
    """Name of each input that is a norm's weight [K] -> the norm's module in the layer."""
    return {
        node.name: module_path(next(iter(node.users))).removeprefix("layer.")
        for node in graph.nodes
        if node.op == "placeholder" and node.users and getattr(node.meta.get("val"), "dim", lambda: 0)() == 1
    }


def is_matrix_product(launch: ProgramLaunch) -> bool:
    """Whether a launch is a GEMM that Inductor calls."""
    return launch.name.startswith(MATRIX_PRODUCTS)


def find_norms(program: Program, weights: dict[str, str]) -> tuple[NormLaunches, ...]:
    """For each norm, by its weight among the program's inputs: the launches around it, between the matrix products.

    These are the kernel that reads the weight, what computes that kernel's inputs, and what of its outputs' further
    processing ends in a matrix product.
    """
    feeds, fed_by = _neighbours(program)
    products = [launch.position for launch in program.launches if is_matrix_product(launch)]
    into_products = _reach(products, fed_by, products)
    norms = []
    for weight, name in weights.items():
        own = [launch.position for launch in program.launches if any(r.buffer == weight for r in launch.reads)]
        after = _reach(own, feeds, products) & into_products
        positions = sorted({*own, *_reach(own, fed_by, products), *after})
        k = int(program.buffers[weight].shape[0])
        norms.append(NormLaunches(name, k, tuple(program.launches[p] for p in positions)))
    return tuple(norms)


def _neighbours(program: Program) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Launch -> the launches that read what it wrote, and launch -> those that wrote what it reads."""
    feeds: dict[int, set[int]] = {}
    fed_by: dict[int, set[int]] = {}
    for edge in program.edges:
        if edge.producer is not None:
            feeds.setdefault(edge.producer, set()).add(edge.consumer)
            fed_by.setdefault(edge.consumer, set()).add(edge.producer)
    return feeds, fed_by


def _reach(start: Iterable[int], edges: dict[int, set[int]], stop: Iterable[int]) -> set[int]:
    """What can be reached from `start` without passing through `stop`, whose members are not included."""
    found: set[int] = set()
    pending, closed = list(start), set(stop)
    while pending:
        new = edges.get(pending.pop(), set()) - found - closed
        found |= new
        pending.extend(new)
    return found
