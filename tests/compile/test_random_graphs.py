"""Random functions around norms and quantizations: with the pass on they give what eager gives, to the bit.

NORMQUANT_RANDOM_GRAPHS=2000 runs as many (240 otherwise), NORMQUANT_RANDOM_SEED=n starts at another seed.
"""

from __future__ import annotations

import os

import pytest
import torch
from shared.pass_harness import assert_same, keeps_roundings, run_with_pass
from shared.random_graphs import sample

COUNT = int(os.environ.get("NORMQUANT_RANDOM_GRAPHS", "240"))
FIRST = int(os.environ.get("NORMQUANT_RANDOM_SEED", "0"))
CHUNK = 40
READ_THE_NORM = ("norm", "router", "norm twice")


@keeps_roundings
@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, CHUNK))
def test_compiled_is_eager_to_the_bit(first: int) -> None:
    fused = 0
    for seed in range(first, min(first + CHUNK, FIRST + COUNT)):
        made = sample(seed)
        note = f"seed {seed}: {', '.join(made.parts)}"
        eager, compiled = made.make_inputs(), made.make_inputs()
        with torch.no_grad():
            expected = made.fn(*eager)
        outcome = run_with_pass(made.fn, *compiled)
        assert_same(outcome.result, expected, note)
        assert_same(compiled, eager, f"{note}: inputs")
        whole = bool(outcome.sites) and len(outcome.fused) == len(outcome.sites)
        if made.fusable:
            assert whole, f"{note}: {outcome.reports}"
            read = any(f"extra={kind}" in made.parts for kind in READ_THE_NORM)
            written = [op for op in outcome.ops() if "with_norm" in op]
            assert len(written) == read, f"{note}: {outcome.ops()}"
        fused += whole
    assert fused >= CHUNK // 4, f"seeds {first}..: only {fused} were fused, too few to say anything about fusion"
