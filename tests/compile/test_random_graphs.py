"""Random functions around norms and quantizations: with the pass on they give what eager gives, to the bit, also where
one of its steps fails.

NORMQUANT_RANDOM_GRAPHS=2000 runs as many of each test, NORMQUANT_RANDOM_SEED=n starts at another seed.
`make random-graphs` runs 3,000 on all cores.
"""

from __future__ import annotations

import os
import random
from itertools import combinations
from typing import Any

import pytest
import torch
from shared.failing_steps import one_step_fails
from shared.pass_harness import assert_same, keeps_roundings, run_with_pass
from shared.random_graphs import sample

COUNT, FAILING = (int(os.environ.get("NORMQUANT_RANDOM_GRAPHS", count)) for count in ("240", "300"))
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


@keeps_roundings
@pytest.mark.parametrize("first", range(FIRST, FIRST + FAILING, CHUNK))
def test_a_pass_that_fails_at_a_random_step_leaves_a_graph_that_is_eager_to_the_bit(first: int) -> None:
    failed = 0
    for seed in range(first, min(first + CHUNK, FIRST + FAILING)):
        made = sample(seed)
        eager, compiled = made.make_inputs(), made.make_inputs()
        with torch.no_grad():
            expected = made.fn(*eager)
        with one_step_fails(random.Random(seed)) as passes:
            outcome = run_with_pass(made.fn, *compiled)
        (steps,), (report,) = passes, outcome.reports
        note = f"seed {seed}, {steps}: {', '.join(made.parts)}"
        assert_same(outcome.result, expected, note)
        assert_same(compiled, eager, f"{note}: inputs")
        assert shared_memory(outcome.result) <= shared_memory(expected), note
        assert steps.failed == ("PlantedError" in str(report)), f"{note}: {report}"
        failed += steps.failed
    assert failed >= CHUNK // 4, f"seeds {first}..: only {failed} passes had a step that could fail"


def shared_memory(outputs: Any) -> set[tuple[int, int]]:
    """Which of the outputs share memory, in pairs: a caller may change one of them."""
    memory = [output.untyped_storage().data_ptr() for output in outputs]
    return {(i, j) for i, j in combinations(range(len(memory)), 2) if memory[i] == memory[j]}
