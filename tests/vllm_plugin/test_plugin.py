"""The plugin against a vLLM made up for the test: what it wraps, when it does nothing, when it declines."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from normquant.vllm import loading, plugin


def module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(attributes)
    return made


class Vllm:
    """The parts of vLLM that the plugin touches."""

    def __init__(self, version: str) -> None:
        class VllmConfig:
            def __init__(self, additional_config: object = None) -> None:
                self.additional_config = additional_config
                self.compilation_config = SimpleNamespace(local_cache_dir=None)

            def compute_hash(self, include_version: bool = True) -> str:
                return "0123456789" if include_version else "9876543210"

        class CompilationConfig:
            def custom_op_log_check(self) -> None: ...

        class InductorPass:
            def is_applicable_for_range(self, compile_range: object) -> bool:
                return True

        class RMSNormQuantFusionPass(InductorPass):
            pass

        class NoOpEliminationPass(InductorPass):
            pass

        class PostGradPassManager:
            def __init__(self) -> None:
                self.passes: list[object] = []

            def __call__(self, graph: object) -> None: ...

            def uuid(self) -> str:
                return ""

            def configure(self, config: object) -> None:
                self.passes += [NoOpEliminationPass(), RMSNormQuantFusionPass()]

        self.VllmConfig, self.PostGradPassManager, self.InductorPass = VllmConfig, PostGradPassManager, InductorPass
        self.CompilationConfig, self.current = CompilationConfig, VllmConfig()
        config = module(
            "vllm.config",
            VllmConfig=VllmConfig,
            CompilationConfig=CompilationConfig,
            get_current_vllm_config=lambda: self.current,
        )
        inductor_pass = module(
            "vllm.compilation.passes.inductor_pass",
            InductorPass=InductorPass,
            get_pass_context=lambda: SimpleNamespace(compile_range="(1, 8)"),
        )
        pass_manager = module("vllm.compilation.passes.pass_manager", PostGradPassManager=PostGradPassManager)
        passes = module("vllm.compilation.passes", inductor_pass=inductor_pass, pass_manager=pass_manager)
        top = module("vllm", __version__=version, __path__=[], config=config)
        self.modules = {
            "vllm": top,
            "vllm.config": config,
            "vllm.compilation": module("vllm.compilation", __path__=[]),
            "vllm.compilation.passes": passes,
            "vllm.compilation.passes.inductor_pass": inductor_pass,
            "vllm.compilation.passes.pass_manager": pass_manager,
        }

    def configured(self, config: object) -> list[str]:
        manager = self.PostGradPassManager()
        manager.configure(config)
        return [type(entry).__name__ for entry in manager.passes]


STOCK = ["NoOpEliminationPass", "RMSNormQuantFusionPass"]
OURS = ["NoOpEliminationPass", "VllmNormQuantPass", "RMSNormQuantFusionPass"]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(version: str = "0.32.0") -> Vllm:
        vllm = Vllm(version)
        for name, made in vllm.modules.items():
            monkeypatch.setitem(sys.modules, name, made)
        monkeypatch.delitem(sys.modules, "normquant.vllm.compile_pass", raising=False)
        return vllm

    monkeypatch.delenv("NORMQUANT", raising=False)
    monkeypatch.setattr(plugin, "_declined", set())
    yield install
    sys.modules.pop("normquant.vllm.compile_pass", None)


def test_without_a_switch_nothing_changes(make: Any) -> None:
    vllm = make()
    plugin.register()
    config = vllm.VllmConfig({"other": 1})
    assert config.compute_hash() == "0123456789"
    assert config.compute_hash(include_version=False) == "9876543210"
    assert vllm.configured(config) == STOCK
    assert not hasattr(vllm.PostGradPassManager.configure, plugin.MARK)


def test_the_variable_inserts_the_pass(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMQUANT", "1")
    vllm = make()
    for _ in range(3):
        plugin.register()
    config = vllm.VllmConfig()
    hashes = {config.compute_hash(), config.compute_hash()}
    assert len(hashes) == 1 and hashes != {"0123456789"} and len(hashes.pop()) == 10
    assert vllm.configured(config) == OURS
    monkeypatch.setenv("NORMQUANT", "0")
    assert config.compute_hash() == "0123456789" and vllm.configured(config) == STOCK


def test_one_config_of_two_is_switched_on(make: Any) -> None:
    vllm = make()
    plugin.register()
    on, off = vllm.VllmConfig({"normquant": {}}), vllm.VllmConfig({})
    assert on.compute_hash() != off.compute_hash() == "0123456789"
    assert (vllm.configured(on), vllm.configured(off)) == (OURS, STOCK)


def test_every_switch_and_the_version_are_in_the_hash(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = make()
    plugin.register()
    entries = [{}, {"policy": "always"}, {"policy": "always", "strict": True}, {"sites": {"layers.0.*": "stock"}}]
    hashes = [vllm.VllmConfig({"normquant": entry}).compute_hash() for entry in entries]
    from normquant.vllm import compile_pass

    monkeypatch.setattr(compile_pass, "VERSION", "99.0")
    hashes.append(vllm.VllmConfig({"normquant": {}}).compute_hash())
    assert len({*hashes, "0123456789"}) == 6


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "dev"])
def test_an_unknown_version_is_left_alone(make: Any, monkeypatch: Any, caplog: Any, version: str) -> None:
    monkeypatch.setenv("NORMQUANT", "1")
    vllm = make(version)
    with caplog.at_level(logging.WARNING):
        plugin.register()
        plugin.register()
    assert not hasattr(vllm.VllmConfig.compute_hash, plugin.MARK)
    (message,) = caplog.messages
    assert "leaves vLLM as it is" in message and version in message


def test_nobody_is_warned_who_did_not_ask(make: Any, caplog: Any) -> None:
    make("0.99.0")
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert caplog.messages == []


def test_a_pass_manager_that_changed_is_left_alone(make: Any, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("NORMQUANT", "1")
    vllm = make()
    del vllm.InductorPass.is_applicable_for_range
    plugin.register()
    config = vllm.VllmConfig()
    with caplog.at_level(logging.WARNING):
        assert {config.compute_hash() for _ in range(2)} == {"0123456789"}
    assert vllm.configured(config) == STOCK
    (message,) = caplog.messages
    assert "InductorPass has no is_applicable_for_range" in message


def test_a_model_that_is_made_is_expected_where_its_config_is_on(make: Any, monkeypatch: Any) -> None:
    vllm, expected = make(), []
    monkeypatch.setattr(loading, "expect", lambda config, switches: expected.append((config, switches.rules.policy)))
    for _ in range(2):
        plugin.register()
    vllm.CompilationConfig().custom_op_log_check()
    vllm.current = vllm.VllmConfig({"normquant": {"policy": "always"}})
    vllm.CompilationConfig().custom_op_log_check()
    assert expected == [(vllm.current, "always")]


def test_a_vllm_that_does_not_say_when_a_model_is_made_still_has_the_pass(
    make: Any, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setenv("NORMQUANT", "1")
    vllm = make()
    del vllm.CompilationConfig.custom_op_log_check
    with caplog.at_level(logging.WARNING):
        plugin.register()
    (message,) = caplog.messages
    assert message.endswith("has no custom_op_log_check; this concerns models that it does not compile")
    vllm.VllmConfig().compute_hash()
    assert vllm.configured(vllm.VllmConfig()) == OURS


def test_a_misspelt_switch_is_said(make: Any, monkeypatch: Any) -> None:
    vllm = make()
    plugin.register()
    with pytest.raises(ValueError, match="has 'polcy'"):
        vllm.VllmConfig({"normquant": {"polcy": "auto"}}).compute_hash()
    monkeypatch.setenv("NORMQUANT", "on")
    with pytest.raises(ValueError, match="NORMQUANT is 'on'"):
        plugin.register()


def test_all_reduces_have_a_switch_of_their_own(make: Any, monkeypatch: Any) -> None:
    from normquant.distributed import first_call
    from normquant.ops import _group_calls

    monkeypatch.setattr(first_call, "_rows", None)
    monkeypatch.setattr(_group_calls, "at_first_call", None)
    monkeypatch.setenv("NORMQUANT", "1")
    vllm = make()
    plugin.register()
    without = vllm.VllmConfig().compute_hash()
    assert first_call.rows_of_new() is None
    monkeypatch.setenv("NORMQUANT_ALL_REDUCE", "1")
    with_it = vllm.VllmConfig().compute_hash()
    assert with_it != without and first_call.rows_of_new() is not None
    again = vllm.VllmConfig({"normquant": {"all_reduce": True}}).compute_hash()
    assert again == with_it  # what groups are open by now is no part of it
    monkeypatch.setenv("NORMQUANT_ALL_REDUCE", "0")
    assert vllm.VllmConfig({"normquant": {"all_reduce": True}}).compute_hash() == without


def test_vllms_groups_have_torchs_names(make: Any, monkeypatch: Any) -> None:
    make()
    from normquant.vllm.tensor_parallel import torch_name

    coordinator = SimpleNamespace(device_group=SimpleNamespace(group_name="5"))
    groups = {"tp:0": lambda: coordinator, "gone:0": lambda: None}
    state = module("vllm.distributed.parallel_state", _groups=groups)
    monkeypatch.setitem(sys.modules, "vllm.distributed", module("vllm.distributed", parallel_state=state))
    assert torch_name("tp:0") == "5"
    for name in ("gone:0", "pp:0"):
        with pytest.raises(ValueError, match="vLLM has no group"):
            torch_name(name)


class Applies:
    """A pass of vLLM's that is for graphs of up to 8 tokens."""

    def is_applicable_for_range(self, compile_range: int) -> bool:
        return compile_range <= 8


def test_what_vllm_fuses_later_is_left_to_it(make: Any) -> None:
    make()
    from normquant.vllm.tensor_parallel import fuses_all_reduces

    fusing = type("AllReduceFusionPass", (Applies,), {})()
    other = type("NoOpEliminationPass", (Applies,), {})()
    assert fuses_all_reduces([other, fusing], 8) and not fuses_all_reduces([other, fusing], 9)
    assert not fuses_all_reduces([other], 8)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["NoOpEliminationPass", "AllReduceFusionPass", "RMSNormQuantFusionPass", "ActivationQuantFusionPass"], 2),
        (["NoOpEliminationPass", "RocmAiterRMSNormQuantFusionPass", "RMSNormQuantFusionPass"], 1),
        (["NoOpEliminationPass", "AllReduceFusionPass", "ActivationQuantFusionPass"], 2),
        (["ActivationQuantFusionPass"], 0),
        ([], 0),
    ],
)
def test_where_the_pass_goes(make: Any, names: list[str], expected: int) -> None:
    make()
    from normquant.vllm.compile_pass import position

    passes = [type(name, (), {})() for name in names]
    assert position(passes) == expected
    at = next((i for i, name in enumerate(names) if name == "AllReduceFusionPass"), expected)
    assert position(passes, all_reduce=True) == at
