"""warmup compiles every kernel that an op may choose, seen on a GPU that need not be there."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from shared.machine_code import SM_90, compiling

import normquant as nq
from normquant import QuantSpec
from normquant.kernels import capability, configs, group_quant, latent_norm_quant, rms_norm_quant, silu_mul_quant
from normquant.kernels.capability import LaunchTarget

SPEC = QuantSpec(layout="col_tma")
MS = (1, 2, 3, 16, 17, 64, 65, 200, 257, 1000, 5000)


def rows(m: int, width: int) -> torch.Tensor:
    return torch.empty(m, width, dtype=torch.bfloat16)


def weight(width: int) -> torch.Tensor:
    return torch.empty(width, dtype=torch.bfloat16)


K = 2048


CALLS = {
    "rms_norm_quant": (
        rms_norm_quant,
        lambda m: rms_norm_quant.rms_norm_quant(rows(m, K), None, weight(K), 1e-5, SPEC),
    ),
    "add_rms_norm_quant_with_norm": (
        rms_norm_quant,
        lambda m: rms_norm_quant.rms_norm_quant(rows(m, K), rows(m, K), weight(K), 1e-5, SPEC, 0.0, True),
    ),
    "group_quant": (group_quant, lambda m: group_quant.group_quant(rows(m, K), SPEC)),
    "silu_mul_quant": (silu_mul_quant, lambda m: silu_mul_quant.silu_mul_quant(rows(m, 2 * K), SPEC)),
}


@pytest.mark.parametrize("op", CALLS)
def test_nothing_is_compiled_afterwards(op):
    module, call = CALLS[op]
    with ExitStack() as stack:
        kernels = stack.enter_context(compiling(module, SM_90))
        stack.enter_context(mock.patch.object(capability, "target", lambda device: LaunchTarget(True, SM_90)))
        count = nq.warmup(op, K, SPEC, device="cpu")
        warm = set(map(id, kernels))
        assert len(kernels) == count == len(configs.configs(op, K, SM_90)) > 1
        for m in MS:
            call(m)
    assert set(map(id, kernels)) == warm


def test_both_latent_ops_are_warmed():
    for op in ("latent_norm_quant", "latent_norm_quant_with_kv"):
        with (
            compiling(latent_norm_quant, SM_90) as kernels,
            mock.patch.object(capability, "target", lambda device: LaunchTarget(True, SM_90)),
        ):
            assert nq.warmup(op, 1536, SPEC, device="cpu") == len(kernels) == len(configs.configs(op[:17], 1536, SM_90))


def test_what_cannot_be_warmed():
    with pytest.raises(ValueError, match="nothing to compile for cpu"):
        nq.warmup("rms_norm_quant", 512, device="cpu")
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        pytest.raises(ValueError, match="there is no CUDA device here"),
    ):
        nq.warmup("rms_norm_quant", 512)
    with (
        mock.patch.object(capability, "target", lambda device: LaunchTarget(True, SM_90)),
        pytest.raises(ValueError, match="op is 'rms_norm'; accepted: the ops of"),
    ):
        nq.warmup("rms_norm", 512, device="cpu")
