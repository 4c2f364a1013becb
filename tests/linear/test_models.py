"""Models of transformers that once broke on block-FP8 linears: converted, each runs and stays near the plain model."""

import pytest
import torch
from shared.zoo import TinyModel, tiny_models, tokens

from normquant.linear import BlockFP8Linear, convert_linears

pytest.importorskip("transformers", reason="transformers is not installed")

# The first four ask a layer for its weight's dtype, the next two give it transposed or expanded inputs.
NAMES = ("mamba2", "deepseek_v32", "glm_moe_dsa", "xlstm", "jamba", "recurrent_gemma", "llama")
MODELS = {model.name: model for model in tiny_models()}


def built(name: str, dtype: torch.dtype) -> torch.nn.Module:
    if name not in MODELS:
        pytest.skip(f"this transformers has no {name}")
    return MODELS[name].build(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_model_runs(name):
    model = built(name, torch.bfloat16)
    with torch.no_grad():
        plain = model(tokens()).logits.float()
        model, report = convert_linears(model)
        out = model(tokens()).logits.float()
    assert sum(isinstance(m, BlockFP8Linear) for m in model.modules()) == len(report.converted) >= 4
    assert "lm_head" in report.left
    assert out.isfinite().all() and (out - plain).norm() < 0.3 * plain.norm()


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_in_float32(name):
    model = built(name, torch.float32)
    with torch.no_grad():
        plain = model(tokens()).logits
        out = convert_linears(model)[0](tokens()).logits
    assert out.dtype == torch.float32 and (out - plain).norm() < 0.3 * plain.norm()


def test_the_zoo_names_each_class_once_by_its_own_type():
    assert MODELS["llama"] == TinyModel("llama", "LlamaForCausalLM") and "internlm3" not in MODELS
    assert len({model.class_name for model in MODELS.values()}) == len(MODELS) >= 100
