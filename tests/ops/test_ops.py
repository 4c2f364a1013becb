"""The ops and the functions around them on CPU: schemas, fakes, shapes, torch.compile and torch.export."""

from itertools import product

import pytest
import torch
from shared.compare import assert_bitwise, bits
from shared.inputs import activations, weights

import normquant as nq
from normquant import QuantSpec, reference
from normquant.ops import OPS, Examples, Op, latent_norm_quant, silu_mul_quant
from normquant.spec import QuantizedActivation

K, Q, C, R = 384, 256, 128, 32
SPECS = {
    "default": QuantSpec(),
    "col": QuantSpec(layout="col"),
    "col_tma": QuantSpec(layout="col_tma"),
    "ue8m0": QuantSpec(layout="col_tma", scale="ue8m0"),
    "packed": QuantSpec(layout="col_tma", scale="ue8m0_packed"),
    "group64": QuantSpec(layout="row", group=64, rounding="twice"),
}
EVERY = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def x_of(m: int, width: int = K, *, seed: int = 0, strided: bool = False) -> torch.Tensor:
    return activations(m, width, seed=seed, strided=strided)


def example(op: Op, m: int, strided: bool) -> dict:
    """Arguments of an op for m rows, by name, with what may differ between them: strides, positions, the embedding."""
    rope = "interleaved_to_half" if strided else "half"
    gap, limit = (K + 16, 1.3) if strided else (0, None)
    args = op.example(Examples(m, K, "cpu", weight_offset=1.0, latent=(C, R), rope=rope, gap=gap, limit=limit))
    for name in {"residual", "z"} & args.keys():  # strided as x is not
        if m:  # opcheck cannot clone an empty tensor with gaps between its rows
            args[name] = x_of(m, seed=1, strided=not strided)
    if "positions" in args and not strided:
        args["positions"] = None
    return args


def test_every_op_has_a_definition():
    # tests/linear has the ops of the linear layer, tests/distributed those of a group of ranks
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("normquant::")]
    names = {name.split("::")[1].partition(".")[0] for name in names}  # overloads are those of their op
    assert {name for name in names if not name.startswith(("all_reduce_", "block_fp8_linear"))} == set(OPS)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@EVERY
def test_opcheck(op, spec):
    for m, strided in ((5, True), (1, False), (0, False)):
        torch.library.opcheck(op.overload, (*example(op, m, strided).values(), spec.encode()))


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.eps_overload], ids=lambda op: op.name)
def test_epsilon_may_be_a_tensor(op):
    """Where torch.compile(dynamic=True) puts the floats of a module: in 0-dim tensors on the CPU."""
    args = example(op, 5, False)
    in_tensor, spec = args | {"eps": torch.tensor(args["eps"], dtype=torch.float64)}, SPECS["default"].encode()
    packet = getattr(torch.ops.normquant, op.name)
    torch.library.opcheck(packet.tensor, (*in_tensor.values(), spec))
    assert_bitwise(packet(*in_tensor.values(), spec), packet(*args.values(), spec))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@EVERY
def test_the_fake_says_what_the_op_gives(op, spec):
    for m, strided in product((0, 1, 2, 3, 4, 5, 8, 257), (False, True)):
        args = (*example(op, m, strided).values(), spec.encode())
        real = op.overload(*args)
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        fake = op.overload(*meta)
        for r, f in zip(flat(real), flat(fake), strict=True):
            assert (f.dtype, f.shape, f.stride()) == (r.dtype, r.shape, r.stride()), (m, strided)


@EVERY
def test_inputs_are_neither_changed_nor_returned(op):
    args = (*example(op, 5, True).values(), QuantSpec().encode())
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    outputs = flat(op.overload(*args))
    given = [a for a in args if isinstance(a, torch.Tensor)]
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    storages = [t.untyped_storage().data_ptr() for t in (*given, *outputs)]
    # views of one storage are allowed among the inputs alone
    assert len(set(storages[-len(outputs) :])) == len(outputs)
    assert not set(storages[: len(given)]) & set(storages[-len(outputs) :])


def flat(outputs) -> list[torch.Tensor]:
    """The tensors of what a function returned."""
    if isinstance(outputs, QuantizedActivation):
        return [outputs.data, outputs.scale]
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for output in outputs for t in flat(output)]


# name -> a public function of one activation and a spec, and the width of that activation
FUNCTIONS = {
    "rms_norm_quant": (lambda x, spec: nq.rms_norm_quant(x, W, spec=spec), K),
    "rms_norm_quant normed": (lambda x, spec: nq.rms_norm_quant(x, W, 1e-5, spec=spec, return_norm=True), K),
    "gemma": (lambda x, spec: nq.rms_norm_quant(x, W, spec=spec, weight_offset=1.0), K),
    "add_rms_norm_quant": (lambda x, spec: nq.add_rms_norm_quant(x, x * 2, W, spec=spec), K),
    "add_rms_norm_quant normed": (lambda x, spec: nq.add_rms_norm_quant(x, x * 2, W, spec=spec, return_norm=True), K),
    "group_quant": (lambda x, spec: nq.group_quant(x, spec=spec), K),
    "silu_mul_quant": (lambda x, spec: silu_mul_quant(x, spec=spec), 2 * K),
    "silu_mul_quant limit": (lambda x, spec: silu_mul_quant(x, spec=spec, limit=1.3), 2 * K),
    "silu_mul_quant product": (lambda x, spec: silu_mul_quant(x, spec=spec, return_product=True), 2 * K),
    "gated_norm_quant": (lambda x, spec: nq.gated_norm_quant(x, x * 2, W[:128], spec=spec), K),
    "latent_norm_quant": (lambda x, spec: latent(x, spec), Q + C + R),
    "latent_norm_quant kv": (lambda x, spec: latent(x, spec, quantize_kv=True), Q + C + R),
}
W = weights(K)
ANGLES = torch.rand(512, R // 2, generator=torch.Generator().manual_seed(0))


def latent(x, spec, **kwargs):
    return latent_norm_quant(x, W[:Q], W[:C], ANGLES, ANGLES + 1, spec=spec, **kwargs)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (0,), (2, 3), (2, 0, 3), (1, 1, 5), (2, 3, 4)])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_leading_dimensions(name, spec, shape):
    run, width = FUNCTIONS[name]
    m = int(torch.tensor(shape).prod()) if shape else 1
    x = x_of(m, width)
    many, rows = flat(run(x.view(*shape, width), spec)), flat(run(x, spec))
    for a, b in zip(many, rows, strict=True):
        assert a.shape == (*shape, b.shape[-1]) and a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b).view(a.shape))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 257])
def test_scales_are_strided_as_the_spec_says(m, spec):
    # also for one row, where torch itself does not care: a GEMM that checks the strides does
    for q, k in ((nq.group_quant(x_of(m), spec=spec), K), (nq.rms_norm_quant(x_of(m), W, spec=spec), K)):
        assert q.scale.stride() == spec.scale_stride(m, k)
    for q, k in zip(latent(x_of(m, Q + C + R), spec, quantize_kv=True)[::3], (Q, C), strict=True):
        assert q.scale.stride() == spec.scale_stride(m, k)


def test_evenly_spaced_rows_need_no_copy_and_others_are_refused():
    wide = x_of(12, 2 * K)
    view = wide.view(3, 4, 2 * K)[..., :K]  # the rows are evenly spaced
    rows = nq.group_quant(wide[:, :K].contiguous())
    assert_bitwise(flat(nq.group_quant(view)), [t.view(3, 4, -1) for t in flat(rows)])
    for uneven in (view[:, :3], view.transpose(0, 1)):
        with pytest.raises(ValueError, match=r"x has shape .* and stride .*contiguous"):
            nq.group_quant(uneven)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_those_of_the_reference(name):
    run, width = FUNCTIONS[name]
    x, spec = x_of(5, width, strided=True), QuantSpec(layout="col_tma", rounding="twice")
    r = {
        "rms_norm_quant": lambda: reference.rms_norm_quant(x, W, 1e-6, spec)[:2],
        "rms_norm_quant normed": lambda: reference.rms_norm_quant(x, W, 1e-5, spec),
        "gemma": lambda: reference.rms_norm_quant(x, W, 1e-6, spec, 1.0)[:2],
        "add_rms_norm_quant": lambda: reference.add_rms_norm_quant(x, x * 2, W, 1e-6, spec)[:3],
        "add_rms_norm_quant normed": lambda: reference.add_rms_norm_quant(x, x * 2, W, 1e-6, spec),
        "group_quant": lambda: reference.group_quant(x, spec),
        "silu_mul_quant": lambda: reference.silu_mul_quant(x, spec)[:2],
        "silu_mul_quant limit": lambda: reference.silu_mul_quant(x, spec, 1.3)[:2],
        "silu_mul_quant product": lambda: reference.silu_mul_quant(x, spec),
        "gated_norm_quant": lambda: reference.gated_norm_quant(x, x * 2, W[:128], 1e-6, spec),
        "latent_norm_quant": lambda: latent_reference(x, spec)[:4],
        "latent_norm_quant kv": lambda: latent_reference(x, spec),
    }[name]()
    assert_bitwise(flat(run(x, spec)), r)


def latent_reference(x, spec):
    return reference.latent_norm_quant(x, W[:Q], W[:C], ANGLES, ANGLES + 1, None, 1e-6, "interleaved", spec)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *product(FUNCTIONS, ["aot_eager"]),
        *product(["add_rms_norm_quant normed", "silu_mul_quant", "latent_norm_quant kv"], ["inductor"]),
    ],
)
def test_compiled_is_eager(name, backend, fresh_dynamo):
    run, width = FUNCTIONS[name]
    spec = QuantSpec(layout="col_tma", scale="ue8m0_packed" if "silu" in name else "fp32")
    compiled = torch.compile(lambda x: flat(run(x, spec)), fullgraph=True, backend=backend)
    for x in (x_of(5, width), x_of(6, width).view(2, 3, width)):
        assert_bitwise(compiled(x), flat(run(x, spec)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_m_compiles_nothing_new(name, fresh_dynamo):
    run, width = FUNCTIONS[name]
    spec = QuantSpec(layout="col_tma")
    compiled = torch.compile(lambda x: flat(run(x, spec)), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 2, 8, 257, 16, 3):
            x = x_of(m, width)
            torch._dynamo.mark_static(x, 1)
            assert_bitwise(compiled(x), flat(run(x, spec)))


def test_one_compiled_function_takes_several_specs(fresh_dynamo):
    compiled = torch.compile(lambda x, spec: flat(nq.group_quant(x, spec=spec)), fullgraph=True, backend="aot_eager")
    for spec in SPECS.values():
        assert_bitwise(compiled(x_of(5), spec), flat(nq.group_quant(x_of(5), spec=spec)))


def test_dequantize_compiles(fresh_dynamo):
    for spec in SPECS.values():
        q = nq.group_quant(x_of(5), spec=spec)
        both = lambda q: (q.scales(), q.dequantize(torch.bfloat16))  # noqa: E731
        assert_bitwise(torch.compile(both, fullgraph=True, backend="aot_eager")(q), both(q))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_export(name):
    run, width = FUNCTIONS[name]
    spec = QuantSpec(layout="col_tma")

    class Module(torch.nn.Module):
        def forward(self, x):
            return flat(run(x, spec))

    m = torch.export.Dim("m", min=2, max=512)
    program = torch.export.export(Module(), (x_of(5, width),), dynamic_shapes=({0: m},))
    for rows in (2, 7, 512):
        x = x_of(rows, width)
        assert_bitwise(program.module()(x), flat(run(x, spec)))
    assert any("normquant" in str(node.target) for node in program.graph.nodes)
