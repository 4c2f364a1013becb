"""A cached launch does what Triton's own launch does."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from shared.machine_code import KERNEL_MODULES, SM_90, on_target
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from normquant import QuantSpec, specs
from normquant.kernels import group_quant, latent_norm_quant, launch, rms_norm_quant, rope_last, silu_mul_quant
from normquant.kernels.capability import LaunchTarget
from normquant.kernels.configs import Config
from normquant.kernels.launch import Launch, Plan, kernel_spec
from normquant.kernels.partial_rows import WHOLE
from normquant.ops import _op
from normquant.ops._op import cached

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
        stack.enter_context(on_target(SM_90))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(mock.patch.object(CompiledKernel, "_init_handles", lambda self: None))
        stack.enter_context(mock.patch.object(CompiledKernel, "run", lambda self, *args: calls.append((self, args))))
        stack.enter_context(mock.patch.dict(_op._launches, clear=True))
        yield calls


def op(plan):
    """As an op on CUDA launches, on checked arguments."""
    return cached(plan.__name__, lambda *args: Launch(plan(*args)))


NORM, LATENT = op(rms_norm_quant.plan_rms_norm_quant), op(latent_norm_quant.plan_latent_norm_quant)
GROUP_QUANT, SILU = op(group_quant.plan_group_quant), op(silu_mul_quant.plan_silu_mul_quant)
ROPE = op(rope_last.plan_rope_last)


@contextlib.contextmanager
def without_triton():
    with mock.patch.object(JITFunction, "run", side_effect=AssertionError("Triton was asked again")):
        yield


def rows(m=4, k=K, dtype=torch.bfloat16, offset=0):
    return torch.empty(m * k + offset, dtype=dtype)[offset:].view(m, k)


def norm(x=None, residual=None, weight_dtype=torch.bfloat16, spec=SPEC, offset=0.0, normed=False, config=PLAIN):
    x = rows() if x is None else x
    weight = torch.empty(x.shape[1], dtype=weight_dtype)
    return NORM(x, residual, weight, 1e-6, spec, offset, normed, config)


def latent(angles=64):
    x, cache = rows(4, 1536 + 512 + 64), torch.empty(8, angles, dtype=torch.bfloat16)
    weights = torch.empty(1536, dtype=x.dtype), torch.empty(512, dtype=x.dtype)
    angles = cache[:, :32], cache[:, 32:64], POSITIONS[torch.int64]
    return LATENT(x, *weights, *angles, 1e-6, "half", SPEC)


def rope(dtype=torch.int64):
    cache = torch.empty(8, 64, dtype=torch.bfloat16)
    angles = cache[:, :32], cache[:, 32:], POSITIONS[dtype]
    return ROPE(rows(4, 4 * 192), *angles, 4, 64, "interleaved", SPEC)


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
    "cluster": lambda: norm(config=Config(4, 4, cluster=True)),
    "group_quant": lambda: GROUP_QUANT(rows(), SPEC),
    "silu": lambda: SILU(rows(), SPEC),
    "product as an output": lambda: SILU(rows(), SPEC, None, True),
    "latent": latent,
    "narrow angles": lambda: latent(angles=68),
    "rope": rope,
    "int32 positions": lambda: rope(torch.int32),
}


def test_generated_code_launches_what_the_op_does(launched):
    torch.ops.normquant.group_quant.default.launch(rows(), SPEC.encode())
    GROUP_QUANT(rows(), SPEC)
    (generated, _), (dispatched, _) = launched
    assert generated is dispatched


def test_every_launch_finds_the_binary_that_triton_takes(launched):
    for run in LAUNCHES.values():
        run()
    binaries = [binary for binary, _ in launched]
    assert len({id(binary) for binary in binaries}) == len(LAUNCHES), "these do not tell the binaries apart"
    launched.clear()
    with without_triton():
        for launch in reversed(LAUNCHES.values()):
            launch()
    assert [binary for binary, _ in launched] == binaries[::-1]


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launcher_gets_what_triton_would_give_it(launched, name):
    with same_tensors(torch, "empty") as inputs_again, same_tensors(torch, "empty_strided") as outputs_again:
        LAUNCHES[name]()
        inputs_again(), outputs_again()
        with without_triton():
            LAUNCHES[name]()
    (first, (*head, _, _, _, theirs)), (second, (*our_head, _, _, _, ours)) = map(split, launched)
    assert first is second and our_head == head and len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a == (b.data_ptr() if isinstance(b, torch.Tensor) else b)


@contextlib.contextmanager
def same_tensors(module, name):
    """A function of a module that gives what it gave before, one after the other, once that is asked for."""
    function, made, again = getattr(module, name), [], []

    def give(*args, **kwargs):
        if again:
            return again.pop(0)
        made.append(function(*args, **kwargs))
        return made[-1]

    with mock.patch.object(module, name, give):
        yield lambda: again.extend(made)


def split(launch):
    """(binary, [grid, stream, function, metadata, what hooks get, two hooks, the kernel's arguments])."""
    binary, args = launch
    return binary, [*args[:9], args[9:]]


def test_inputs_of_two_launches_are_the_ones_given(launched):
    x = [rows(), rows()]
    for tensor in x * 2:
        norm(tensor)
    at = [split(launch)[1][-1][0] for launch in launched]
    assert [getattr(a, "data_ptr", lambda a=a: a)() for a in at] == [t.data_ptr() for t in x * 2]


def test_a_profiler_is_told_of_every_launch(launched):
    norm()
    told = []
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(told.append)
    try:
        norm()
    finally:
        hook.remove(told.append)
    norm()
    metadata = [split(launch)[1][6] for launch in launched]
    assert metadata[1] is not None and metadata[2] is None
    assert split(launched[1])[1][7] is hook


def test_rows_may_be_any_number_and_any_aligned_distance_apart(launched):
    norm(rows(2, 2 * K)[:, :K])
    with mock.patch.object(JITFunction, "_do_compile", side_effect=AssertionError("recompiled")):
        for m, width in ((1, K), (3, 3 * K), (1000, K + 8)):
            norm(rows(m, width)[:, :K])


@pytest.mark.parametrize(("config", "grid"), [(Config(4, 4), (3, 4, 1)), (Config(4, 3), (3, 2, 1))])
def test_programs_of_a_row_are_launched_as_clusters(launched, config, grid):
    for cluster in (False, True):
        for _ in range(2):
            norm(rows(3), config=replace(config, cluster=cluster))
    plain, clusters = ([split(launch)[1] for launch in launched[at : at + 2]] for at in (0, 2))
    for x, y, z, _, _, metadata, *_ in plain:
        assert ((x, y, z), metadata[:2]) == (grid, (4, 1))  # num_warps, programs of a cluster
    for x, y, z, _, _, metadata, *_ in clusters:  # Triton multiplies x with the size of a cluster
        assert ((x, y, z), metadata[:2]) == ((3, 1, 1), (4, grid[1]))


def test_a_program_is_given_the_shared_memory_that_its_plan_asks_for(launched):
    x = rows(4, 3 * K)
    plan = replace(group_quant.plan_group_quant(x, SPEC), shared=115840)
    run = Launch(plan)
    run(x), run(x), Launch(replace(plan, shared=64))(x)  # which the binary has already
    binaries, metadata = {id(binary) for binary, _ in launched}, [split(launch)[1][5] for launch in launched]
    assert len(binaries) == 1 and [packed[2] for packed in metadata] == [115840] * 3
    assert launched[0][0].metadata.shared == 115840  # what Triton asks CUDA for when it loads the binary


def test_no_rows_launch_nothing(launched):
    data, scale = norm(rows(0))
    assert data.shape == (0, K) and scale.shape == (0, K // SPEC.group) and not launched


@pytest.mark.parametrize("m", [1, 4, 5])
@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
def test_outputs_are_strided_as_the_spec_says(launched, m, layout):
    spec = SPEC.replace(layout=layout)
    data, scale = norm(rows(m), spec=spec)
    assert (data.shape, data.stride(), data.dtype) == ((m, K), (K, 1), spec.dtype)
    assert scale.shape == spec.scale_shape(m, K) and scale.stride() == spec.scale_stride(m, K)
    assert scale.untyped_storage().nbytes() >= spec.bytes(m, K) - m * K, "the padding is not in the scale's memory"


def test_another_device_is_made_the_current_one():
    plan = Plan(None, (0, 1, 1), torch.device("cuda", 1), (), (launch.matrix(1, K, SPEC.dtype),), (), {}, {})
    current, made_on = [0], []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted.index)
        yield
        current.pop()

    with (
        mock.patch.object(launch, "_current_device", lambda: current[-1]),
        mock.patch.object(torch.cuda, "device", device),
        mock.patch.object(launch, "maker", lambda output, device: lambda: made_on.append(current[-1])),
    ):
        Launch(plan)()
    assert made_on == [1] and current == [0]


def test_constants_out_of_order_are_refused(launched):
    kernel, x = group_quant.group_quant_kernel, rows()
    values = dict(K=K, SPEC=kernel_spec(SPEC), PARTIAL=WHOLE, BLOCK_G=4, STRIDE_UNIT=8, PDL="loaded", ON_CUDA=True)
    assert list(values) == kernel.arg_names[6:]
    rest = dict(
        grid=(4, 1, 1),
        inputs=(x,),
        outputs=launch.quantized(4, K, SPEC),
        numbers=(4, 64, 4),
        where=LaunchTarget(True, SM_90),
        config=Config(4),
    )
    Launch(launch.plan(kernel, **rest, **values))(x)
    swapped = Launch(launch.plan(kernel, **rest, SPEC=values.pop("SPEC"), **values))
    for _ in range(2):
        with pytest.raises(TypeError, match="constants"):
            swapped(x)


KERNELS = {
    name: kernel for module in KERNEL_MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")
}


@pytest.mark.parametrize("name", KERNELS)
def test_no_number_is_specialized_on(name):
    numbers = [p for p in KERNELS[name].params if not p.is_constexpr and not p.name.endswith("_ptr")]
    assert numbers and all(p.do_not_specialize for p in numbers)
