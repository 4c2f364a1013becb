"""The two forms of the demonstration's sections: text for a terminal, and a page."""

from __future__ import annotations

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


def test_the_page_escapes_what_it_shows() -> None:
    html = render.as_html([SECTION], "1 < 2", "normquant 0")
    assert "About &lt;it&gt;." in html and "a &amp; b" in html and "1 &lt; 2" in html
    assert '<tr class="sum"><td>sum</td><td class="right">10</td></tr>' in html
