"""What every op has: a warm-up that leaves nothing to compile, examples, traffic, and cached launches."""

import contextlib
from itertools import product
from unittest import mock

import pytest
import torch
from shared.machine_code import SM_90, compiling, on_target

import normquant as nq
from normquant import QuantSpec
from normquant.kernels import configs
from normquant.ops import OPS, Examples, _op
from normquant.ops._op import cached

SPEC = QuantSpec(layout="col_tma")
MS = (1, 2, 3, 16, 17, 64, 65, 200, 257, 1000, 5000)
CHOOSING = [op for op in OPS.values() if op.configs]


def tensors(args: dict) -> list[torch.Tensor]:
    return [arg for arg in args.values() if isinstance(arg, torch.Tensor)]


@pytest.mark.parametrize("op", CHOOSING, ids=lambda op: op.name)
def test_nothing_is_compiled_after_a_warm_up(op):
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
