"""The two forms of the demonstration's sections: text for a terminal, and a page."""

from __future__ import annotations

from shared.generated_code import OFF, ON

from normquant.audit import audit_path
from normquant.demo import render
from normquant.demo.sections import Section, SectionTable

TABLE = SectionTable(("a", "n"), (("x", "1"), ("sum", "10")), "<>", footer=True)
SECTION = Section("1  Title", "About <it>.", (TABLE,), ("a & b",))


def test_text_is_aligned_and_rules_off_the_sum() -> None:
    lines = render.as_text([SECTION], "All is well.", 12.4).splitlines()
    assert lines[:2] == ["1  Title", "   About <it>."]
    assert lines[3:8] == ["   a     n", "   ---  --", "   x     1", "   ---  --", "   sum  10"]
    assert "   - a & b" in lines and "All is well. (12 s)" in lines


def test_long_sentences_are_wrapped() -> None:
    long = Section("t", "word " * 60, (), ("note " * 60,))
    assert max(map(len, render.as_text([long], "v " * 100, 1).splitlines())) <= render.WIDTH


def test_the_page_has_both_compiles_and_the_sections() -> None:
    reports = [audit_path(path, rows=(64,))[0].to_dict() for path in (OFF, ON)]
    text = render.as_html((reports[0], reports[1]), [SECTION], "1 < 2", "normquant 0")
    assert "About &lt;it&gt;." in text and "a &amp; b" in text and "1 &lt; 2" in text and "normquant 0" in text
    assert '<tr class="sum"><td>sum</td><td class="n">10</td></tr>' in text
    assert all(f"<td>{command}</td>" in text for _, command in render.NEXT)
    assert all(f">{side}</p>" in text for side in render.SIDES) and 'data-key="1-0"' in text
