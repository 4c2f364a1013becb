"""What a timing makes of the replays of CUDA graphs; the graphs are stood in for."""

import pytest
import torch

from normquant.bench import timing
from normquant.tune import by_decode_step

POOL = (0, 1)  # the memory that all graphs share


@pytest.fixture
def replays(monkeypatch) -> list[str]:
    """Names of the graphs in the order of their timed replays; a graph is a name, its nth replay takes n * 10 us."""
    order: list[str] = []

    class Graph(str):
        def replay(self) -> None:
            """The first one, which is not timed."""

    def replay_us(graph: Graph) -> float:
        order.append(graph)
        return 10.0 * order.count(graph)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "replay_us", replay_us)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    monkeypatch.setattr(timing, "capture", lambda calls, _, pool: (Graph(calls[0]), len(calls) if pool is POOL else 0))
    monkeypatch.setattr(by_decode_step, "capture_once", lambda call: Graph(call.args[0]["op"]))
    return order


def test_graphs_take_turns_and_a_call_is_a_part_of_a_replay(replays):
    found = timing.time_calls({"one": ["a"], "two": ["b", "b"]}, samples=3)
    assert replays == ["a", "b"] * 3
    assert (found["one"].us, found["two"].us) == (20.0, 10.0)
    assert (found["one"].n, found["two"].n) == (3, 3)


def test_a_layer_is_a_part_of_a_step(replays):
    found = by_decode_step.layer_us(lambda configs: None, 2, 4, [{"op": "a"}, {"op": "b"}])
    assert replays == ["a", "b"] * 4
    assert found == [12.5, 12.5]  # the middle half of 10, 20, 30, 40 us


def test_the_middle_half_is_blind_to_outliers():
    assert timing.middle_mean([1e9, 3.0, 1.0, 2.0, 4.0, -1e9, 5.0, 0.0]) == pytest.approx(2.5)
    assert timing.middle_mean([3.0]) == 3.0
