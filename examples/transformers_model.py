"""A model of transformers, converted to block FP8, compiled with every norm fused, and audited; nothing is fetched."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import normquant as nq


def build_model() -> torch.nn.Module:
    """A small Qwen3; of a checkpoint it would be AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)."""
    config = Qwen3Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=1000, use_cache=False,
    )  # fmt: skip
    return nq.block_fp8(Qwen3ForCausalLM(config).bfloat16().eval())


def main() -> None:
    torch.manual_seed(0)
    model = build_model()
    ids = torch.randint(0, 1000, (1, 16))
    fused = torch.compile(model, options=nq.inductor_options("always"))
    with torch.inference_mode():
        logits, expected = fused(input_ids=ids).logits, model(input_ids=ids).logits
    print(f"logits {tuple(logits.shape)}, farthest from eager by {(logits - expected).abs().max().item():.4f}")
    print(nq.explain())
    print(nq.audit(fused, {"input_ids": ids}))


if __name__ == "__main__":
    main()
