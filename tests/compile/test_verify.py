"""Fused ops beside the graphs that they replace: the small layer, and passes that get it wrong on purpose; counting how
far two tensors are apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Graph

pytest.importorskip("transformers", reason="needs transformers: pip install 'normquant[hf]'")

from normquant.compile import inductor_options
from normquant.compile.recording import PASS, Recorded, record
from normquant.compile.verify import Check, Checks, Tally, check_sites, find_sites, tally, total
from normquant.demo.deepseek_layer import Dims, build, forward, inputs
from normquant.spec import QuantSpec

TINY = Dims(hidden=256, intermediate=128, heads=2, q_lora=128, kv_lora=128, nope=32, rope=16, v_head=64)
TOKENS = 24
NAMES = ("input_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "post_attention_layernorm")
NORMS = [f"layer.{name}" for name in NAMES]


@pytest.fixture(scope="module")
def arguments() -> tuple[torch.nn.Module | torch.Tensor, ...]:
    return build(TINY, "cpu"), *inputs(TINY, TOKENS, "cpu")


@pytest.fixture(scope="module")
def recorded(arguments: tuple) -> Recorded:
    return record(forward, arguments, inductor_options("always", strict=True))


def spoiled(arguments: tuple, spoil: Callable[[tuple], tuple]) -> Recorded:
    """The recording of a pass that fuses, and then changes the arguments of every op that it put in."""
    fuse = inductor_options("always", strict=True)[PASS]

    def fuse_and_spoil(graph: Graph) -> None:
        fuse(graph)
        for node in graph.nodes:
            if "rms_norm_quant" in str(node.target):
                node.args = spoil(node.args)

    return record(forward, arguments, {PASS: fuse_and_spoil})


def test_every_norm_is_a_site_with_what_is_read_from_it(recorded: Recorded) -> None:
    sites = {site.name: site for site in find_sites(recorded.only)}
    assert sorted(sites) == sorted(NORMS)
    assert [len(sites[name].pairs) for name in NORMS] == [4, 2, 2, 5]  # data and scale for each linear, and the sum
    assert [len(sites[name].roots) for name in NORMS] == [1, 1, 1, 2]
    assert sites["layer.post_attention_layernorm"].op == "add_rms_norm_quant"


def test_the_fused_ops_give_what_they_replaced(recorded: Recorded) -> None:
    checks = check_sites(recorded.only)
    groups = {256: 2, 128: 1}
    values = {c.name: (c.values.compared, c.scales.compared, c.others.compared) for c in checks.exact}
    assert values["layer.self_attn.q_a_layernorm"] == (TOKENS * 128, TOKENS * groups[128], 0)
    assert values["layer.post_attention_layernorm"] == (2 * TOKENS * 256, 2 * TOKENS * groups[256], TOKENS * 256)
    assert total(checks.exact).differ == 0
    assert checks.holds


def test_the_recorded_graph_is_the_layer(recorded: Recorded, arguments: tuple) -> None:
    unfused, fused = recorded.before, recorded.after
    with torch.no_grad():
        assert torch.equal(unfused, forward(*arguments))
    assert fused.shape == unfused.shape


def test_another_epsilon_is_seen(arguments: tuple) -> None:
    recorded = spoiled(arguments, lambda args: tuple(0.5 if isinstance(a, float) and 0 < a < 1e-3 else a for a in args))
    checks = check_sites(recorded.only)
    assert not checks.holds
    assert all(check.all.differ for check in checks.exact)


def test_a_rounding_left_out_is_seen(arguments: tuple) -> None:
    def without_rounding(args: tuple) -> tuple:
        return *args[:-1], QuantSpec.decode(args[-1]).replace(rounding="none").encode()

    checks = check_sites(spoiled(arguments, without_rounding).only)
    assert not checks.holds
    assert total(checks.random).differ > 0


def test_a_pass_that_fuses_nothing_proves_nothing(arguments: tuple) -> None:
    checks = check_sites(record(forward, arguments, inductor_options("never")).only)
    assert checks == Checks((), ())
    assert not checks.holds


def test_the_tolerance_is_for_random_inputs_alone() -> None:
    def one(compared: int, differ: int) -> tuple[Check, ...]:
        return (Check("n", "rms_norm_quant", Tally(compared, differ, 1), Tally(), Tally()),)

    assert Checks(one(200_000, 2), one(200_000, 0)).holds
    assert not Checks(one(200_000, 3), one(200_000, 0)).holds
    assert not Checks(one(200_000, 0), one(200_000, 1)).holds


def test_an_error_of_the_compile_is_raised(arguments: tuple) -> None:
    def broken(graph: Graph) -> None:
        raise ZeroDivisionError("in the pass")

    with pytest.raises(Exception, match="in the pass"):
        record(forward, arguments, {PASS: broken})


def bits(*values: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(dtype)


def test_equal_tensors_do_not_differ() -> None:
    x = torch.randn(3, 5)
    assert tally(x, x.clone()) == Tally(15, 0, 0)


def test_a_neighbour_is_one_step_away_in_every_format() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)
        up = torch.nextafter(x.clone(), torch.full_like(x, 9.0))
        assert tally(x, up) == Tally(3, 3, 1)


def test_steps_of_fp8_are_counted_across_zero() -> None:
    smallest_negative, smallest_positive = 0x81, 0x01
    assert tally(bits(smallest_negative), bits(smallest_positive)).steps == 3  # over -0 and 0


def test_zeros_of_different_sign_differ() -> None:
    assert tally(torch.tensor([0.0]), torch.tensor([-0.0])) == Tally(1, 1, 1)


def test_nans_are_one_value_and_far_from_numbers() -> None:
    assert tally(bits(0x7F), bits(0xFF)) == Tally(1, 0, 0)
    assert tally(bits(0x7F), bits(0x7E)) == Tally(1, 1, 2)


def test_integers_are_compared_as_they_are() -> None:
    assert tally(torch.tensor([1, 7]), torch.tensor([1, 4])) == Tally(2, 1, 3)


def test_nothing_to_compare() -> None:
    assert tally(torch.empty(0), torch.empty(0)) == Tally()


def test_tallies_add_up() -> None:
    assert Tally(5, 1, 2) + Tally(7, 0, 0) == Tally(12, 1, 2)


@pytest.mark.parametrize("given", [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)])
def test_another_shape_or_dtype_is_an_error(given: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(2,\) torch.float32, got"):
        tally(torch.zeros(2), given)
