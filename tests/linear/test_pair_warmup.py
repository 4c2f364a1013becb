"""What a pair may launch for few rows, and that all of it is launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normquant import QuantSpec, specs
from normquant.kernels.product_configs import FEW_ROWS, rows_of_program
from normquant.linear import pair_warmup
from normquant.linear.pair_warmup import few_rows, warm_pair
from normquant.ops import OPS

CPU = torch.device("cpu")
SPEC = QuantSpec(layout="col_tma")


@pytest.mark.parametrize("op", OPS)
def test_every_number_of_rows_has_its_kernels(op: str) -> None:
    found = few_rows(op, 512, 768, 768, SPEC, CPU)
    assert min(found.values()) == 1 and max(found.values()) <= FEW_ROWS
    assert {key[0] for key in found} == {16, 32, 64}


def test_a_rule_for_fewer_rows_counts() -> None:
    found = few_rows("group_quant", 512, 768, 768, specs.VLLM.replace(layout="col_tma", few_rows=32), CPU)
    assert len({key[3] for key in found}) == 2 and 32 in found.values()


@pytest.mark.parametrize("op", ["silu_mul_quant", "latent_norm_quant", "add_rms_norm_quant"])
def test_all_of_them_are_launched(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    limits: set[Any] = set()

    def launch_pair(of: Any, product: Any, rest: Any) -> Any:
        x = torch.empty(product[0].shape[0], product[2].shape[0], dtype=product[4])
        of.check(x, *rest)
        limits.add(rest[0])
        return lambda *tensors: seen.append(tensors[0].shape[0])

    monkeypatch.setattr(pair_warmup, "launch_pair", launch_pair)
    widths = {"silu_mul_quant": (768, 384), "latent_norm_quant": (1536 + 576, 1536), "add_rms_norm_quant": (768, 768)}
    n, k = widths[op]
    count = warm_pair(op, (512, n), k, SPEC, dtype=torch.bfloat16, device=CPU, limit=7.0)
    assert op != "silu_mul_quant" or limits == {7.0}
    assert count == len(seen) and {rows_of_program(m) for m in seen} == {16, 32, 64}
