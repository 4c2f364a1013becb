"""A model that is not compiled: what the first forward pass shows, what is handed over then, and what must not be."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from shared.vllm_modules import GemmaRMSNorm, K, Model, RMSNorm, values

from normquant.compile import Site
from normquant.compile.policy import Rules
from normquant.specs import VLLM, VLLM_UE8M0
from normquant.vllm import first_forward
from normquant.vllm.switches import Switches
from normquant.vllm.uncompiled import HandOver, watch

ALWAYS = Switches(True, Rules("always"))


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
    """A model whose norms hand over as far as they may, after one forward pass."""
    model, settled = Model(**kwargs), []
    hand_over = watch(model, switches, settled.append)
    run(model, m)
    assert settled == [hand_over]
    return model, hand_over


def sites(hand_over: HandOver) -> dict[str, Site]:
    assert hand_over.report is not None
    return {site.name: site for site in hand_over.report.sites}


def quantized_in(model: Model, call: Callable[[], Any]) -> dict[str, int]:
    """How often each reader quantizes its own input while something runs."""
    before = model.quantized()
    call()
    return {name: count - before[name] for name, count in model.quantized().items()}


@pytest.mark.parametrize("m", [1, 5, 33])
def test_norms_hand_over_and_nothing_else_changes(m: int) -> None:
    model, hand_over = watched()
    expected = run(Model(), m)
    counts = quantized_in(model, lambda: torch.testing.assert_close(run(model, m), expected, rtol=0, atol=0))
    own = {name: int(name.endswith("o_proj")) for name in counts}  # read a tanh
    assert counts == own
    found = sites(hand_over)
    assert [site.op for site in found.values()] == ["rms_norm_quant", "add_rms_norm_quant"] * 2
    assert found["layers.0.input_layernorm"].reason == "policy always; handed to qkv_proj"
    assert found["layers.1.post_attention_layernorm"].reason == "policy always; handed to shared, experts"
    assert hand_over.report is not None
    assert [site.name for site in hand_over.report.others] == ["layers.0.o_proj", "layers.1.o_proj"]


def test_the_first_pass_gives_what_the_model_gives() -> None:
    model = Model()
    watch(model, ALWAYS, lambda hand_over: None)
    torch.testing.assert_close(run(model), run(Model()), rtol=0, atol=0)


def test_a_norm_that_rounds_once_is_handed_over_with_its_own_arithmetic() -> None:
    model, hand_over = watched(roundings=1)
    torch.testing.assert_close(run(model), run(Model(roundings=1)), rtol=0, atol=0)
    (spec,) = {site.spec for site in sites(hand_over).values() if "add" in site.op}
    assert "once" in spec and "rounded" in spec


def test_readers_of_two_layouts_share_the_form_and_those_of_two_rules_do_not() -> None:
    model, _ = watched(spec=VLLM.replace(layout="col_tma"), shared=VLLM.replace(layout="col"))
    assert quantized_in(model, lambda: run(model))["0.shared"] == 0
    model, hand_over = watched(shared=VLLM_UE8M0)
    counts = quantized_in(model, lambda: run(model))
    assert (counts["0.shared"], counts["0.experts"]) == (0, 1)
    reason = sites(hand_over)["layers.0.post_attention_layernorm"].reason
    assert reason == "policy always; handed to shared; not to experts: it quantizes by another rule"


def test_a_tensor_written_after_the_norm_is_not_handed_over() -> None:
    for between, reason in (
        (lambda y: y.mul_(2), "aten.mul_.Tensor writes to it before"),
        (lambda y: y.view(-1)[:3].zero_(), "aten.zero_.default writes to it before"),
        (lambda y: y.data.mul_(3), "aten.mul_.Tensor writes to it before"),
        (write_unseen, "something writes to it before"),
    ):
        model, hand_over = watched(between=between)
        found = sites(hand_over)["layers.0.input_layernorm"]
        assert (found.strategy, found.reason) == ("stock", f"qkv_proj: {reason}")
        torch.testing.assert_close(run(model), run(Model(between=between)), rtol=0, atol=0)
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
    model, _ = watched(Switches(True, Rules("always"), check=True), between=between)
    active.append(True)
    with caplog.at_level(logging.WARNING):
        given = run(model), run(model)
    for each in given:
        torch.testing.assert_close(each, run(Model(between=between)), rtol=0, atol=0)
    stale = [text for text in caplog.messages if "stale" in text]
    assert any("model.layers.0.qkv_proj is stale: " in text for text in stale) and len(stale) == len(set(stale))
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


def test_gemmas_norm_adds_one_to_its_weight() -> None:
    def model() -> Model:
        made = Model()
        for layer in made.model["layers"]:
            layer.input_layernorm, layer.post_attention_layernorm = GemmaRMSNorm(), GemmaRMSNorm(seed=2)
        return made

    handing = model()
    hand_over = watch(handing, ALWAYS, lambda hand_over: None)
    run(handing, 40)
    assert all(site.fused for site in sites(hand_over).values()) and len(sites(hand_over)) == 4
    torch.testing.assert_close(run(handing), run(model()), rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["never", "auto"])
def test_the_policy_decides(policy: Any) -> None:
    model, hand_over = watched(Switches(True, Rules(policy)))
    assert {site.strategy for site in sites(hand_over).values()} == {"stock"}
    assert set(quantized_in(model, lambda: run(model)).values()) == {1}


def test_a_setting_for_one_site_counts() -> None:
    _, hand_over = watched(Switches(True, Rules("always", {"layers.0.*": "never"})))
    fused = [name for name, site in sites(hand_over).items() if site.fused]
    assert fused == ["layers.1.input_layernorm", "layers.1.post_attention_layernorm"]


def test_a_failing_kernel_is_given_up_once_by_name(caplog: Any, monkeypatch: Any) -> None:
    model, hand_over = watched()

    def fail(*args: Any) -> Any:
        raise RuntimeError("no such kernel")

    norm = next(n for n in hand_over.norms if n.name == "model.layers.0.input_layernorm")
    reader = next(r for r in hand_over.readers if r.name == "model.layers.1.qkv_proj")
    norm.run, reader.read = fail, fail  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(run(model), run(Model()), rtol=0, atol=0)
    assert [text.split(":")[1].strip() for text in caplog.messages] == [
        "model.layers.0.input_layernorm goes on as vLLM has it",
        "model.layers.1.qkv_proj goes on as vLLM has it",
    ]


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
