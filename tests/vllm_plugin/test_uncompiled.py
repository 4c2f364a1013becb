"""A model that is not compiled: what the first forward pass shows, what is handed over then, and what must not be."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from shared.vllm_modules import BlockLinear, GemmaRMSNorm, K, Model, RMSNorm, SiluAndMul, values

from normquant.compile import Site
from normquant.compile.policy import Rules
from normquant.specs import VLLM, VLLM_UE8M0
from normquant.vllm import first_forward
from normquant.vllm.switches import Switches
from normquant.vllm.uncompiled import HandOver, watch

ALWAYS = Switches(True, Rules("always"))
TANH = "its input is what aten.tanh.default gives"


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As vLLM runs its models, on a machine where DeepGEMM takes any scales."""
    deep_gemm = ModuleType("vllm.utils.deep_gemm")
    deep_gemm.is_deep_gemm_e8m0_used = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.utils", ModuleType("vllm.utils"))
    monkeypatch.setitem(sys.modules, "vllm.utils.deep_gemm", deep_gemm)
    with torch.inference_mode():
        yield


def run(model: Model, m: int = 5, seed: int = 0) -> torch.Tensor:
    return model(values(m, K, seed=seed))


def watched(switches: Switches = ALWAYS, m: int = 40, **kwargs: Any) -> tuple[Model, HandOver]:
    """A model whose norms and gated products hand over as far as they may, after one forward pass."""
    model, settled = Model(**kwargs), []
    hand_over = watch(model, switches, settled.append)
    run(model, m)
    assert settled == [hand_over]
    return model, hand_over


def sites(hand_over: HandOver) -> dict[str, Site]:
    assert hand_over.report is not None
    return {site.name: site for site in hand_over.report.sites}


def others(hand_over: HandOver) -> dict[str, str]:
    """Why what is no site stays as it is, by name."""
    assert hand_over.report is not None
    return {site.name: site.reason for site in hand_over.report.others}


def quantized_in(model: Model, call: Callable[[], Any]) -> dict[str, int]:
    """How often each reader quantizes its own input while something runs."""
    before = model.quantized()
    call()
    return {name: count - before[name] for name, count in model.quantized().items()}


@pytest.mark.parametrize("m", [1, 5, 33])
def test_norms_and_products_hand_over_and_nothing_else_changes(m: int) -> None:
    model, hand_over = watched()
    expected = run(Model(), m)
    counts = quantized_in(model, lambda: torch.testing.assert_close(run(model, m), expected, rtol=0, atol=0))
    own = {name: int(name.endswith("o_proj")) for name in counts}  # read a tanh
    assert counts == own
    found = sites(hand_over)
    ops = ["rms_norm_quant", "add_rms_norm_quant"] * 2 + ["silu_mul_quant"] * 2
    assert [site.op for site in found.values()] == ops
    assert found["layers.0.input_layernorm"].reason == "policy always; handed to qkv_proj"
    assert found["layers.1.post_attention_layernorm"].reason == "policy always; handed to shared, experts"
    assert found["layers.1.act_fn"].reason == "policy always; handed to down_proj"
    assert others(hand_over) == dict.fromkeys(("layers.0.o_proj", "layers.1.o_proj"), TANH)


def test_the_first_pass_gives_what_the_model_gives() -> None:
    model = Model()
    watch(model, ALWAYS, lambda hand_over: None)
    torch.testing.assert_close(run(model), run(Model()), rtol=0, atol=0)


def test_a_module_that_rounds_once_is_handed_over_with_its_own_arithmetic() -> None:
    model, hand_over = watched(roundings=1)
    torch.testing.assert_close(run(model), run(Model(roundings=1)), rtol=0, atol=0)
    (spec,) = {site.spec for site in sites(hand_over).values() if "add" in site.op}
    assert "once" in spec and "rounded" in spec
    (spec,) = {site.spec for site in sites(hand_over).values() if "silu" in site.op}
    assert "once" in spec


def test_readers_of_two_layouts_share_the_form_and_those_of_two_rules_do_not() -> None:
    model, _ = watched(spec=VLLM.replace(layout="col_tma"), shared=VLLM.replace(layout="col"))
    assert quantized_in(model, lambda: run(model))["0.shared"] == 0
    model, hand_over = watched(shared=VLLM_UE8M0)
    counts = quantized_in(model, lambda: run(model))
    assert (counts["0.shared"], counts["0.experts"]) == (0, 1)
    reason = sites(hand_over)["layers.0.post_attention_layernorm"].reason
    assert reason == "policy always; handed to shared; not to experts: it quantizes by another rule"


def test_a_tensor_that_is_written_before_it_is_read_is_not_handed_over() -> None:
    for between, reason in (
        (lambda y: y.mul_(2), "aten.mul_.Tensor writes to it before"),
        (lambda y: y.view(-1)[:3].zero_(), "aten.zero_.default writes to it before"),
        (lambda y: y.data.mul_(3), "aten.mul_.Tensor writes to it before"),
        (write_unseen, "something writes to it before"),
    ):
        model, hand_over = watched(between=between, gated=between)
        for producer, reader in (("input_layernorm", "qkv_proj"), ("act_fn", "down_proj")):
            found = sites(hand_over)[f"layers.0.{producer}"]
            assert (found.strategy, found.reason) == ("stock", f"{reader}: {reason}")
        torch.testing.assert_close(run(model), run(Model(between=between, gated=between)), rtol=0, atol=0)
        assert sites(hand_over)["layers.0.post_attention_layernorm"].fused


def write_unseen(y: torch.Tensor) -> None:
    """As a kernel that gets a pointer: torch knows nothing of it."""
    import ctypes

    ctypes.memset(y.data_ptr() + 2 * K * 3, 0, 2 * K)  # the third row


def test_a_write_that_only_a_later_pass_has_is_noticed_by_its_version() -> None:
    active = []

    def between(y: torch.Tensor) -> None:
        if active:
            y.mul_(2)

    model, _ = watched(between=between)
    active.append(True)
    counts = quantized_in(
        model, lambda: torch.testing.assert_close(run(model), run(Model(between=between)), rtol=0, atol=0)
    )
    assert counts["0.qkv_proj"] == counts["1.qkv_proj"] == 1


def test_the_check_names_a_stale_form_and_does_not_use_it(caplog: Any) -> None:
    active = []
    between = lambda y: write_unseen(y) if active else None  # noqa: E731
    writing = {"between": between, "gated": between}
    model, _ = watched(Switches(True, Rules("always"), check=True), **writing)
    active.append(True)
    with caplog.at_level(logging.WARNING):
        given = run(model), run(model)
    for each in given:
        torch.testing.assert_close(each, run(Model(**writing)), rtol=0, atol=0)
    stale = [text for text in caplog.messages if "stale" in text]
    assert any("model.layers.0.qkv_proj is stale: " in text for text in stale) and len(stale) == len(set(stale))
    assert any("model.layers.1.down_proj is stale: " in text for text in stale)
    with pytest.raises(RuntimeError, match=r"layers\.0\.qkv_proj is stale"):
        active.clear()
        model, _ = watched(Switches(True, Rules("always"), strict=True, check=True), between=between)
        active.append(True)
        run(model)


def test_the_check_finds_nothing_where_nothing_is_wrong(caplog: Any) -> None:
    model, _ = watched(Switches(True, Rules("always"), check=True))
    with caplog.at_level(logging.WARNING):
        counts = quantized_in(model, lambda: run(model))
    assert caplog.messages == [] and counts["0.qkv_proj"] == 0


def test_a_reader_that_computes_something_else_keeps_its_path() -> None:
    model = Model()
    kernel = model.model["layers"][0].qkv_proj.kernel
    kernel.spec = VLLM.replace(floor=3.0)  # and says VLLM
    hand_over = watch(model, ALWAYS, lambda hand_over: None)
    run(model, 40)
    found = sites(hand_over)["layers.0.input_layernorm"]
    assert not found.fused and found.reason.startswith("qkv_proj: its product on 8 quantized rows is another: ")


def test_a_norm_of_another_arithmetic_stays() -> None:
    model = Model()
    norm = model.model["layers"][0].input_layernorm
    norm.forward = lambda x, residual=None: RMSNorm.forward(norm, x) + 1
    hand_over = watch(model, ALWAYS, lambda hand_over: None)
    run(model, 40)
    assert "layers.0.input_layernorm" not in sites(hand_over)
    assert others(hand_over)["layers.0.input_layernorm"].startswith("its arithmetic is another: ")
    assert others(hand_over)["layers.0.qkv_proj"] == "its input is what input_layernorm gives"


def test_a_gated_product_of_another_arithmetic_stays() -> None:
    def model() -> Model:
        made = Model()
        act_fn = made.model["layers"][0].act_fn
        act_fn.forward = lambda x: SiluAndMul.forward(act_fn, x.clamp(max=7))
        return made

    stays, expected = model(), run(model(), 40)
    hand_over = watch(stays, ALWAYS, lambda hand_over: None)
    torch.testing.assert_close(run(stays, 40), expected, rtol=0, atol=0)
    torch.testing.assert_close(run(stays, 40), expected, rtol=0, atol=0)
    assert "layers.0.act_fn" not in sites(hand_over) and sites(hand_over)["layers.1.act_fn"].fused
    assert others(hand_over)["layers.0.act_fn"].startswith("its arithmetic is another: ")
    assert others(hand_over)["layers.0.down_proj"] == "its input is what act_fn gives"


def test_a_call_with_more_than_its_op_takes_is_vllms() -> None:
    model = Model()
    norm = model.model["layers"][0].input_layernorm
    norm.forward = lambda x, residual=None, scale=1: RMSNorm.forward(norm, x) * scale
    hand_over = watch(model, ALWAYS, lambda hand_over: None)
    run(model, 40)
    assert sites(hand_over)["layers.0.input_layernorm"].fused
    x = values(5, K)
    torch.testing.assert_close(norm(x, scale=2), RMSNorm.forward(norm, x) * 2, rtol=0, atol=0)


def test_each_module_that_takes_no_part_has_its_reason() -> None:
    model = Model()
    first, second = model.model["layers"]
    model.add_module("norm", RMSNorm())  # is not called
    model.add_module("head", BlockLinear())
    first.qkv_proj.forward = lambda x: BlockLinear.forward(first.qkv_proj, x.clone())
    first.shared.forward = lambda x: BlockLinear.forward(first.shared, x.detach())
    second.forward = lambda x: second.qkv_proj(second.input_layernorm(torch.cat((x, x)))[: len(x)])
    hand_over = watch(model, ALWAYS, lambda hand_over: None)
    run(model, 40)
    found = others(hand_over)
    assert found["norm"] == found["head"] == found["layers.1.experts"] == "the first forward pass did not call it"
    unread = "in the first forward pass no block-FP8 linear and no experts read the tensor that it returned"
    assert found["layers.0.input_layernorm"] == found["layers.1.input_layernorm"] == unread
    assert found["layers.0.qkv_proj"] == "its input is what aten.clone.default gives"
    assert found["layers.1.qkv_proj"] == "its input is a part of what input_layernorm gives"
    assert found["layers.0.shared"] == "its input is what post_attention_layernorm gives, as another tensor"
    assert found["layers.0.o_proj"] == TANH


def test_gemmas_norm_adds_one_to_its_weight() -> None:
    def model() -> Model:
        made = Model()
        for layer in made.model["layers"]:
            layer.input_layernorm, layer.post_attention_layernorm = GemmaRMSNorm(), GemmaRMSNorm(seed=2)
        return made

    handing = model()
    hand_over = watch(handing, ALWAYS, lambda hand_over: None)
    run(handing, 40)
    assert all(site.fused for site in sites(hand_over).values()) and len(sites(hand_over)) == 6
    torch.testing.assert_close(run(handing), run(model()), rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["never", "auto"])
def test_the_policy_decides(policy: Any) -> None:
    model, hand_over = watched(Switches(True, Rules(policy)))
    assert {site.strategy for site in sites(hand_over).values()} == {"stock"}
    assert set(quantized_in(model, lambda: run(model)).values()) == {1}


def test_a_setting_for_one_site_counts() -> None:
    _, hand_over = watched(Switches(True, Rules("always", {"layers.0.*": "never"})))
    fused = [name for name, site in sites(hand_over).items() if site.fused]
    assert fused == ["layers.1.input_layernorm", "layers.1.post_attention_layernorm", "layers.1.act_fn"]


def test_a_failing_kernel_is_given_up_once_by_name(caplog: Any, monkeypatch: Any) -> None:
    model, hand_over = watched()

    def fail(*args: Any) -> Any:
        raise RuntimeError("no such kernel")

    producers, readers = ({each.name: each for each in of} for of in (hand_over.producers, hand_over.readers))
    for name in ("model.layers.0.input_layernorm", "model.layers.0.act_fn"):
        producers[name].run = fail  # type: ignore[method-assign]
    readers["model.layers.1.qkv_proj"].read = fail  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(run(model), run(Model()), rtol=0, atol=0)
    assert [text.split(":")[1].strip() for text in caplog.messages] == [
        "model.layers.0.input_layernorm goes on as vLLM has it",
        "model.layers.0.act_fn goes on as vLLM has it",
        "model.layers.1.qkv_proj goes on as vLLM has it",
    ]


def test_what_others_put_on_an_instance_is_put_back() -> None:
    model = Model()
    layer = model.model["layers"][0]
    norm, kernel = layer.input_layernorm, layer.qkv_proj.kernel
    norm.forward = forward = lambda x: RMSNorm.forward(norm, x)
    kernel.apply_weights = apply = lambda layer, x, bias: type(kernel).apply_weights(kernel, layer, x, bias)
    hand_over = watch(model, ALWAYS, lambda hand_over: None)
    run(model)
    assert sites(hand_over)["layers.0.input_layernorm"].fused and norm.forward is not forward
    hand_over.undo()
    assert norm.forward is forward and kernel.apply_weights is apply


def test_a_pass_that_raises_is_not_the_one(caplog: Any) -> None:
    model, settled = Model(), []
    watch(model, ALWAYS, settled.append)
    with pytest.raises(RuntimeError):
        model(values(5, K - 128))
    assert settled == [] and "forward" not in model.model["layers"][0].input_layernorm.__dict__
    torch.testing.assert_close(run(model), run(Model()), rtol=0, atol=0)
    assert len(settled) == 1


def test_a_pass_that_cannot_be_watched_is_made_again_without(caplog: Any, monkeypatch: Any) -> None:
    def fail(*args: Any) -> Any:
        raise TypeError("no mode is wanted here")

    monkeypatch.setattr(first_forward.FirstForward, "__torch_dispatch__", fail)
    model, settled = Model(), []
    watch(model, ALWAYS, settled.append)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(run(model), run(Model()), rtol=0, atol=0)
    assert caplog.messages == ["normquant leaves the model as it was: TypeError: no mode is wanted here"]
    assert settled == [] and set(quantized_in(model, lambda: run(model)).values()) == {1}


def test_a_failing_decision_leaves_the_model_as_it_was(caplog: Any) -> None:
    model = Model()

    def fail(hand_over: HandOver) -> None:
        raise OSError("a full disk")

    watch(model, ALWAYS, fail)
    with caplog.at_level(logging.WARNING):
        run(model)
    assert caplog.messages == ["normquant leaves the model as it was: OSError: a full disk"]
    assert set(quantized_in(model, lambda: run(model)).values()) == {1}


def test_two_models_of_one_process_have_a_hand_over_each() -> None:
    on, _ = watched()
    off = Model()
    counts = quantized_in(off, lambda: run(off))
    assert set(counts.values()) == {1} and quantized_in(on, lambda: run(on))["0.qkv_proj"] == 0


def test_three_dimensions_are_rows(caplog: Any) -> None:
    model, hand_over = Model(), []
    watch(model, ALWAYS, hand_over.append)
    x = values(6, K).view(2, 3, K)
    layer = model.model["layers"][0]
    for _ in range(2):
        y = layer.qkv_proj(layer.input_layernorm(x))
    run(model)
    counts = quantized_in(model, lambda: layer.qkv_proj(layer.input_layernorm(x)))
    assert counts["0.qkv_proj"] == 0 and y.shape == (2, 3, K)
    torch.testing.assert_close(layer.qkv_proj(layer.input_layernorm(x)), y, rtol=0, atol=0)
