"""Settings for all tests: what needs a GPU or vLLM is marked by its folder, and skipped elsewhere with the reason."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CASES = 8  # of one test, which `make test` runs: the rest of them are exhaustive
SLOW = {  # as CASES, where a case takes seconds
    "compile/test_random_graphs.py": 1,
    "compile/test_zoo.py": 1,
    "distributed/test_examples.py": 1,
    "distributed/test_exchange.py": 1,
    "kernels/test_machine_code.py": 2,
    "kernels/test_rms_norm_quant.py": 4,
    "linear/test_sharding.py": 1,
    "ops/test__sharding.py": 1,
}


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.has_plugin("hypothesispytest"):  # which the environment with vLLM does not have
        from hypothesis import settings

        settings.register_profile("any machine", deadline=None)  # an example that takes long is the machine's load
        settings.load_profile("any machine")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    _mark_exhaustive(items)
    # The reasons are worked out only when such a test was collected: looking for a GPU imports torch.
    for directory, reason_to_skip in (("gpu", _no_gpu), ("vllm", _no_vllm)):
        inside = [item for item in items if item.path.is_relative_to(TESTS / directory)]
        reason = reason_to_skip() if inside else None
        for item in inside:
            item.add_marker(directory)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _mark_exhaustive(items: Iterable[pytest.Item]) -> None:
    """Mark all but some cases of every test that has many. Which, their names decide, as good as at random: evenly
    spaced ones would have one value of some parameter in common. What needs a GPU or vLLM runs whole."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.path.relative_to(TESTS).parts[0] not in ("gpu", "vllm"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        kept = SLOW.get(cases[0].path.relative_to(TESTS).as_posix(), CASES)
        for item in sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))[kept:]:
            item.add_marker("exhaustive")


def pytest_make_parametrize_id(val: object) -> str | None:
    # A function's own text has its address, by which processes that share the tests would not agree on their names.
    return getattr(val, "__name__", None) if callable(val) else None


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA GPU"


def _no_vllm() -> str | None:
    # A look-up, not an import: vLLM takes seconds to import, and a broken one must fail the tests, not skip them.
    # tests/ is on sys.path, so tests/vllm itself is found where there is no other: a folder, which has no origin.
    spec = importlib.util.find_spec("vllm")
    return None if spec is not None and spec.origin is not None else "vllm is not installed"
