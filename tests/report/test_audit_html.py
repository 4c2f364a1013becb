"""The page of an audit: complete, self-contained, escaped, and drawn by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from shared.generated_code import ON

from normquant.audit import audit_path, reports
from normquant.audit.program import GeneratedCode
from normquant.audit.source import wrapper_code
from normquant.report import audit_html

VOID = {"meta", "link", "br", "input", "img", "hr"}


class Page(HTMLParser):
    """The elements of a page; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def having(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]


def data(*rows: int) -> list[dict[str, Any]]:
    return [report.to_dict() for report in audit_path(ON, rows=rows or (64,))]


def test_every_launch_is_a_box_that_the_keyboard_reaches() -> None:
    (report,) = data()
    page = Page(audit_html.page([report], "a layer"))
    boxes = page.having("box")
    launches = report["programs"][0]["launches"]
    assert len(boxes) == len(launches) == 14
    assert all(box["tabindex"] == "0" and box["role"] == "button" and box["aria-label"] for box in boxes)
    assert "mutated-input-copy" in (boxes[2]["aria-label"] or "") and "error" in (boxes[2]["class"] or "")


def test_edges_are_as_wide_as_their_bytes() -> None:
    (report,) = data()
    edges = {
        (e["from"], e["to"], e["buffer"]): e["bytes"] for e in report["programs"][0]["edges"] if e["from"] is not None
    }
    drawn = Page(audit_html.page([report], "a layer")).having("edge")
    assert len(drawn) == len(edges)
    widths = {(e["data-from"], e["data-to"], float(e["stroke-width"] or 0)) for e in drawn}
    widest = max(edges.values())
    for (source, target, _), count in edges.items():
        expected = round(max(1.4, 26 * count / widest), 1)
        assert (f"0-{source}", f"0-{target}", expected) in widths


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = audit_html.page(data(), "a layer")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", text) and "url(" not in text and "@import" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_markup_in_names_stays_text() -> None:
    evil = "<script>alert(1)</script>"
    source = ON.read_text().replace("rms_norm_per_block_quant", "x")
    module = wrapper_code.read_module(GeneratedCode(f"{evil}.py", source))
    module.calls[0] = type(module.calls[0])(
        **{**module.calls[0].__dict__, "name": f'"><img src=x onerror=alert(1)>{evil}'}
    )
    module.notes.append(evil)
    (report,) = reports.audit_modules([module], "h100", (64,))
    text = audit_html.page([report.to_dict()], evil)
    page = Page(text)
    assert "<script>alert" not in text and "<img" not in text
    assert [tag for tag, _ in page.elements].count("script") == 2, "the data and the page's own"
    assert "</script>" not in text.split('id="data">')[1].split("</script>")[0]
    assert any(evil in part for part in page.text)


def test_several_sizes_have_a_switch() -> None:
    page = Page(audit_html.page(data(1, 64), "a layer"))
    buttons = [attrs for _, attrs in page.elements if "data-show" in attrs]
    assert [b["aria-pressed"] for b in buttons] == ["true", "false"]
    assert ["hidden" in attrs for tag, attrs in page.elements if tag == "main"] == [False, True]


def test_a_long_program_is_drawn_in_part() -> None:
    (report,) = data()
    program = report["programs"][0]
    program["launches"] = [{**program["launches"][i % 14], "position": i} for i in range(500)]
    assert "The first 400 of 500 launches are drawn." in audit_html.page([report], "long")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pixels(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and the unfiltered rows of an 8-bit RGB or RGBA PNG."""
    width, height, depth, kind = (int.from_bytes(png[16:20]), int.from_bytes(png[20:24]), png[24], png[25])
    assert depth == 8 and kind in (2, 6)
    at, packed = 8, b""
    while at < len(png):
        size, name = int.from_bytes(png[at : at + 4]), png[at + 4 : at + 8]
        packed += png[at + 8 : at + 8 + size] if name == b"IDAT" else b""
        at += 12 + size
    return width, height, zlib.decompress(packed)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it(tmp_path: Path, scheme: str) -> None:
    """Headless Chromium: no script error, a box that is chosen fills the panel, and the picture is light or dark."""
    page = tmp_path / "report.html"
    probe = (
        "<script>addEventListener('error', e => document.title = 'failed: ' + e.message);"
        "addEventListener('load', () => { const boxes = document.querySelectorAll('.box'); boxes[1].focus();"
        "boxes[1].dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown', bubbles: true}));"
        "const chosen = document.querySelector('.panel h3').textContent;"
        "document.title = chosen + ' / ' + document.activeElement.dataset.launch; });"
        f"document.documentElement.dataset.theme = '{scheme}'</script></body>"
    )
    page.write_text(audit_html.page(data(), "a layer").replace("</body>", probe))
    shot = tmp_path / "report.png"
    base = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,900"]
    base.append("--virtual-time-budget=5000")  # or the page may be read before its load event
    options = {"check": True, "capture_output": True, "timeout": 60}
    dom = subprocess.run([*base, "--dump-dom", page.as_uri()], text=True, **options).stdout  # type: ignore[call-overload]
    assert "<title>triton_poi_fused_0 / 0-2</title>" in dom
    subprocess.run([*base, f"--screenshot={shot}", page.as_uri()], **options)  # type: ignore[call-overload]
    width, height, rows = pixels(shot.read_bytes())
    assert (width, height) == (1400, 900) and len(set(rows)) > 20, "something is drawn"
    corner = rows[1:4]  # the page's background; the first row is stored unfiltered or as a difference to the left
    assert (min(corner) > 200) if scheme == "light" else (max(corner) < 60)
