"""Who decides, and by what."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch

from normquant.compile import inductor_options
from normquant.compile.driver import VLLM_FUSIONS, NormQuantPass
from normquant.compile.policy import Decision, Facts, Rules
from normquant.tune import strategies

GPU = torch.device("cuda", 0)


def facts(device=GPU, op="rms_norm_quant", m=64, k=7168, opaque=False, extra=False):
    return Facts(device, op, m, k, opaque, extra)


def on(capability):
    return mock.patch("torch.cuda.get_device_capability", lambda device: {GPU: capability}[device])


def table(tmp_path, *entries, capability="9.0"):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"capability": capability, "source": "test", "entries": list(entries)}))
    return str(path)


def entry(m, op="rms_norm_quant", k=7168, **us):
    return {"op": op, "k": k, "m": m, "us": us}


@pytest.mark.parametrize(
    ("policy", "strategy"), [("always", "fused"), ("never", "stock"), ("native", "native"), ("opaque-norm", "stock")]
)
def test_fixed_policies(policy: str, strategy: str) -> None:
    decision = Rules(policy).decide("a", facts())  # type: ignore[arg-type]
    assert decision.strategy == strategy and decision.reason.startswith(f"policy {policy}")


def test_an_opaque_norm_is_fused_where_the_policy_asks_for_that() -> None:
    expected = Decision("fused", "policy opaque-norm: the norm is one opaque operation")
    assert Rules("opaque-norm").decide("a", facts(opaque=True)) == expected
    expected = Decision("stock", "opaque-norm for 'a*': no norm in it is one opaque operation")
    assert Rules(sites={"a*": "opaque-norm"}).decide("a", facts()) == expected


def test_a_site_has_the_first_rule_that_names_it() -> None:
    rules = Rules("never", {"layers.0.*": "always", "*.norm": "native"})
    chosen = [rules.decide(name, facts()) for name in ("layers.0.norm", "layers.1.norm", "head")]
    reasons = ["always for 'layers.0.*'", "native for '*.norm'", "policy never"]
    assert chosen == list(map(Decision, ("fused", "native", "stock"), reasons))


def test_auto_on_hardware_without_measurements_keeps_stock_and_says_so() -> None:
    with on((10, 0)):
        decision = Rules().decide("a", facts())
    assert decision.strategy == "stock"
    assert "no measurements on sm_100; `normquant tune --strategies` makes them" in decision.reason
    decision = Rules().decide("a", facts(torch.device("cpu")))
    assert decision.strategy == "stock" and "no measurements on cpu" in decision.reason
    with mock.patch("torch.version.hip", "7.2"), on((9, 4)):
        decision = Rules().decide("a", facts())
    assert decision.strategy == "stock" and "no measurements on ROCm;" in decision.reason


def test_auto_on_sm90_without_an_entry_goes_by_the_rule() -> None:
    with on((9, 0)):
        assert Rules().decide("a", facts(k=1280)).strategy == "fused"
        assert Rules().decide("a", facts(op="group_quant")).strategy == "fused"
        assert Rules().decide("a", facts(op="rope_last")).strategy == "fused"


def test_auto_leaves_an_op_that_no_gpu_has_run(tmp_path) -> None:
    for capability in ((9, 0), (10, 0)):
        with on(capability):
            decision = Rules().decide("a", facts(op="gated_norm_quant"))
        assert decision.strategy == "stock" and "gated_norm_quant was measured on no GPU yet" in decision.reason
    with on((9, 0)):
        assert Rules("always").decide("a", facts(op="gated_norm_quant")).strategy == "fused"
        path = table(tmp_path, entry([1, 64], op="gated_norm_quant", fused=1.5, stock=4.0))
        assert Rules(table=path).decide("a", facts(op="gated_norm_quant", m=64)).strategy == "fused"


def test_auto_goes_by_the_table_that_tune_wrote(tmp_path) -> None:
    """As `normquant tune --strategies` leaves it on hardware that had none: once for every number of rows."""
    path = tmp_path / "sm100.json"
    entries = [entry([1, 16], fused=2.0, native=3.0, stock=4.0), entry([17, 64], fused=2.5, native=3.0, stock=4.0)]
    strategies.write(path, (10, 0), "normquant tune --strategies", entries)
    rules = Rules(table=str(path))
    with on((10, 0)):
        decisions = [rules.decide("a", facts(m=m, k=k)) for m, k in ((1, 7168), (9999, 7168), (1, 512))]
    assert [decision.strategy for decision in decisions] == ["fused", "fused", "stock"]
    assert "no measurements of rms_norm_quant with K=512 on sm_100" in decisions[-1].reason


def test_auto_adds_no_kernel() -> None:
    with on((9, 0)):
        decision = Rules().decide("a", facts(extra=True))
        reason = "policy auto: the graph computes the weight or copies the input, one more kernel"
        assert decision == Decision("stock", reason)
        assert Rules("always").decide("a", facts(extra=True)).strategy == "fused"


def test_auto_takes_the_fastest_that_was_measured(tmp_path) -> None:
    path = table(tmp_path, entry([1, 64], fused=1.5, native=3.0, stock=4.0), entry([65, 4096], fused=9.0, stock=8.0))
    with on((9, 0)):
        rules = Rules(table=path)
        assert rules.decide("a", facts(m=64)).strategy == "fused"
        assert rules.decide("a", facts(m=65)).strategy == "stock"
        assert "fused 9 us, stock 8 us" in rules.decide("a", facts(m=65)).reason
        assert rules.decide("a", facts(m=None)).strategy == "stock"
        assert "for every number of rows" in rules.decide("a", facts(m=None)).reason
        assert "no measurement of this shape" in rules.decide("a", facts(m=9999)).reason
    with on((10, 0)):
        assert rules.decide("a", facts(m=64)).strategy == "stock"


def test_auto_goes_by_the_tables_of_the_package() -> None:
    with on((9, 0)):
        decision = Rules().decide("a", facts())
    assert decision.strategy == "fused" and decision.reason.startswith("measured with torch 2.11.0: M 17..64: fused ")


def test_rules_are_spread_over_the_buckets_of_a_dict() -> None:
    assert len({hash(Rules("never", {f"layers.{i}.*": "always"})) for i in range(100)}) > 90


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="policy is 'sometimes'; accepted: 'auto', 'always'"):
        inductor_options("sometimes")
    with pytest.raises(ValueError, match=r"sites\['a'\] is 'fast'; accepted: 'fused'"):
        inductor_options(sites={"a": "fast"})
    with pytest.raises(OSError):
        inductor_options(table="/nowhere/table.json")
    with pytest.raises(ValueError, match="mode is 'warp'"):
        inductor_options(mode="warp")


def test_options_of_inductor_and_of_modes_come_along() -> None:
    options = inductor_options(mode="reduce-overhead", triton__unique_kernel_names=True)
    assert options["triton.cudagraphs"] and options["triton.unique_kernel_names"]
    assert "triton.nested_reduction" not in options
    can_nest = "triton.nested_reduction" in torch._inductor.config.get_config_copy()  # torch 2.13 and later
    assert inductor_options("native").get("triton.nested_reduction", False) == can_nest


def test_every_option_changes_the_key_of_the_compile_caches(tmp_path) -> None:
    def key(*args, **kwargs):
        return inductor_options(*args, **kwargs)["post_grad_custom_pre_pass"].uuid()

    path = table(tmp_path)
    keys = [key(), key("always"), key(strict=True), key(sites={"a": "stock"}), key(table=path)]
    table(tmp_path, entry([1, 2], fused=1, stock=2))
    keys.append(key(table=path))
    assert len(set(keys)) == len(keys) and key() == keys[0]
    ordered = {"a.*": "stock", "*": "fused"}
    sites = [ordered, dict(reversed(ordered.items())), {"a.*": "native", "*": "fused"}, {"b.*": "stock", "*": "fused"}]
    keys = [key(sites=one) for one in sites]
    assert len(set(keys)) == len(keys), "the first site that matches counts"


def test_passes_are_equal_where_their_options_are(tmp_path) -> None:
    def made(*args, **kwargs):
        return inductor_options(*args, **kwargs)["post_grad_custom_pre_pass"]

    path = table(tmp_path)
    ordered = {"a.*": "stock", "*": "fused"}
    kinds = [{}, {"policy": "always"}, {"strict": True}, {"table": path}, {"sites": ordered}]
    kinds += [{"sites": dict(reversed(ordered.items()))}, {"sites": ordered | {"*": "native"}}]
    passes = [made(**kind) for kind in kinds]
    for kind, one in zip(kinds, passes, strict=True):
        assert [one == other for other in passes] == [one is other for other in passes]
        assert made(**kind) == one and hash(made(**kind)) == hash(one) and one != "another object"
    table(tmp_path, entry([1, 2], fused=1, stock=2))
    assert made(table=path) != passes[3], "the file has other measurements now"
    assert NormQuantPass(fusions=VLLM_FUSIONS) != NormQuantPass()


def test_the_table_is_read_once(tmp_path) -> None:
    """A table that changes while a model compiles changes no decision: the caches' key is of what was read."""
    path = table(tmp_path, entry([1, 64], fused=1.5, stock=4.0))
    rules = Rules(table=path)
    table(tmp_path, entry([1, 64], fused=4.5, stock=4.0))
    with on((9, 0)):
        assert rules.decide("a", facts()).strategy == "fused"
        assert Rules(table=path).decide("a", facts()).strategy == "stock"


def test_options_that_keep_the_pass_from_running_are_refused() -> None:
    if "lite" in (torch._inductor.list_mode_options() or {}):
        with pytest.raises(ValueError, match="mode 'lite' sets use_post_grad_passes=False: Inductor would never run"):
            inductor_options(mode="lite")
        assert inductor_options(mode="lite", use_post_grad_passes=True)["fallback_by_default"]
    with pytest.raises(ValueError, match=r"the options or torch\._inductor\.config set use_post_grad_passes=False"):
        inductor_options(use_post_grad_passes=False)
    with torch._inductor.config.patch(use_post_grad_passes=False), pytest.raises(ValueError, match="would never run"):
        inductor_options()


def test_another_pass_for_the_same_place_runs_after_ours() -> None:
    def theirs(graph) -> None: ...

    ours = inductor_options("always")["post_grad_custom_pre_pass"]
    assert inductor_options("always", post_grad_custom_pre_pass=None)["post_grad_custom_pre_pass"] == ours
    for given in (theirs, [theirs], (theirs, None)):
        both = inductor_options("always", post_grad_custom_pre_pass=given)["post_grad_custom_pre_pass"]
        assert both.passes == (ours, theirs)
    dashes = inductor_options("always", **{"post-grad-custom-pre-pass": theirs})
    with torch._inductor.config.patch(post_grad_custom_pre_pass=theirs):
        from_config = inductor_options("always")
    with torch._inductor.config.patch(post_grad_custom_pre_pass=ours):
        assert inductor_options("never")["post_grad_custom_pre_pass"] == NormQuantPass(Rules("never"))
    assert dashes == from_config == {"post_grad_custom_pre_pass": both}
