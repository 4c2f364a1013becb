"""Findings as workflow commands that GitHub shows on a pull request.

The form is documented at docs.github.com, "Workflow commands for GitHub Actions".
"""

from collections.abc import Mapping, Sequence
from typing import Any

_LEVELS = {"error": "error", "warning": "warning", "note": "notice"}


def github(reports: Sequence[Mapping[str, Any]]) -> str:
    """One line per finding, at the user's own source line where it is known."""
    lines = []
    for finding in (finding for report in reports for finding in report["findings"]):
        place = finding["origins"][0] if finding["origins"] else finding
        where = {"file": place["file"], "line": place["line"], "title": f"{finding['rule']}: {finding['kernel']}"}
        properties = ",".join(f"{name}={_property(str(value))}" for name, value in where.items() if value)
        lines.append(
            f"::{_LEVELS[finding['severity']]} {properties}::{_data(finding['message'] + '. Fix: ' + finding['fix'])}"
        )
    return "\n".join(dict.fromkeys(lines))


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
