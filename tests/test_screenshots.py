"""The pictures of the page in the docs: small, shown, and each made by the tool that is named there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICTURES = sorted((ROOT / "docs").glob("*.png"))
LARGEST = 200_000  # bytes
TOOL = (ROOT / "tools" / "screenshots.py").read_text(encoding="utf-8")


def test_the_tool_makes_each() -> None:
    assert {path.stem for path in PICTURES} == set(re.findall(r'Shot\("([\w-]+)"', TOOL)) and len(PICTURES) == 5


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_small_and_shown_with_what_it_is(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    assert re.search(rf"!\[[^\]]{{12,}}\]\({path.name}\)", page) or f'src="{path.name}"' in page


def test_the_readme_opens_with_a_plot_and_the_page() -> None:
    top = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    assert "](docs/kernels.svg)" in top and "](docs/page-before-after.png)" in top
