"""The import paths that documentation and installed entry points name."""

from __future__ import annotations

import importlib.util
from importlib.metadata import entry_points

import pytest

from normquant.integrations import vllm_plugin
from normquant.vllm import plugin

MANUAL = ("add_rms_norm_quant", "block_linear", "group_quant", "input_spec", "rms_norm_quant", "silu_mul_quant")


def test_the_plugin_is_the_function_that_vllm_calls() -> None:
    assert vllm_plugin.register is plugin.register
    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "normquant"]
    assert entry.load() is plugin.register


def test_the_manual_functions_are_there_where_vllm_is() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # no package, or the folder of tests of that name
        with pytest.raises(ImportError, match="vllm"):
            importlib.import_module("normquant.integrations.vllm_manual")
        return
    documented = importlib.import_module("normquant.integrations.vllm_manual")
    manual = importlib.import_module("normquant.vllm.manual")
    assert [getattr(documented, name) for name in MANUAL] == [getattr(manual, name) for name in MANUAL]
