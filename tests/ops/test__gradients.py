"""No op has a gradient, and none is lost in silence: eager, compiled, for every op and every input."""

import pytest
import torch

from normquant import QuantSpec, group_quant
from normquant.ops import OPS, Examples

SPEC = QuantSpec()
EVERY = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def arguments(op) -> dict:
    return op.example(Examples(3, 256, "cpu", latent=(128, 32)))


def tensors_that_may_require_grad(args: dict) -> list[str]:
    return [name for name, a in args.items() if isinstance(a, torch.Tensor) and a.is_floating_point()]


@EVERY
def test_a_call_that_would_lose_a_gradient_is_refused(op):
    for name in tensors_that_may_require_grad(arguments(op)):
        args = arguments(op)
        args[name].requires_grad_()
        overloads = [(op.overload, args)]
        if op.eps_overload:
            overloads.append((getattr(torch.ops.normquant, op.name).tensor, args | {"eps": torch.tensor(1e-6)}))
        for overload, given in overloads:
            with pytest.raises(RuntimeError, match=f"^{op.name} has no gradient.*give BlockFP8Linear the unquantized"):
                overload(*given.values(), SPEC.encode())


@EVERY
def test_without_gradients_nothing_changes(op):
    args = arguments(op)
    expected = op.overload(*args.values(), SPEC.encode())
    for name in tensors_that_may_require_grad(args):
        args[name].requires_grad_()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            given = op.overload(*args.values(), SPEC.encode())
        for a, b in zip(torch.utils._pytree.tree_leaves(given), torch.utils._pytree.tree_leaves(expected), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) and not a.requires_grad


@EVERY
def test_the_launch_on_a_gpu_refuses_as_well(op):
    args = arguments(op)
    args[tensors_that_may_require_grad(args)[0]].requires_grad_()
    with pytest.raises(RuntimeError, match=f"^{op.name} has no gradient"):
        launched(op)(*args.values(), SPEC.encode())
    with torch.no_grad(), pytest.raises(LookupError, match="launched"):
        launched(op)(*args.values(), SPEC.encode())


def launched(op):
    """What is registered for CUDA, with a launch that raises."""
    from normquant.ops._op import cached

    def launch(*args):
        raise LookupError("launched")

    return cached(op.name, launch)


@EVERY
def test_autograd_registration(op):
    args = arguments(op)
    args[tensors_that_may_require_grad(args)[0]].requires_grad_()
    given = (*args.values(), SPEC.encode())
    torch.library.opcheck(op.overload, given, test_utils="test_autograd_registration")
    with torch.no_grad():
        torch.library.opcheck(op.overload, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compile_refuses_as_eager_does(fullgraph):
    """Also for a tensor inside of the graph that requires grad."""
    x = torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)

    def fn(x):
        return group_quant(x * 2).data

    with pytest.raises(RuntimeError, match="group_quant has no gradient"):
        torch.compile(fn, backend="aot_eager", fullgraph=fullgraph)(x)
    with torch.no_grad():
        assert torch.equal(torch.compile(fn, backend="aot_eager", fullgraph=fullgraph)(x).float(), fn(x).float())
