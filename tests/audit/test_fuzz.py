"""Damaged and hostile input never crashes the parser: it is audited, or refused with one line.

The number of inputs is set by NORMQUANT_FUZZ_INPUTS; 100,000 take two to three minutes on one core:

    NORMQUANT_FUZZ_INPUTS=100000 pytest tests/audit/test_fuzz.py
"""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import pytest
from shared.damaged_code import mutated

from normquant.audit import on_disk
from normquant.audit.source import wrapper_code
from normquant.audit.source.generated_module import NotGenerated
from normquant.report import audit_html, audit_text

INPUTS = int(os.environ.get("NORMQUANT_FUZZ_INPUTS", "1500"))
SEEDS = Path(__file__).parent / "fixtures" / "seeds"
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(SEEDS.glob("*.py"))]


def audited(text: str) -> bool:
    """Whether the text was audited; False if it was refused. Anything else raises."""
    try:
        module = wrapper_code.read_module(text, "fuzz")
    except NotGenerated as error:
        assert "\n" not in str(error) and str(error)
        return False
    (report,) = on_disk.reports([module], text, "h100")
    assert all(launch.bytes_read >= 0 and launch.bytes_written >= 0 for launch in report.launches)
    return True


def test_seeds_are_audited() -> None:
    assert len(TEXTS) >= 8
    assert all(audited(text) for text in TEXTS)


@pytest.mark.parametrize("part", range(10))
def test_damaged_code(part: int) -> None:
    rng = random.Random(part)
    outcomes = {True: 0, False: 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarning: what Python thinks of damaged code is no news
        for number in range(INPUTS // 10):
            text = mutated(rng.choice(TEXTS), rng)
            try:
                outcomes[audited(text)] += 1
            except Exception as error:
                raise AssertionError(f"part {part}, input {number}: {error!r}") from error
    assert outcomes[True] and outcomes[False], "both outcomes happen"


def test_damaged_code_is_printed() -> None:
    rng = random.Random(0)
    printed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            text = mutated(rng.choice(TEXTS), rng)
            try:
                module = wrapper_code.read_module(text, "<script>alert(1)</script>")
            except NotGenerated:
                continue
            data = [report.to_dict() for report in on_disk.reports([module], text, "h100")]
            assert "<script>alert" not in audit_html.page(data, "<script>alert(1)</script>")
            assert audit_text.render(data, "title")
            printed += 1
    assert printed
