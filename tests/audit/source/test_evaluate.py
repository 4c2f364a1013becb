"""DRAM bytes per kernel, against a count by hand."""

from __future__ import annotations

import pytest
import torch
from shared.clean_graphs import GRAPHS, I64, Graph, compiled, empty

from normquant.audit import audit

M, K = 64, 7168
SLICED = 2112  # columns of a fused projection, of which a norm reads 1536
# graph -> (bytes read, bytes written) of each launch, counted by hand: elements * size of each tensor that has to move
BY_HAND: dict[str, list[tuple[int, int]]] = {
    "add": [(2 * M * 512 * 2, M * 512 * 2)],
    "cast_scale": [(M * 512 * 2, M * 512 * 2)],
    "clamp_to_fp8": [(M * 512 * 2, M * 512)],
    "sum_rows": [(M * 512 * 2, M * 2)],
    "rms_norm": [(M * K * 2 + K * 2, M * K * 2)],
    # q in fp8, one fp32 scale for each of 56 groups
    "quantize": [(M * K * 2, M * K + M * 56 * 4)],
    # x + residual -> total bf16 and a sum per row; then total, the sums and the weight -> q and scales
    "add_norm_quant": [(2 * M * K * 2, M * K * 2 + M * 4), (M * K * 2 + M * 4 + K * 2, M * K + M * 56 * 4)],
    # of a [1000, 512] table only the 64 rows that are looked up
    "embedding": [(M * 8 + M * 512 * 2, M * 512 * 2)],
    # 64 rows of k are read; they and their double are written
    "kv_cache_update": [(M * 8 + M * 512 * 2, 2 * M * 512 * 2)],
    "in_place_add": [(2 * M * 512 * 2, M * 512 * 2 + M * 2)],
    "group_norm": [(2 * 64 * 16 * 16 * 2 + 2 * 64 * 2, 2 * 64 * 16 * 16 * 2)],
    # x [64, 512], weights [1536, 512]; q [64, 512] and k [64, 512] of the result; scores [64, 64]; v; x again
    "attention_block": [
        (M * 512 * 2 + 1536 * 512 * 2, M * 1536 * 2),
        (2 * M * 512 * 2, M * M * 2),
        (M * M * 2, M * M * 2),
        (M * M * 2 + M * 512 * 2, M * 512 * 2),
        (M * 512 * 2 + M * 512 * 2 + 512 * 512 * 2, M * 512 * 2),
    ],
    "sum_all": [(4096 * 4096 * 2, 512 * 4), (512 * 4, 2)],
    "foreach_mul": [((64 + 128 + 1024) * 2, (64 + 128 + 1024) * 2)],
}  # fmt: skip
SPLIT_EARLIER = {"add_norm_quant", "attention_block", "group_norm"}  # which kernels there are depends on the version
BEFORE_2_13 = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


@pytest.mark.parametrize("name", BY_HAND)
def test_bytes_by_hand(name: str) -> None:
    if name in SPLIT_EARLIER and BEFORE_2_13:
        pytest.skip(f"counted for the kernels of torch 2.13 and later, this is {torch.__version__}")
    _, report = compiled(name)
    assert [(launch.bytes_read, launch.bytes_written) for launch in report.launches] == BY_HAND[name]
    assert report.bytes == sum(read + written for read, written in BY_HAND[name])


# graphs whose count is about what is not read: (graph, bytes read, bytes written)
PARTIAL: dict[str, tuple[Graph, int, int]] = {
    "half of each of two": (
        (lambda x, y: torch.cat([x[:, :32], y[:, 32:]], 1).relu(), lambda: (empty(M, 64), empty(M, 64))),
        2 * M * 32 * 2, M * 64 * 2,
    ),
    "a slice of the columns": (
        (lambda x: x[:, :1536].float().pow(2).mean(-1), lambda: (empty(M, SLICED),)), M * 1536 * 2, M * 4,
    ),
    "every second element": ((lambda x: x[:, ::2] * 2, lambda: (empty(M, 512),)), M * 256 * 2, M * 256 * 2),
    "a broadcast row": ((lambda x, b: x + b, lambda: (empty(M, 512), empty(512))), M * 512 * 2 + 512 * 2, M * 512 * 2),
    "rows by index": (
        (lambda x, i: x[i] * 2, lambda: (empty(1000, 512), empty(M, dtype=I64))), M * 8 + M * 512 * 2, M * 512 * 2,
    ),
    "one column": ((lambda x: x[:, 3] * 2, lambda: (empty(M, 512),)), M * 2, M * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTIAL)
def test_only_what_is_touched_counts(name: str) -> None:
    graph, read, written = PARTIAL[name]
    (launch,) = audit(*graph).launches
    assert (launch.bytes_read, launch.bytes_written) == (read, written)


def test_a_symbolic_size_gives_the_same_bytes_at_the_same_size() -> None:
    fixed = audit(*GRAPHS["rms_norm"])
    symbolic = audit(*GRAPHS["rms_norm"], dynamic=True)
    assert symbolic.programs[0].sizes and not fixed.programs[0].sizes
    assert symbolic.bytes == fixed.bytes


def test_rows_of_several_inputs_that_are_one_symbol() -> None:
    """Inductor then reads the symbol off an input, or gives it two names."""

    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def inputs() -> tuple[torch.Tensor, ...]:
        x, y = empty(M, 512), empty(M, 512)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        return x, y

    report = audit(fn, inputs)
    assert [(launch.bytes_read, launch.bytes_written) for launch in report.launches] == BY_HAND["add"]
    assert set(report.programs[0].sizes.values()) == {M}
