"""Checks as JUnit XML, which CI servers show as tests: a check that does not hold is a failed one.

The elements and their order are those of Ant's schema, which is what GitLab, Jenkins and the actions for GitHub read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

# What XML 1.0 cannot hold, not even escaped.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class JUnitCase:
    """A check. group: what it is a check of, as a test's class is. failures: why it does not hold, none if it does."""

    group: str
    name: str
    failures: Sequence[str] = ()


def render(suite: str, cases: Sequence[JUnitCase], when: str) -> str:
    """One suite of tests. when: local time, YYYY-MM-DDThh:mm:ss. Times of checks are 0: they take none."""
    failed = sum(bool(case.failures) for case in cases)
    counts = {"tests": str(len(cases)), "failures": str(failed), "errors": "0"}
    root = ElementTree.Element("testsuites")
    attributes = {"name": suite, "package": "normquant", "id": "0", "timestamp": when, "hostname": "localhost"}
    tests = _add(root, "testsuite", **attributes, **counts, time="0")
    _add(tests, "properties")
    for case in cases:
        test = _add(tests, "testcase", classname=case.group, name=case.name, time="0")
        if case.failures:
            failure = _add(test, "failure", message=case.failures[0], type="check")
            failure.text = _clean("\n".join(case.failures))
    _add(tests, "system-out")
    _add(tests, "system-err")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, {name: _clean(value) for name, value in attributes.items()})


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
