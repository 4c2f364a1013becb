"""The grid of cases, the bytes of each, and a bench that says why it cannot run."""

import pytest
import torch

from normquant import QuantSpec
from normquant.bench.cases import BENCHMARKED, MS, Case, kernel_cases
from normquant.cli.entry import main
from normquant.ops import OPS
from normquant.ops._op import WIDTHS

ROW = QuantSpec()


def test_the_full_grid():
    cases = list(kernel_cases(BENCHMARKED))
    assert len(cases) == len(set(cases)) == 15 * (2 * 2 * len(WIDTHS) + len(WIDTHS) + 3 + 3 + 1)
    assert {c.m for c in cases} == set(MS)


# op -> bytes read and written for 2 rows of 256 bf16 values, 1024 bytes: fp8 data has 512, 2 groups a row of 4 bytes
# each are 16, the weight has 512. Of the latents 128 + 64 values stand beside those 256, and 64 of cos and sin.
BYTES = {
    "rms_norm_quant": (1024 + 512, 512 + 16),
    "add_rms_norm_quant_with_norm": (2048 + 512, 512 + 16 + 2048),
    "group_quant": (1024, 528),
    "silu_mul_quant": (2048, 528),
    "gated_norm_quant": (2048 + 256, 528),  # a weight of one head, 128
    "latent_norm_quant": (2 * 2 * (256 + 128 + 64) + 2 * (256 + 128) + 2 * 2 * 64, 528 + 2 * 2 * (128 + 64)),
    "rope_last": (1024 + 2 * 2 * 64, 1024),
}


@pytest.mark.parametrize("op", BYTES)
def test_bytes_by_hand(op):
    sizes = {"latent": (128, 64)} if op.startswith("latent") else {}
    assert OPS[op].traffic(2, 256, ROW, **sizes) == BYTES[op]
    if op == "group_quant":
        assert OPS[op].traffic(2, 256, ROW.replace(layout="col_tma")) == (1024, 512 + 32)  # two padding rows


@pytest.mark.parametrize("op", BENCHMARKED)
def test_every_case_moves_bytes(op):
    assert all(min(Case(op, m, 1536).traffic) > 0 for m in MS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is present")
@pytest.mark.parametrize("command", [["bench", "kernels"], ["bench", "layer"], ["tune"]])
def test_no_gpu_is_one_line(command, capsys):
    assert main(command) == 2
    assert "there is no CUDA GPU here" in capsys.readouterr().err
