"""The page in Chromium: read, searched, zoomed, unfolded, with a mouse, with keys alone, on a phone, in the dark."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shared.browser import chromium, opened
from shared.generated_code import OFF, ON
from shared.many_layers import repeated

from normquant.audit import audit_path
from normquant.report.page.html import Compared, page

PHONE = {"width": 390, "height": 844}
OPENS_IN = 2.0  # seconds
LINE = {"file": "path/to/model.py", "line": 3, "code": "x = self.norm(x) < y"}


def layer(path: Path) -> dict[str, Any]:
    report = audit_path(path, rows=(64,))[0].to_dict()
    report["programs"][0]["launches"][4]["origins"] = [LINE]
    return report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Pages: one audit, the two of a layer, the two of 61 layers, and one at two sizes."""
    folder = tmp_path_factory.mktemp("pages")
    off, on = layer(OFF), layer(ON)
    sizes = [[report.to_dict()] for report in audit_path(ON, rows=(1, 64))]
    shown = {
        "one": Compared([[on]]),
        "two": Compared([(off, on)], ("off", "on")),
        "many": Compared([(repeated(off, 61), repeated(on, 61))], ("off", "on")),
        "sizes": Compared(sizes),
    }
    for name, compared in shown.items():
        (folder / f"{name}.html").write_text(page(compared, name), encoding="utf-8")
    return SimpleNamespace(**{name: folder / f"{name}.html" for name in shown})


def rows(tab: Any, side: int = 0) -> Any:
    return tab.locator(f".view .side[data-side='{side}'] .row")


def scale(tab: Any) -> float:
    return tab.evaluate("Number(document.querySelector('.view').dataset.scale || 1)")


def focused(tab: Any) -> str:
    return tab.evaluate("document.activeElement.dataset.key || document.activeElement.type || ''")


def test_pointing_at_a_launch_shows_its_source_lines_and_its_ribbons(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.one) as tab:
        rows(tab).nth(4).hover()
        panel = tab.locator(".panel")
        assert panel.locator("h3").text_content() == "vllm.fp8_gemm_nt_op"
        assert "x = self.norm(x) < y" in panel.inner_text() and "model.py:3" in panel.inner_text()
        assert "torch.ops.vllm.fp8_gemm_nt_op" in panel.locator("h4:has-text('generated line') + code").text_content()
        assert tab.locator(".ribbon.live").count() > 0
        tab.locator(".box[data-key='0-2']").hover()
        assert panel.locator("h3").text_content() == "triton_poi_fused_0"
        assert "mutated-input-copy" in panel.inner_text()


def test_a_chosen_launch_is_kept_until_escape(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.one) as tab:
        tab.locator(".box[data-key='0-2']").click()
        rows(tab).nth(4).hover()
        assert tab.locator(".panel h3").text_content() == "triton_poi_fused_0"
        assert tab.locator(".row[aria-current=true]").get_attribute("data-key") == "0-2"
        tab.keyboard.press("Escape")
        assert tab.locator(".row.chosen").count() == 0


def test_keys_alone_reach_everything(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.two) as tab:
        seen = []
        while not seen or not seen[-1].startswith("0-"):
            tab.keyboard.press("Tab")
            seen.append(focused(tab))
            assert len(seen) < 20
        assert "search" in seen, "search comes before the launches"
        first = focused(tab)
        tab.keyboard.press("ArrowDown")
        assert focused(tab) != first and focused(tab).startswith("0-")
        assert tab.locator(".panel h3").text_content() != ""
        tab.keyboard.press("ArrowRight")
        assert focused(tab).startswith("1-")
        tab.keyboard.press("Enter")
        assert tab.locator(".row.chosen").get_attribute("data-key") == focused(tab)
        tab.keyboard.press("ArrowLeft")
        assert focused(tab).startswith("0-")
        for key, expected in (("+", 1.25), ("0", 1.0), ("-", 0.8)):
            tab.keyboard.press(key)
            assert scale(tab) == pytest.approx(expected)
        tab.keyboard.press("/")
        assert focused(tab) == "search"


def test_search(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.two) as tab:
        field = tab.locator("input[type=search]")
        field.fill("RMS_norm_per_block quant")  # three launches, and a finding that names them
        assert tab.locator(".row.hit").count() == 4 and tab.locator(".hits").text_content() == "4 of 29"
        assert tab.locator(".row.dim").count() == 25 and tab.locator(".box.hit").count() == 4
        field.press("Enter")
        first = tab.locator(".row.chosen").get_attribute("data-key")
        field.press("Enter")
        second = tab.locator(".row.chosen").get_attribute("data-key")
        field.press("Shift+Enter")
        assert tab.locator(".row.chosen").get_attribute("data-key") == first != second
        field.fill("self.norm(x)")
        assert tab.locator(".row.hit").count() == 2, "source lines are searched, too"
        field.fill("mutated-input")
        assert tab.locator(".row.hit").count() == 1, "and findings"
        field.fill("nothing of that kind")
        assert tab.locator(".hits").text_content() == "0 of 29"
        field.press("Escape")
        assert tab.locator(".row.dim").count() == 0 and field.input_value() == ""


SCROLLED = "(view => [view.scrollLeft, view.scrollTop])(document.querySelector('.view'))"


def test_zoom_and_pan(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.one, height=700) as tab:
        view = tab.locator(".view")
        view.scroll_into_view_if_needed()
        box = view.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + 200
        under = f"document.elementFromPoint({x}, {y}).closest('.row').dataset.key"
        before = tab.evaluate(under)
        tab.mouse.move(x, y)
        tab.keyboard.down("Control")
        tab.mouse.wheel(0, -300)
        tab.keyboard.up("Control")
        assert scale(tab) == pytest.approx(2.718, abs=0.01)
        assert tab.evaluate(under) == before, "what is under the mouse stays there"
        assert tab.locator("[data-zoom=reset]").text_content() == "272 %"
        left, top = tab.evaluate(SCROLLED)
        tab.mouse.down()
        tab.mouse.move(x - 60, y - 90, steps=5)
        tab.mouse.up()
        assert tab.evaluate(SCROLLED) == [pytest.approx(left + 60, abs=1), pytest.approx(top + 90, abs=1)]
        assert tab.locator(".row.chosen").count() == 0, "a pan chooses nothing"
        tab.locator("[data-zoom=out]").click()
        tab.locator("[data-zoom=reset]").click()
        assert scale(tab) == 1
        assert tab.evaluate("(v => v.scrollWidth - v.clientWidth)(document.querySelector('.view'))") == 0


EDGES = """[...document.querySelectorAll('.block')].map(block => block.getBoundingClientRect())
  .map(box => [box.top, box.bottom])"""


def test_layers_unfold_and_fold(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.many) as tab:
        blocks, folds = tab.locator(".block"), tab.locator("[data-fold]")
        assert blocks.count() == 3
        folds.first.click()
        assert blocks.count() == 63 and folds.first.get_attribute("aria-expanded") == "true"
        assert tab.locator("[data-unfold]").text_content() == "fold all layers"
        assert tab.locator(".head").nth(2).text_content() == "2 of 61"
        edges = tab.evaluate(EDGES)
        assert all(abs(upper[1] - lower[0]) < 0.5 for upper, lower in pairwise(edges)), "ribbons go on"
        row = tab.locator(".block[data-copy='4'] .side[data-side='1'] .row").nth(2)
        row.click()
        assert "launch 59, 5 of 61 alike" in tab.locator(".panel").inner_text()
        tab.keyboard.press("ArrowUp")
        tab.keyboard.press("ArrowUp")
        tab.keyboard.press("ArrowUp")
        assert "launch 56, 4 of 61 alike" in tab.locator(".panel").inner_text(), "from layer to layer"
        tab.locator("input[type=search]").fill("rms_norm_per_block_quant")
        assert tab.locator(".hits").text_content().startswith("244 of ")
        tab.locator("[data-unfold]").click()
        assert blocks.count() == 3 and folds.first.get_attribute("aria-expanded") == "false"
        folds.first.focus()
        tab.keyboard.press("Enter")
        assert blocks.count() == 63


def shown(tab: Any, selector: str) -> int:
    """How many are drawn."""
    drawn = "selector => [...document.querySelectorAll(selector)].filter(e => getComputedStyle(e).display !== 'none')"
    return tab.evaluate(f"{drawn}.length", selector)


def test_ribbons_between_layers_belong_to_their_copies(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.many) as tab:
        parts = {only: shown(tab, f".only-{only}") for only in ("first", "later", "not-last", "last")}
        assert all(parts.values()), "folded, all are drawn"
        tab.locator("[data-fold]").first.click()
        assert shown(tab, ".only-first") == parts["first"]
        assert shown(tab, ".only-later") == 60 * parts["later"]
        assert shown(tab, ".only-not-last") == 60 * parts["not-last"]
        assert shown(tab, ".only-last") == parts["last"]


def test_61_layers_open_at_once(browser: Any, files: SimpleNamespace) -> None:
    assert files.many.stat().st_size < 3_000_000
    with opened(browser, files.many) as tab:
        took = "(([t]) => t.loadEventEnd / 1e3)(performance.getEntriesByType('navigation'))"
        assert tab.evaluate(took) < OPENS_IN


def background(tab: Any) -> int:
    """The red of the page's background."""
    return int(tab.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_colours_follow_system_and_button(browser: Any, files: SimpleNamespace, scheme: str, other: str) -> None:
    with opened(browser, files.one, color_scheme=scheme) as tab:
        dark = {"light": background(tab) < 60, "dark": background(tab) > 200}[scheme]
        assert not dark
        tab.locator("#theme").click()
        assert (background(tab) < 60) == (other == "dark")
        tab.emulate_media(color_scheme=other)
        assert (background(tab) < 60) == (other == "dark"), "chosen by hand, it stays"


CONTRAST = """selector => {
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
  return [...document.querySelectorAll(selector)].map(element => {
    let back = element;
    while (back && (parts(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0) back = back.parentElement;
    const [a, b] = [getComputedStyle(element).color, getComputedStyle(back).backgroundColor].map(c => light(parts(c)));
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Any, files: SimpleNamespace, scheme: str) -> None:
    """Contrast of at least 4.5, as WCAG asks."""
    with opened(browser, files.two, color_scheme=scheme) as tab:
        for selector in (".badge", ".row .name", ".row .detail", ".muted", "h1", ".tiles dt", ".mark"):
            assert min(tab.evaluate(CONTRAST, selector)) >= 4.5, selector


@pytest.mark.parametrize("name", ["one", "two", "many", "sizes"])
def test_a_phone_shows_all_without_scrolling_sideways(browser: Any, files: SimpleNamespace, name: str) -> None:
    with opened(browser, getattr(files, name), **PHONE, has_touch=True, is_mobile=True) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("(v => v.scrollWidth - v.clientWidth)(document.querySelector('.view'))") == 0
        side = "1" if name in ("two", "many") else "0"
        row = tab.locator(f".report:not([hidden]) .side[data-side='{side}'] .row").nth(2)
        row.scroll_into_view_if_needed()
        row.tap()
        sheet = tab.locator(".report:not([hidden]) .panel").bounding_box()
        assert sheet["width"] == 390 and sheet["y"] + sheet["height"] <= 845
        tab.locator(".report:not([hidden]) .close").tap()
        assert tab.locator(".panel.open").count() == 0


def test_a_phone_shows_one_side_at_a_time(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.two, **PHONE) as tab:
        assert not rows(tab, 0).first.is_visible() and rows(tab, 1).first.is_visible()
        tab.locator("button[data-side='0']").click()
        assert rows(tab, 0).first.is_visible() and not rows(tab, 1).first.is_visible()
        tab.locator(".parts [data-key^='1-']").first.click()
        assert rows(tab, 1).first.is_visible(), "the bar leads to the launch, on whichever side"


OVERLAPS = """() => {
  const bad = [];
  for (const row of document.querySelectorAll('.row')) {
    const whole = row.getBoundingClientRect();
    const parts = [...row.querySelectorAll('.name, .detail, .badge')].map(e => e.getBoundingClientRect());
    parts.forEach((a, i) => {
      if (a.top < whole.top - 1 || a.bottom > whole.bottom + 1 || a.right > whole.right + 1) bad.push(row.innerText);
      parts.slice(i + 1).forEach(b => {
        const beside = a.right - 1 <= b.left || b.right - 1 <= a.left;
        if (!beside && a.top < b.bottom - 1 && b.top < a.bottom - 1) bad.push(row.innerText);
      });
    });
  }
  return bad;
}"""


@pytest.mark.parametrize("width", [390, 900, 1280, 1600])
def test_labels_neither_overlap_nor_are_cut_off(browser: Any, files: SimpleNamespace, width: int) -> None:
    for name in ("one", "two", "many"):
        with opened(browser, getattr(files, name), width=width) as tab:
            assert tab.evaluate(OVERLAPS) == []
            tiles = "[...document.querySelectorAll('.tiles dd')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
            assert tab.evaluate(tiles) == 0


def test_findings_lead_to_their_launch(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.one) as tab:
        link = tab.locator(".findings a").first
        link.click()
        assert tab.locator(".row.chosen").get_attribute("data-key") == link.get_attribute("data-to")
        assert tab.locator(".row.chosen").is_visible()


def test_sizes_are_switched(browser: Any, files: SimpleNamespace) -> None:
    with opened(browser, files.sizes) as tab:
        assert tab.locator(".report:visible").count() == 1
        tab.locator("[data-show='1']").click()
        assert tab.locator(".report:visible").get_attribute("data-report") == "1"
        tab.locator(".report:visible .row").nth(3).click()
        assert tab.locator(".report:visible .panel h3").text_content() == "_C.rms_norm_per_block_quant"
