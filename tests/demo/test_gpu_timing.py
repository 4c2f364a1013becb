"""The timed part of the demonstration: on the CPU with a stopped clock, and as it is where there is a CUDA GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'normquant[hf]'")

from normquant.bench import timing
from normquant.bench.timing import Timing
from normquant.compile import inductor_options
from normquant.demo import gpu_timing
from normquant.demo.deepseek_layer import R1_TP8, Dims

TINY = Dims(hidden=256, intermediate=128, heads=2, q_lora=128, kv_lora=128, nope=32, rope=16, v_head=64)
OPTIONS = partial(inductor_options, "always")
US = {gpu_timing.STOCK: 120.0, gpu_timing.FUSED: 100.0, gpu_timing.EMPTY: 0.9, gpu_timing.COPY: 200.0}


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No GPU and no compiler: every call runs once, eagerly, and takes as long as US says. Gives what was returned."""
    returned: list[Any] = []

    def time_calls(providers: Mapping[str, Sequence[Callable[[], Any]]]) -> dict[str, Timing]:
        returned.append({name: [call() for call in calls] for name, calls in providers.items()})
        return {name: Timing(US[name], US[name], US[name], 1) for name in providers}

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **how: real(fn, **how) if "backend" in how else fn)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(timing, "time_calls", time_calls)
    monkeypatch.setattr(timing, "sets_needed", lambda read, device: 3)
    monkeypatch.setattr(gpu_timing, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(gpu_timing, "CHECKED_TOKENS", 8)
    return returned


def test_both_compiles_run_on_every_set(stopped_clock: list[Any]) -> None:
    found = gpu_timing.measure(TINY, OPTIONS, lambda what: None, tokens=(1, 4), device="cpu")
    assert [t.tokens for t in found.times] == [1, 4]
    assert found.times[0].speedup == pytest.approx(1.2)
    assert found.empty_us == 0.9 and found.copy_gbps == pytest.approx(2 * (1 << 20) / 200 / 1e3)
    assert found.checks.holds
    for tokens, returned in zip((1, 4), stopped_clock, strict=True):
        assert [tuple(out.shape) for out in returned[gpu_timing.FUSED]] == [(1, tokens, TINY.hidden)] * 3
        assert not torch.equal(
            returned[gpu_timing.STOCK][0], returned[gpu_timing.STOCK][1]
        )  # other weights, other inputs


def test_why_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_timing.why_not() == "This machine shows no CUDA GPU."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert gpu_timing.why_not() == "The NVIDIA A100 has no FP8: compute capability 8.0, and 8.9 is needed."
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu_timing.why_not() == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_fused_layer_is_exact_and_faster() -> None:
    phases: list[str] = []
    found = gpu_timing.measure(R1_TP8, OPTIONS, phases.append)
    assert found.checks.holds
    assert [t.tokens for t in found.times] == list(gpu_timing.TOKENS)
    assert all(t.speedup > 1 for t in found.times), found.times
    assert len(phases) == 1 + len(gpu_timing.TOKENS)
