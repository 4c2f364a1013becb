"""What holds for all rules: ids, pages, and how bytes become times."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared.rule_cases import K, M, cast, program

from normquant.audit import rules
from normquant.audit.rules import RULE_IDS, RULES
from normquant.audit.targets import TARGETS

DOCS = Path(__file__).parents[2] / "docs" / "rules"


def test_every_rule_has_a_page_that_names_it_and_an_id_of_its_own() -> None:
    assert len(set(RULE_IDS)) == len(RULES) == 10
    pages = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    assert set(pages) == {*RULE_IDS, "README"}
    for rule in RULES:
        page = pages[rule.id]
        assert page.startswith(f"# {rule.id}\n") and rule.severity in page
        assert "## What to do" in page and "## When it is fine" in page
        assert f"({rule.id}.md)" in pages["README"]


def test_times_follow_bytes_and_launches() -> None:
    n = M * K
    there = cast(0, "x", "wide", ("bfloat16", "float32"), (2 * n, 4 * n))
    back = cast(1, "wide", "out", ("float32", "bfloat16"), (4 * n, 2 * n))
    target = TARGETS["h100"]
    (finding,) = [f for f in rules.check([program(there, back, wide="float32")], target) if f.rule == "cast-round-trip"]
    assert finding.est_us == pytest.approx(2 * target.launch_us + 12 * n / (target.dram_gbps * 1e3))
    assert finding.share == pytest.approx(1.0)
