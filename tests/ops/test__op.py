"""What every op has: a warm-up that leaves nothing to compile, examples, traffic, and cached launches."""

import contextlib
from itertools import count, product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from shared.machine_code import SM_90, compiling, on_target
from torch._subclasses.fake_tensor import FakeTensorMode

import normquant as nq
from normquant import QuantSpec
from normquant.kernels import configs
from normquant.ops import OPS, Examples, _op
from normquant.ops._op import Op, cached, register

SPEC = QuantSpec(layout="col_tma")
MS = (1, 2, 3, 16, 17, 64, 65, 200, 257, 1000, 5000)
CHOOSING = [op for op in OPS.values() if op.configs]


def tensors(args: dict) -> list[torch.Tensor]:
    return [arg for arg in args.values() if isinstance(arg, torch.Tensor)]


@pytest.mark.parametrize("op", CHOOSING, ids=lambda op: op.name)
def test_a_warm_up_leaves_nothing_to_compile(op):
    k = 2048 if 2048 in op.widths else op.widths[0]
    with compiling(SM_90) as kernels:
        count = nq.warmup(op.name, k, SPEC, device="cpu")
        warm = set(map(id, kernels))
        assert len(kernels) == count == len(configs.configs(op.configs, k, SM_90)) > 1
        for m, gap in product(MS, (0, 24)):
            args = op.example(Examples(m, k, "cpu", gap=gap))
            args |= {"eps": 1e-5} if "eps" in args else {}
            op.run(*args.values(), SPEC)
    assert set(map(id, kernels)) == warm and len(kernels) == count + 2 * len(MS)


def test_what_cannot_be_warmed():
    norm = CHOOSING[0].name
    with pytest.raises(ValueError, match="nothing to compile for cpu"):
        nq.warmup(norm, 512, device="cpu")
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        pytest.raises(ValueError, match="there is no CUDA device here"),
    ):
        nq.warmup(norm, 512)
    for unknown in ("rms_norm", *(op.name for op in OPS.values() if not op.configs)):
        with on_target(SM_90), pytest.raises(ValueError, match=f"op is '{unknown}'; accepted: the ops of"):
            nq.warmup(unknown, 512, device="cpu")


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_examples_are_what_the_op_accepts(op):
    args = op.example(Examples(3, 1536, "cpu", gap=8))
    assert tuple(args) == op.argument_names
    outputs = op.overload(*args.values(), SPEC.encode())
    assert all(output.shape[0] == 3 for output in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))
    again = op.example(Examples(3, 1536, "cpu", gap=8))
    assert all(map(torch.equal, tensors(args), tensors(again))), "a seed has other values a second time"


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_traffic_is_every_input_and_output_once(op):
    m, k = 3, 1536
    args = op.example(Examples(m, k, "cpu"))
    outputs = op.overload(*args.values(), QuantSpec().encode())
    written = sum(t.nbytes for t in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))
    # of cos and sin a row for each row of x; positions are left out
    read = sum(
        t.nbytes if name not in ("cos", "sin") else m * t.shape[1] * t.element_size()
        for name, t in args.items()
        if isinstance(t, torch.Tensor) and name != "positions"
    )
    assert op.traffic(m, k, QuantSpec()) == (read, written)


def test_what_cannot_be_launched_is_asked_about_again():
    asked = []

    def make(x, eps):
        asked.append(eps)
        if eps < 0:
            raise ValueError("eps")
        return lambda *tensors: [*tensors]

    call, x = cached("test", make), torch.empty(4, 512)
    with mock.patch.dict(_op._launches, clear=True):
        for eps in (1.0, 1.0, -1.0, -1.0):
            with contextlib.suppress(ValueError):
                assert call(x, eps) is x
    assert asked == [1.0, -1.0, -1.0]


def test_memory_for_launches_is_bounded():
    with mock.patch.dict(_op._launches, clear=True), mock.patch.object(_op, "LAUNCH_LIMIT", 3):
        call = cached("test", lambda n: lambda: [])
        for n in range(10):
            call(n)
            assert len(_op._launches) <= 3


NUMBERS = count()


def scratch(**fields):
    """An op that was never registered: it divides by eps, and calls its launch's outputs 7."""
    name = f"scratch_{next(NUMBERS)}"

    def plan(x, eps, spec, config=None):
        return SimpleNamespace(arguments=(x, eps, spec, config))

    return Op(
        name=name,
        schema="(Tensor x, float eps, str spec) -> (Tensor data, Tensor scale)",
        check=fields.pop("check", lambda x, eps, spec: None),
        fake=lambda x, eps, spec: (x.new_empty(spec.group, dtype=torch.int8), x.new_empty(2)),
        reference=lambda x, eps, spec: (x / eps, x + spec.group),
        plan=plan,
        traffic=lambda m, k, spec: (m, k),
        example=lambda examples: {"x": torch.ones(examples.k), "eps": 1.0},
        sizes=lambda x, eps: {"k": x.shape[-1], "eps": eps},
        configs="scratch",
        **fields,
    )


@pytest.fixture
def library(monkeypatch):
    """Where scratch ops are defined, gone after the test."""
    with torch.library._scoped_library("normquant", "FRAGMENT") as own:
        monkeypatch.setattr(_op, "LIBRARY", own)
        yield


def registered(**fields):
    with mock.patch.dict(OPS):
        op = register(scratch(**fields))
        assert OPS[op.name] is op
    return op


@pytest.mark.usefixtures("library")
def test_an_op_gives_its_reference_on_a_cpu_and_its_fake_to_the_compiler():
    op, x = registered(), torch.full((2,), 6.0)
    assert op.stem == op.name and registered(stem="another").stem == "another"
    assert op.overload is getattr(torch.ops.normquant, op.name).default and op.argument_names == ("x", "eps")
    data, scale = op.overload(x, 2.0, QuantSpec(group=64).encode())
    assert torch.equal(data, x / 2) and torch.equal(scale, x + 64)
    with FakeTensorMode() as mode:
        data, scale = op.overload(mode.from_tensor(x), 2.0, QuantSpec(group=64).encode())
    assert (data.shape, data.dtype, scale.shape) == ((64,), torch.int8, (2,))
    tags = {tag.name for tag in op.overload.tags}
    assert {"pt2_compliant_tag", "needs_fixed_stride_order"} <= tags


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("eps", ["default", "tensor"])
def test_what_its_check_refuses_is_refused_everywhere(eps):
    seen = []

    def check(x, eps, spec):
        seen.append((eps, spec))
        raise ValueError("eps is too round")

    op = registered(check=check, eps_overload=True)
    call = getattr(getattr(torch.ops.normquant, op.name), eps)
    given = 2.0 if eps == "default" else torch.tensor(2.0)
    with pytest.raises(ValueError, match="eps is too round"):
        call(torch.ones(2), given, QuantSpec(group=64).encode())
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="eps is too round"):
        fake = mode.from_tensor(given) if eps == "tensor" else given
        call(mode.from_tensor(torch.ones(2)), fake, QuantSpec(group=64).encode())
    assert seen == [(2.0, QuantSpec(group=64)), (2.0 if eps == "default" else 1.0, QuantSpec(group=64))]


@pytest.mark.usefixtures("library")
def test_epsilon_may_be_a_tensor_where_an_op_says_so():
    op, x = registered(eps_overload=True), torch.full((2,), 6.0)
    call = getattr(torch.ops.normquant, op.name).tensor
    data, scale = call(x, torch.tensor(3.0, dtype=torch.float64), QuantSpec(group=32).encode())
    assert torch.equal(data, x / 3) and torch.equal(scale, x + 32)
    assert {tag.name for tag in call.tags} >= {"pt2_compliant_tag", "needs_fixed_stride_order"}
    with FakeTensorMode() as mode:
        data, scale = call(mode.from_tensor(x), mode.from_tensor(torch.tensor(3.0)), QuantSpec(group=32).encode())
    assert (data.shape, scale.shape) == ((32,), (2,))
    assert getattr(torch.ops.normquant, registered().name).overloads() == ["default"]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("overload", ["default", "tensor"])
def test_no_op_has_a_gradient(overload):
    op = registered(eps_overload=True)
    call = getattr(getattr(torch.ops.normquant, op.name), overload)
    eps = 2.0 if overload == "default" else torch.tensor(2.0)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{op.name} has no gradient, and an argument requires grad"):
        call(x, eps, QuantSpec().encode())
    with torch.no_grad():
        assert not any(out.requires_grad for out in call(x, eps, QuantSpec().encode()))


@pytest.mark.usefixtures("library")
def test_a_launch_is_planned_for_checked_arguments():
    op, x = registered(), torch.ones(2)
    with mock.patch("normquant.kernels.launch.Launch") as launch:
        made = op.launch(x, 2.0, QuantSpec(group=64).encode())
    ((plan,), _), out = launch.call_args, launch.return_value
    assert plan.arguments == (x, 2.0, QuantSpec(group=64), None) and made is out
    with mock.patch("normquant.kernels.launch.launch") as launch:
        assert op.run(x, 2.0, QuantSpec(group=64), config="a config") is launch.return_value
    (plan, *tensors_given), _ = launch.call_args
    assert plan.arguments == (x, 2.0, QuantSpec(group=64), "a config") and tensors_given == [x]


@pytest.mark.usefixtures("library")
def test_generated_code_finds_the_launch_at_what_torch_calls():
    op, x = registered(), torch.ones(2)
    with (
        mock.patch.dict(_op._launches, clear=True),
        mock.patch("normquant.kernels.launch.Launch", lambda plan: lambda *given: [plan.arguments, *given]),
    ):
        arguments, given = op.overload.launch(x, 2.0, QuantSpec(group=64).encode())
    assert arguments == (x, 2.0, QuantSpec(group=64), None) and given is x


def test_what_a_warm_up_is_told_of_a_call():
    x = torch.ones(3, 5, dtype=torch.float16)
    settings = scratch().warmup_settings(x, 0.5, QuantSpec(group=64).encode())
    assert settings.pop("op").startswith("scratch_") and settings.pop("spec") == QuantSpec(group=64)
    assert settings == {"dtype": torch.float16, "device": torch.device("cpu"), "k": 5, "eps": 0.5}


def test_a_warm_up_launches_every_config_with_every_rule():
    spec, ran = QuantSpec(divide="amax", few_rows=32), []
    op = mock.Mock(configs="a kernel", example=mock.Mock(return_value={"x": 1, "y": 2}))
    op.run = lambda *args, config: ran.append((*args, config))
    of_op = {"weight_dtype": torch.float32, "weight_offset": 1.0, "latent": (64, 32), "rope": "halves"}
    with (
        mock.patch.dict(OPS, scratch=op),
        mock.patch.object(configs, "configs", mock.Mock(return_value=["a", "b"])) as asked,
        on_target(SM_90),
    ):
        assert nq.warmup("scratch", 512, spec, dtype=torch.float16, device="cpu", **of_op) == 4
        assert nq.warmup("scratch", 512, dtype=torch.float16, device="cpu") == 2
    assert asked.call_args_list == [mock.call("a kernel", 512, SM_90)] * 2
    first = Examples(2, 512, torch.device("cpu"), torch.float16, torch.float32, 1.0, (64, 32), "halves")
    then = Examples(2, 512, torch.device("cpu"), torch.float16, torch.float16)
    assert [call.args for call in op.example.call_args_list] == [(first,), (then,)]
    rules = {spec.at(0), spec.at(32)}
    assert len(rules) == 2 and set(ran[:4]) == {(1, 2, rule, config) for rule in rules for config in "ab"}
    assert ran[4:] == [(1, 2, QuantSpec(), config) for config in "ab"]


def other(x, **changes):
    """A tensor like x, with one thing changed."""
    if "offset" in changes:
        return torch.empty(x.numel() + 8, dtype=x.dtype)[changes["offset"] :][: x.numel()].view(x.shape)
    return torch.empty_strided(**{"size": x.shape, "stride": x.stride(), "dtype": x.dtype} | changes)


def test_a_launch_is_made_once_for_what_it_depends_on():
    made = []

    def make(*args):
        made.append(args)
        return lambda *tensors: [*tensors]

    x = torch.empty(4, 8)
    others = [
        other(x, size=(2, 8)), other(x, stride=(16, 1)), other(x, dtype=torch.float16), other(x, offset=1),
        other(x, offset=2), other(x, offset=4),
    ]  # fmt: skip
    with mock.patch.dict(_op._launches, clear=True):
        call = cached("test", make)
        for given in (x, x.clone(), *others[:4]):
            assert call(given, 1.0) is given
        assert len(made) == 5
        assert call(others[4], 1.0) is others[4] and len(made) == 5, "as far from an address that is a multiple of 16"
        assert call(others[5], 1.0) is others[5] and len(made) == 5, "aligned again"
        assert call(x, 2.0) is x and call(x, 2.0) is x and len(made) == 6
        assert call(x, None, x) == (x, x) and len(made) == 7
        assert cached("another", make)(x, 1.0) is x and len(made) == 8
        x.requires_grad_()
        with pytest.raises(RuntimeError, match="test has no gradient"):
            call(x, 1.0)
        with torch.no_grad():
            assert call(x, 1.0) is x and len(made) == 8
