"""A launch that finds its binary again does what Triton's own launch does."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from normquant import QuantSpec, specs
from normquant.kernels import dispatch, group_quant, latent_norm_quant, rms_norm_quant, rope_last, silu_mul_quant
from normquant.kernels.launch import Config, Target, constant

MODULES = group_quant, latent_norm_quant, rms_norm_quant, rope_last, silu_mul_quant
SPEC = QuantSpec(layout="col_tma")
K = 512
PLAIN = Config(4)
POSITIONS = {dtype: torch.zeros(4, dtype=dtype) for dtype in (torch.int32, torch.int64)}


@pytest.fixture
def launched():
    """What reaches the C launcher of Triton, (binary, arguments), on a GPU that is not there."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    calls = []
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "target", lambda device: Target(True, (9, 0))))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(mock.patch.object(CompiledKernel, "_init_handles", lambda self: None))
        stack.enter_context(mock.patch.object(CompiledKernel, "run", lambda self, *args: calls.append((self, args))))
        stack.enter_context(mock.patch.dict(dispatch._binaries, clear=True))
        yield calls


@contextlib.contextmanager
def without_triton():
    with mock.patch.object(JITFunction, "run", side_effect=AssertionError("Triton was asked again")):
        yield


def rows(m=4, k=K, dtype=torch.bfloat16, offset=0):
    return torch.empty(m * k + offset, dtype=dtype)[offset:].view(m, k)


def norm(x=None, residual=None, weight_dtype=torch.bfloat16, spec=SPEC, offset=0.0, normed=False, config=PLAIN):
    x = rows() if x is None else x
    weight = torch.empty(x.shape[1], dtype=weight_dtype)
    rms_norm_quant.rms_norm_quant(x, residual, weight, 1e-6, spec, offset, normed, config)


def latent(angles=64):
    x, cache = rows(4, 1536 + 512 + 64), torch.empty(8, angles, dtype=torch.bfloat16)
    weights = torch.empty(1536, dtype=x.dtype), torch.empty(512, dtype=x.dtype)
    angles = cache[:, :32], cache[:, 32:64], POSITIONS[torch.int64]
    latent_norm_quant.latent_norm_quant(x, *weights, *angles, 1e-6, "half", SPEC)


def rope(dtype=torch.int64):
    cache = torch.empty(8, 64, dtype=torch.bfloat16)
    angles = cache[:, :32], cache[:, 32:], POSITIONS[dtype]
    rope_last.rope_last(rows(4, 4 * 192), *angles, 4, 64, "interleaved", SPEC)


FAR = torch.empty(1).as_strided((1, 1), (2**36, 1)).stride(0)  # a stride that takes 64 bits, also when divided by 8
# Launches that need different binaries.
LAUNCHES = {
    "norm": norm,
    "residual": lambda: norm(residual=rows()),
    "norm as an output": lambda: norm(normed=True),
    "both": lambda: norm(residual=rows(), normed=True),
    "fp16": lambda: norm(rows(dtype=torch.float16)),
    "fp32 weight": lambda: norm(weight_dtype=torch.float32),
    "misaligned": lambda: norm(rows(offset=1)),
    "misaligned residual": lambda: norm(residual=rows(offset=1)),
    "odd stride": lambda: norm(rows(4, K + 1)[:, :K]),
    "far rows": lambda: norm(torch.empty(K, dtype=torch.bfloat16).as_strided((1, K), (FAR, 1))),
    "K": lambda: norm(rows(4, 2 * K)),
    "spec": lambda: norm(spec=specs.DEEPGEMM),
    "1 + w": lambda: norm(offset=1.0),
    "warps": lambda: norm(config=Config(8)),
    "release": lambda: norm(config=Config(4, release="start")),
    "split": lambda: norm(config=Config(4, 2)),
    "group_quant": lambda: group_quant.group_quant(rows(), SPEC),
    "silu": lambda: silu_mul_quant.silu_mul_quant(rows(), SPEC),
    "latent": latent,
    "narrow angles": lambda: latent(angles=68),
    "rope": rope,
    "int32 positions": lambda: rope(torch.int32),
}


def test_every_launch_finds_the_binary_that_triton_takes(launched):
    for launch in LAUNCHES.values():
        launch()
    binaries = [binary for binary, _ in launched]
    assert len({id(binary) for binary in binaries}) == len(LAUNCHES), "these do not tell the binaries apart"
    launched.clear()
    with without_triton():
        for launch in reversed(LAUNCHES.values()):
            launch()
    assert [binary for binary, _ in launched] == binaries[::-1]


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launcher_gets_what_triton_would_give_it(launched, name):
    made, kept = torch.empty, {}

    def same(*args, **kwargs):  # the outputs of both launches in the same memory
        return kept.setdefault((args, tuple(kwargs.items())), made(*args, **kwargs))

    with mock.patch.object(torch, "empty", same):
        LAUNCHES[name]()
        with without_triton():
            LAUNCHES[name]()
    (first, theirs), (second, ours) = launched
    assert first is second and len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.shape, a.stride(), a.dtype, a.data_ptr()) == (b.shape, b.stride(), b.dtype, b.data_ptr())
        else:
            assert getattr(a, "data", a) == getattr(b, "data", b)  # what hooks are told is a LazyDict


def test_rows_may_be_any_number_and_any_aligned_distance_apart(launched):
    norm(rows(2, 2 * K)[:, :K])
    with without_triton():
        for m, width in ((1, K), (3, 3 * K), (1000, K + 8)):
            norm(rows(m, width)[:, :K])


def test_constants_out_of_order_are_refused(launched):
    x, where = rows(), Target(True, (9, 0))
    names = group_quant.group_quant_kernel.arg_names[6:]
    values = dict(K=K, SPEC=constant(SPEC), BLOCK_G=4, STRIDE_UNIT=8, PDL="loaded", ON_CUDA=True)
    tensors = x, x.to(torch.float8_e4m3fn), torch.empty(4, 4)
    assert list(values) == names
    dispatch.launch(group_quant.group_quant_kernel, (4, 1, 1), tensors, (4, 64, 4), where, Config(4), **values)
    swapped = {"SPEC": values.pop("SPEC"), **values}
    with pytest.raises(TypeError, match="constants"):
        dispatch.launch(group_quant.group_quant_kernel, (4, 1, 1), tensors, (4, 64, 4), where, Config(4), **swapped)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_no_number_is_specialized_on(module):
    name = module.__name__.rpartition(".")[2]
    kernel = getattr(module, f"{name}_kernel")
    numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
    assert numbers and all(p.do_not_specialize for p in numbers)
