"""The page: complete, self-contained, escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

from shared.generated_code import OFF, ON
from shared.many_layers import repeated

from normquant.audit import audit_path, reports
from normquant.audit.program import GeneratedCode
from normquant.audit.source import wrapper_code
from normquant.demo.sections import Section, SectionTable
from normquant.report.page.html import Compared, page

VOID = {"meta", "link", "br", "input", "img", "hr"}
LARGEST = 3_000_000  # bytes


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

    def data(self) -> list[dict[str, Any]]:
        return json.loads(self.text[[t.strip()[:1] for t in self.text].index("[")])


def layer(path: Any = ON) -> dict[str, Any]:
    return audit_path(path, rows=(64,))[0].to_dict()


def one(*found: dict[str, Any]) -> str:
    return page(Compared([[report] for report in found]), "a layer")


def two(before: dict[str, Any], after: dict[str, Any]) -> str:
    return page(Compared([(before, after)], ("off", "on")), "a layer")


def test_every_launch_is_a_box_and_a_button_that_say_what_it_is() -> None:
    shown = Page(one(layer()))
    assert len(shown.having("box")) == len(shown.having("row")) == 14
    assert [attrs["data-key"] for attrs in shown.having("row")] == [f"0-{n}" for n in range(14)]
    (data,) = shown.data()
    copy = data["launches"]["0-2"]
    assert copy["name"] == "triton_poi_fused_0" and copy["findings"][0][:2] == ["error", "mutated-input-copy"]
    assert copy["reads"][0][1:] == ["bfloat16[s72, 7168] input", "896 KiB"]


def test_the_source_lines_of_the_generator_and_of_the_user_are_there() -> None:
    report = layer()
    line = {"file": "model.py", "line": 3, "code": "x = self.norm(x)"}
    report["programs"][0]["launches"][0]["origins"] = report["programs"][0]["launches"][5]["origins"] = [line]
    (data,) = Page(one(report)).data()
    for launch in report["programs"][0]["launches"]:
        shown = data["launches"][f"0-{launch['position']}"]
        assert shown["generated"] == [f"{launch['file']}:{launch['line']}", launch["code"]]
        assert launch["name"].rpartition(".")[2] in launch["code"], "the line of the call"
        assert [data["lines"][n] for n in shown["origins"]] == [["model.py:3", line["code"]] for _ in launch["origins"]]
    assert len(data["lines"]) == 1, "each line once"


def test_two_sides_show_what_vanished_and_what_appeared() -> None:
    shown = Page(two(layer(OFF), layer()))
    rows = shown.having("row")
    assert sum("gone" in (r["class"] or "").split() for r in rows) == 7
    assert sum("new" in (r["class"] or "").split() for r in rows) == 6
    assert [a["data-side"] for tag, a in shown.elements if tag == "button" and "data-side" in a] == ["0", "1"]
    assert {"off", "on"} <= {text.strip() for text in shown.text}


def test_the_bars_add_up_and_products_stand_apart() -> None:
    text = two(layer(OFF), layer())
    shares = [float(x) for x in re.findall(r'class="group" style="width:([\d.]+)%', text)]
    times = [layer(path)["est_us"] for path in (OFF, ON)]
    for (products, rest), time in zip((shares[:2], shares[2:]), times, strict=True):
        assert products > 0 and rest > 0 and abs(products + rest - 100 * time / max(times)) < 0.1


def test_layers_that_repeat_are_drawn_once_with_their_count() -> None:
    shown = Page(two(repeated(layer(OFF), 61), repeated(layer(), 61)))
    assert [attrs["data-count"] for attrs in shown.having("block")] == ["1", "61", "1"]
    assert len(shown.having("head")) == 2
    assert next(iter(shown.data()))["launches"]["1-3"]["count"] == 61


def test_a_page_of_61_layers_is_small() -> None:
    assert len(two(repeated(layer(OFF), 61), repeated(layer(), 61)).encode()) < LARGEST
    different = repeated(layer(), 61)
    for launch in different["programs"][0]["launches"]:
        launch["name"] += f"_{launch['position']}"
    text = one(different)
    assert len(Page(text).having("row")) == 61 * 14 + 2 and len(text.encode()) < LARGEST


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = two(layer(OFF), layer())
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", text) and "url(" not in text and "@import" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_markup_in_names_stays_text() -> None:
    evil = "<script>alert(1)</script>"
    source = ON.read_text().replace("rms_norm_per_block_quant", "x")
    module = wrapper_code.read_module(GeneratedCode(f"{evil}.py", source))
    module.calls[0] = type(module.calls[0])(
        **{**module.calls[0].__dict__, "name": f"\"'><img src=x onerror=alert(1)>&{evil}"}
    )
    module.notes.append(evil)
    (report,) = reports.audit_modules([module], "h100", (64,))
    data = report.to_dict()
    data["findings"][0].update(message=evil, fix=evil, kernel=evil)
    data["programs"][0]["name"] = evil
    section = Section(evil, evil, (SectionTable((evil,), ((evil,),), "<"),), (evil,))
    shown = Compared([(data, data)], (evil, evil))
    text = page(shown, evil, evil, [section], evil)
    parsed = Page(text)
    assert "<script>alert" not in text and "<img" not in text
    assert [tag for tag, _ in parsed.elements].count("script") == 2, "the data and the page's own"
    assert "</script>" not in text.split('id="data">')[1].split("</script>")[0]
    assert any(evil in part for part in parsed.text)


def test_several_sizes_have_a_switch() -> None:
    shown = Page(one(*(report.to_dict() for report in audit_path(ON, rows=(1, 64)))))
    buttons = [attrs for _, attrs in shown.elements if "data-show" in attrs]
    assert [b["aria-pressed"] for b in buttons] == ["true", "false"]
    assert ["hidden" in attrs for tag, attrs in shown.elements if tag == "main"] == [False, True]


def test_several_programs_have_their_names() -> None:
    report = layer()
    program = report["programs"][0]
    report["programs"] = [program, {**program, "number": 1, "name": "second"}]
    assert [t for t in Page(one(report)).text if t == "second"] == ["second"]


def test_a_program_without_launches_is_a_page() -> None:
    report = layer()
    report["programs"][0].update(launches=[], edges=[], outputs=[])
    report.update(findings=[], kernels=[], extern=[], bytes=0, wasted_bytes=0, est_us=0.0)
    assert Page(one(report)).having("row") == []
    assert len(Page(two(report, layer())).having("row")) == 14
