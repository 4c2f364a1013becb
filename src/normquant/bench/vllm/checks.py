"""What is checked before vLLM is measured: the logits against float32, and the scales that DeepGEMM gets."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from normquant.bench.vllm import float32_model, seeded_model
from normquant.bench.vllm.engine import Engine, counted_scales
from normquant.bench.vllm.job import PROMPT, Job

SHORT = 8  # tokens of a prompt when only scales are counted


def compare(engine: Engine, job: Job, loaded: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far the logits are from those of float32, at the end of prompts and at the token decoded after it.

    Half of the prompts are as long as those of a batch, which may run from CUDA graphs, and half are twice as long.
    logit_error: norm of the difference over norm of the reference, all prompts together; also of each position's own
    the 10th and 90th percentile.
    """
    prompts = [random_prompt(PROMPT * (1 + i % 2) - i % 8, job.model["vocab_size"], i) for i in range(job.compared)]
    found, texts = [], []
    for prompt in prompts:  # alone: the order of several in a batch is vLLM's own
        with engine.logits() as rows:
            engine.add(prompt, 2)
            (tokens,) = engine.finish()
        if engine.ranks.rank:
            continue  # the first rank has the logits
        if [tuple(row.shape) for row in rows] != [(1, job.model["vocab_size"])] * 2:
            raise ValueError(f"a prompt and a token gave logits {[tuple(row.shape) for row in rows]}")
        found += rows
        texts.append([*prompt, tokens[0]])
    if engine.ranks.rank:
        return {}
    device = next(engine.model.parameters()).device
    part, world = seeded_model.share(job.model, engine.ranks.world), engine.ranks.world
    full = float32_model.logits(part, lambda name: seeded_model.float32(loaded, name, device), texts, world)
    expected = torch.cat([part[-2:].cpu() for part in full])  # [2 * prompts, vocabulary]
    logits = torch.cat(found)
    each = statistics.quantiles(((logits - expected).norm(dim=1) / expected.norm(dim=1)).tolist(), n=10)
    return {
        "logit_error": round(float((logits - expected).norm() / expected.norm()), 6),
        "logit_error_p10": round(each[0], 6),
        "logit_error_p90": round(each[-1], 6),
        "logit_spread": float(expected.std()),
    }


def check_scales(engine: Engine, job: Job) -> dict[str, int]:
    """How many scales reach DeepGEMM while a few prompts run and decode, and how many are not powers of two."""
    with engine.without_graphs(), counted_scales() as counts:
        for batch in job.batches:
            for _ in range(batch):
                engine.add(random_prompt(SHORT, job.model["vocab_size"], batch), 3)
            engine.finish()
    return {"scales": counts.scales, "scales_not_power_of_two": counts.others}


def random_prompt(length: int, vocabulary: int, seed: int) -> list[int]:
    """Tokens of a prompt, without the two that mark the beginning and the end of a text."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
    return tokens
