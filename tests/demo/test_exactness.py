"""Fused ops beside the graphs that they replace: the small layer, and passes that get it wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Graph

pytest.importorskip("transformers", reason="needs transformers: pip install 'normquant[hf]'")

from normquant.compile import inductor_options
from normquant.demo.exactness import Check, Checks, check_sites, find_sites, outputs, relative_error, total
from normquant.demo.layer import Dims, build, float64_twin, forward, inputs
from normquant.demo.recorder import PASS, Recording, record
from normquant.spec import QuantSpec

TINY = Dims(hidden=256, intermediate=128, heads=2, q_lora=128, kv_lora=128, nope=32, rope=16, v_head=64)
TOKENS = 24
NORMS = ["input_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "post_attention_layernorm"]


@pytest.fixture(scope="module")
def arguments() -> tuple[torch.nn.Module | torch.Tensor, ...]:
    return build(TINY, "cpu"), *inputs(TINY, TOKENS, "cpu")


@pytest.fixture(scope="module")
def recording(arguments: tuple) -> Recording:
    return record(forward, arguments, inductor_options("always", strict=True))


def spoiled(arguments: tuple, spoil: Callable[[tuple], tuple]) -> Recording:
    """The recording of a pass that fuses, and then changes the arguments of every op that it put in."""
    fuse = inductor_options("always", strict=True)[PASS]

    def fuse_and_spoil(graph: Graph) -> None:
        fuse(graph)
        for node in graph.nodes:
            if "rms_norm_quant" in str(node.target):
                node.args = spoil(node.args)

    return record(forward, arguments, {PASS: fuse_and_spoil})


def test_every_norm_is_a_site_with_what_is_read_from_it(recording: Recording) -> None:
    sites = {site.name: site for site in find_sites(recording)}
    assert sorted(sites) == sorted(NORMS)
    assert [len(sites[name].pairs) for name in NORMS] == [4, 2, 2, 5]  # data and scale for each linear, and the sum
    assert [len(sites[name].roots) for name in NORMS] == [1, 1, 1, 2]
    assert sites["post_attention_layernorm"].op == "add_rms_norm_quant"


def test_the_fused_ops_give_what_they_replaced(recording: Recording) -> None:
    checks = check_sites(recording)
    groups = {256: 2, 128: 1}
    values = {c.name: (c.values.compared, c.scales.compared, c.others.compared) for c in checks.exact}
    assert values["self_attn.q_a_layernorm"] == (TOKENS * 128, TOKENS * groups[128], 0)
    assert values["post_attention_layernorm"] == (2 * TOKENS * 256, 2 * TOKENS * groups[256], TOKENS * 256)
    assert total(checks.exact).differ == 0
    assert checks.holds


def test_the_recorded_graph_is_the_layer(recording: Recording, arguments: tuple) -> None:
    unfused, fused = outputs(recording)
    with torch.no_grad():
        assert torch.equal(unfused, forward(*arguments))
    assert fused.shape == unfused.shape


def test_another_epsilon_is_seen(arguments: tuple) -> None:
    recorded = spoiled(arguments, lambda args: tuple(0.5 if isinstance(a, float) and 0 < a < 1e-3 else a for a in args))
    checks = check_sites(recorded)
    assert not checks.holds
    assert all(check.all.differ for check in checks.exact)


def test_a_rounding_left_out_is_seen(arguments: tuple) -> None:
    def without_rounding(args: tuple) -> tuple:
        return *args[:-1], QuantSpec.decode(args[-1]).replace(rounding="none").encode()

    checks = check_sites(spoiled(arguments, without_rounding))
    assert not checks.holds
    assert total(checks.random).differ > 0


def test_a_pass_that_fuses_nothing_proves_nothing(arguments: tuple) -> None:
    checks = check_sites(record(forward, arguments, inductor_options("never")))
    assert checks == Checks((), ())
    assert not checks.holds


def test_the_tolerance_is_for_random_inputs_alone() -> None:
    def one(compared: int, differ: int) -> tuple[Check, ...]:
        from normquant.demo.differences import Tally

        return (Check("n", "rms_norm_quant", Tally(compared, differ, 1), Tally(), Tally()),)

    assert Checks(one(200_000, 2), one(200_000, 0)).holds
    assert not Checks(one(200_000, 3), one(200_000, 0)).holds
    assert not Checks(one(200_000, 0), one(200_000, 1)).holds


def test_the_twin_is_the_layer_without_fp8(arguments: tuple) -> None:
    layer, *tensors = arguments
    with torch.no_grad():
        exact = forward(float64_twin(layer), *(t.double() for t in tensors))
        error = relative_error(forward(layer, *tensors), exact)
    assert exact.dtype == torch.float64
    assert 1e-3 < error < 0.1  # what FP8 costs, and no more: a wrong mask, norm or rotary embedding gives far more


def test_an_error_of_the_compile_is_raised(arguments: tuple) -> None:
    def broken(graph: Graph) -> None:
        raise ZeroDivisionError("in the pass")

    with pytest.raises(Exception, match="in the pass"):
        record(forward, arguments, {PASS: broken})
