"""A model that was just loaded: whether it is compiled, what is said where it is not, and what is written."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from shared.vllm_modules import K, Model, values

from normquant.cli.vllm_report import text
from normquant.compile.policy import Rules
from normquant.vllm import loading
from normquant.vllm.graph_records import find, read
from normquant.vllm.switches import Switches

ALWAYS = Switches(True, Rules("always"))


class Loader:
    """The module of a loader, which holds the function that gets weights ready by name."""

    def __init__(self) -> None:
        self.module = ModuleType("vllm.model_executor.model_loader.base_loader")
        self.ready: list[Any] = []
        self.module.process_weights_after_loading = lambda model, *rest: self.ready.append(model)  # type: ignore

    def load(self, config: Any, switches: Switches | None) -> Model:
        """As vLLM does: make the model, say so, and get its weights ready."""
        model = Model()
        if switches is not None:
            loading.expect(config, switches)
        self.module.process_weights_after_loading(model, config.model_config, "cpu")
        assert self.ready[-1] is model
        return model


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loader:
    made = Loader()
    deep_gemm = ModuleType("vllm.utils.deep_gemm")
    deep_gemm.is_deep_gemm_e8m0_used = lambda: False  # type: ignore[attr-defined]
    top = ModuleType("vllm")
    top.__version__, top.envs = "0.32.0", SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path))  # type: ignore[attr-defined]
    for module in (top, made.module, ModuleType("vllm.utils"), deep_gemm):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH", raising=False)
    return made


def config(mode: int = 0, enforce_eager: bool = False) -> Any:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(mode=mode),
        model_config=SimpleNamespace(model="deep/seek", architectures=["DeepseekV32"], enforce_eager=enforce_eager),
        compute_hash=lambda: "0123456789",
    )


def test_a_model_that_is_not_compiled_hands_over_and_says_so(loader: Loader, caplog: Any, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO), torch.inference_mode():
        model = loader.load(config(enforce_eager=True), ALWAYS)
        model(values(40, K))
    warning, settled = caplog.records
    assert warning.levelno == logging.WARNING and settled.levelno == logging.INFO
    said = "vLLM does not compile deep/seek (DeepseekV32) (compilation mode 0, by --enforce-eager), so that no graph is"
    assert said in warning.message and "kv latents" in warning.message
    said = "6 of 6 norms and gated products hand over their quantized form; `normquant vllm-report "
    assert said in settled.message
    (path,) = find(tmp_path / "torch_compile_cache")
    report = " ".join(text(read(path)).split())
    assert "6 of 6 sites fused in a model that is not compiled (compilation mode 0, by --enforce-eager)" in report
    assert "layers.*.post_attention_layernorm K=256 bfloat16 (layer 0, 1) add_rms_norm_quant" in report
    assert "handed to shared, experts" in report
    assert "layers.*.act_fn K=256 bfloat16 (layer 0, 1) silu_mul_quant" in report and "handed to down_proj" in report
    assert "stock layers.*.o_proj (layer 0, 1) its input is what aten.tanh.default gives" in report
    assert "linear kernel: Kernel, 8 calls" in report


def test_the_report_of_the_last_start_is_the_only_one(loader: Loader, tmp_path: Path) -> None:
    for _ in range(2):
        with torch.inference_mode():
            loader.load(config(), ALWAYS)(values(5, K))
    (path,) = find(tmp_path)
    assert len(path.read_text().splitlines()) == 1 and len(list(path.parent.iterdir())) == 1


def test_a_compiled_model_is_left_alone(loader: Loader, caplog: Any) -> None:
    model = Model()
    model.do_not_compile = False
    assert loading.why_not_compiled(model, config(3)) is None


def test_why_a_model_is_not_compiled(monkeypatch: Any) -> None:
    assert loading.why_not_compiled(Model(), config(3)) == "the model has no support for it"
    assert loading.why_not_compiled(Model(), config()) == "compilation mode 0"
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    assert loading.why_not_compiled(Model(), config()) == "compilation mode 0, with breakable CUDA graphs"


@pytest.mark.parametrize("mode", [1, 2])
def test_what_torch_compiles_alone_is_only_warned_of(loader: Loader, caplog: Any, mode: int) -> None:
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        loader.load(config(mode), ALWAYS)(values(5, K))
    (message,) = caplog.messages
    assert message.endswith("so that no graph is rewritten: nothing is fused")


def test_models_that_nobody_expects_are_left_alone(loader: Loader, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        first = loader.load(config(), ALWAYS)
        caplog.clear()
        second = loader.load(config(), None)  # a config that is off, after one that is on
    assert caplog.messages == [] and "forward" in first.__dict__ and "forward" not in second.__dict__


def test_a_failure_leaves_the_model_with_one_warning(loader: Loader, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(loading, "watch", lambda *args: 1 / 0)
    with caplog.at_level(logging.WARNING):
        model = loader.load(config(), ALWAYS)
    assert caplog.messages[-1] == "normquant leaves the model as it is: ZeroDivisionError: division by zero"
    assert "forward" not in model.__dict__


def test_a_report_that_cannot_be_written_is_said(loader: Loader, caplog: Any, tmp_path: Path) -> None:
    (tmp_path / "torch_compile_cache").write_text("a file")
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        loader.load(config(), ALWAYS)(values(5, K))
    assert caplog.messages[-1].startswith("normquant's report was not written: ")
