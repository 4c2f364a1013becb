"""Decoder layers of transformers: every site found, the fused ops exact, nothing left around the norms."""

from __future__ import annotations

import pytest
import torch
from shared.pass_harness import assert_same, exact, run_with_pass, share_of_the_pass

from normquant.compile import explain, inductor_options, last_report
from normquant.compile.verify import total, verify
from normquant.linear import BlockFP8Linear
from normquant.spec import QuantSpec

pytest.importorskip("transformers", reason="transformers is not installed")

from shared.decoder_layers import BF16, MODELS, decoder_layer, empty_linear

SITES = {
    "deepseek_v3": {
        "input_layernorm": "rms_norm_quant",
        "self_attn.q_a_layernorm": "rms_norm_quant",
        "self_attn.kv_a_layernorm": "rms_norm_quant",
        "post_attention_layernorm": "add_rms_norm_quant",
    },
    **{
        name: {"input_layernorm": "rms_norm_quant", "post_attention_layernorm": "add_rms_norm_quant"}
        for name in ("qwen3", "llama", "gemma")
    },
}
ROUNDING = {"gemma": "once"}


def tiny(name: str):
    torch.manual_seed(0)
    layer = decoder_layer(name, MODELS[name][1], BlockFP8Linear.from_linear)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1 and parameter.dtype == BF16:  # norm weights are all one when they are new
                parameter.add_(torch.randn_like(parameter) / 8)
    rope = 64 if name == "deepseek_v3" else 128
    cos, sin = torch.randn(2, 1, 6, rope, dtype=BF16)
    return layer, dict(position_embeddings=(cos, sin), attention_mask=None)


@pytest.mark.parametrize("name", MODELS)
def test_every_site_of_a_tiny_layer_is_fused_and_exact(name: str) -> None:
    layer, kwargs = tiny(name)
    x = exact(1, 6, 512)
    found = verify(layer, x, kwargs=kwargs)
    assert {site.name: site.op for site in found.sites} == SITES[name]
    assert found.exact, [(site.name, site.all.differ, site.all.compared) for site in found.sites]
    assert_same(found.fused, found.unfused)
    (report,) = found.reports
    assert {QuantSpec.decode(site.spec).rounding for site in report.sites} == {ROUNDING.get(name, "twice")}
    assert [site.name for site in report.others] == ["self_attn.o_proj", "mlp.down_proj"]


def test_a_site_is_exact_on_any_input_given_the_same_sum_of_squares() -> None:
    """Where the order of the sum matters, only values at a rounding border differ: a handful of thousands."""
    layer, kwargs = tiny("deepseek_v3")
    found = verify(layer, torch.randn(1, 6, 512, dtype=BF16), kwargs=kwargs)
    assert total(found.sites).differ <= 1e-3 * total(found.sites).compared


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "marked"])
def test_dynamic_rows(dynamic: bool | None) -> None:
    """With dynamic=True, torch makes an input of every Python float of a module, epsilons too."""
    layer, kwargs = tiny("deepseek_v3")
    x = exact(1, 6, 512)
    if dynamic is None:
        torch._dynamo.mark_dynamic(x, 1)
        for t in kwargs["position_embeddings"]:
            torch._dynamo.mark_dynamic(t, 1)
    with torch.no_grad():
        expected = layer(x, **kwargs)
    outcome = run_with_pass(layer, x, dynamic=dynamic, **kwargs)
    assert len(outcome.fused) == 4 and all(site.m.startswith("s") for site in outcome.sites), outcome.reports
    assert_same(outcome.result, expected)


def test_a_mixture_of_experts_reads_the_norm_beside_its_quantization() -> None:
    """The router and the routed experts read the bf16 norm, the shared expert the quantized one."""
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=128)
    config = MODELS["deepseek_v3"][1] | experts | dict(first_k_dense_replace=0)
    torch.manual_seed(0)
    layer = decoder_layer("deepseek_v3", config, BlockFP8Linear.from_linear)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dtype == BF16 and parameter.dim() == 3:
                parameter.normal_(std=0.02)
    _, kwargs = tiny("deepseek_v3")
    found = verify(layer, exact(1, 6, 512), kwargs=kwargs)
    ops = {site.name: site.op for site in found.sites}
    assert ops == SITES["deepseek_v3"] | {"post_attention_layernorm": "add_rms_norm_quant_with_norm"}
    assert found.exact and all(site.others.compared for site in found.sites if "with_norm" in site.op)
    assert_same(found.fused, found.unfused)


def real(name: str, m: int = 64):
    config = MODELS[name][2]

    def make_inputs():
        with torch.device("cuda"):
            layer = decoder_layer(name, config, empty_linear)
        rope = 64 if name == "deepseek_v3" else 128
        x, *angles = (
            torch.empty(1, m, width, dtype=BF16, device="cuda") for width in (config["hidden_size"], rope, rope)
        )
        return x, *angles, layer

    def run(x, cos, sin, layer):
        return layer(x, position_embeddings=(cos, sin), attention_mask=None)

    return run, make_inputs


def test_the_pass_costs_little_of_the_compile_of_a_layer() -> None:
    """Measured without a GPU, where the rest of a compile is shortest: no kernel is built or tuned."""
    pytest.importorskip("triton", reason="triton is not installed")
    from normquant.audit import audit

    fn, make_inputs = real("deepseek_v3")

    def compile_once() -> None:
        audit(fn, make_inputs, options=inductor_options(strict=True))

    compile_once()  # imports and registrations happen once
    assert share_of_the_pass(compile_once) <= 0.05


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_of_real_size_for_an_h100(name: str) -> None:
    """Between the GEMMs around a norm is one kernel, no identity, no layout copy, and the fewest bytes there can be."""
    pytest.importorskip("triton", reason="triton is not installed")
    from normquant.audit import audit

    fn, make_inputs = real(name)
    stock = audit(fn, make_inputs)
    fused = audit(fn, make_inputs, options=inductor_options(strict=True))
    report = last_report()
    assert report is not None and len(report.fused) == len(report.sites) == len(SITES[name]), explain()
    assert (fused.count("identity"), fused.count("layout-copy")) == (0, 0)
    norms = {name: count for name, count in fused.externs.items() if "norm_quant" in name}
    assert sum(norms.values()) == len(SITES[name])
    assert not [kernel.name for kernel in fused.kernels if "rsqrt" in kernel.name and "norm_quant" in kernel.name]
    assert fused.bytes < stock.bytes and len(fused.kernels) <= len(stock.kernels) - len(SITES[name])
    moved = sorted(launch.bytes for launch in fused.launches if "norm_quant" in launch.name)
    assert moved == sorted(site.bytes_moved for site in report.sites)
