"""A decode step on a GPU: whoever multiplies in it computes the same, and its graph gives what it gives itself."""

import pytest
import torch
from shared.compare import assert_bitwise

from normquant.bench import decode, shard_step
from normquant.bench.shard_step import DEEPSEEK_R1
from normquant.bench.timing import capture_once
from normquant.linear import HOPPER


@pytest.fixture(scope="module")
def steps():
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("products of few rows were measured on Hopper alone")
    names = [name for name, provider in decode.TODAY.items() if not provider.lacks()]
    return decode.steps(shard_step.layers(DEEPSEEK_R1, decode.CHECKED), decode.todays(names))


@pytest.mark.parametrize("m", [1, 16, 31, 64])
def test_all_providers_compute_the_same_step(steps, m):
    errors = decode.checked_errors(steps, shard_step.inputs(DEEPSEEK_R1, m))
    assert errors.keys() == steps.keys() and max(errors.values()) < 0.1


@pytest.mark.parametrize("m", [1, 16, 64])
def test_a_graph_gives_what_the_step_gives(steps, m):
    inputs = shard_step.inputs(DEEPSEEK_R1, m)
    for step in steps.values():
        expected, captured = shard_step.run(step, inputs), []
        graph = capture_once(lambda step=step, into=captured: into.append(shard_step.run(step, inputs)))
        for out in captured[-1]:  # the graph's memory
            (out.view(torch.uint8) if out.dtype == torch.float8_e4m3fn else out).zero_()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(list(captured[-1]), list(expected))
