"""The grid of cases, the bytes of each, and a bench that says why it cannot run."""

import pytest
import torch

from normquant import QuantSpec
from normquant.bench.cases import KS, LATENT, MS, OPS, Case, kernel_cases
from normquant.cli.entry import main
from normquant.ops import _bytes

ROW = QuantSpec()


def test_the_full_grid():
    cases = list(kernel_cases(OPS))
    assert len(cases) == len(set(cases)) == 15 * (2 * 2 * len(KS) + len(KS) + 3 + 1)
    assert {c.m for c in cases} == set(MS)


def test_bytes_by_hand():
    # 2 rows of 256 bf16 values: 1024 bytes; fp8 data: 512; 2 groups a row, 4 bytes each: 16; the weight: 512
    assert _bytes.rms_norm_quant(2, 256, ROW) == (1024 + 512, 512 + 16)
    assert _bytes.rms_norm_quant(2, 256, ROW, residual=True, normed=True) == (2048 + 512, 512 + 16 + 2048)
    assert _bytes.group_quant(2, 256, ROW) == (1024, 528)
    assert _bytes.silu_mul_quant(2, 256, ROW) == (2048, 528)
    assert _bytes.group_quant(2, 256, ROW.replace(layout="col_tma")) == (1024, 512 + 32)  # two padding rows
    q, c, r = LATENT
    read, written = _bytes.latent_norm_quant(1, q, c, r, ROW)
    assert read == 2 * (q + c + r) + 2 * (q + c) + 2 * r
    assert written == q + 4 * q // 128 + 2 * c + 2 * r


@pytest.mark.parametrize("op", OPS)
def test_every_case_moves_bytes(op):
    assert all(min(Case(op, m, 1536).traffic) > 0 for m in MS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is present")
@pytest.mark.parametrize("command", [["bench", "kernels"], ["bench", "layer"], ["tune"]])
def test_no_gpu_is_one_line(command, capsys):
    assert main(command) == 2
    assert "there is no CUDA GPU here" in capsys.readouterr().err
