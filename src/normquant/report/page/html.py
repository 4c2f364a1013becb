"""The page: one file that loads nothing from elsewhere, made by Jinja2, which escapes all that comes from the input."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normquant.report import formatting
from normquant.report.audit_text import Report
from normquant.report.page.drawing import BOX, LEFT
from normquant.report.page.timeline import CLASSES, kind
from normquant.report.page.view import view

if TYPE_CHECKING:
    from jinja2 import Template

SINGLE = "this code"


@dataclass(frozen=True)
class Compared:
    """What is shown: one report for each number of rows, or two of each, before and after, with their names."""

    reports: Sequence[Sequence[Report]]
    names: Sequence[str] = (SINGLE,)


def page(shown: Compared, title: str, lead: str = "", sections: Sequence[Any] = (), foot: str = "") -> str:
    """The page as text.

    Args:
        lead: a sentence under the title.
        sections: what is written above the drawing, each with `title`, `lead`, `tables` and `notes`.
        foot: versions, for the end of the page.
    """
    views = [view(index, reports, shown.names) for index, reports in enumerate(shown.reports)]
    return _template().render(
        title=title,
        lead=lead,
        target=shown.reports[0][-1]["target"],
        names=shown.names,
        views=views,
        kinds=_kinds(shown),
        details=[one.details for one in views],
        sections=sections,
        foot=foot,
        box=(LEFT, BOX),
    )


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("normquant.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["px"] = lambda number: f"{number:.1f}".removesuffix(".0")
    environment.filters["size"] = formatting.size
    return environment.get_template("page.html.j2")


def _kinds(shown: Compared) -> dict[str, str]:
    """The classes of launches that the page has, for its legend."""
    launches = (launch for pair in shown.reports for r in pair for p in r["programs"] for launch in p["launches"])
    used = {kind(launch) for launch in launches}
    return {name: text for name, text in CLASSES.items() if name in used}
