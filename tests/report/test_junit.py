"""JUnit XML: the elements and attributes that CI servers read."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from normquant.report import junit
from normquant.report.junit import JUnitCase

CASES = [
    JUnitCase("layer", "no identity"),
    JUnitCase("layer", "3 of <mm>", ["2 & \x1b[31m\ud800 of them", "at s0 = 1"]),
]


@pytest.mark.parametrize("cases", [[], CASES])
def test_a_suite_says_what_is_in_it(cases: list[JUnitCase]) -> None:
    root = ElementTree.fromstring(junit.render("normquant audit", cases, "2026-11-26T16:00:00"))
    (suite,) = root
    assert (root.tag, suite.tag) == ("testsuites", "testsuite")
    assert suite.get("name") == "normquant audit" and suite.get("timestamp") == "2026-11-26T16:00:00"
    assert int(suite.get("tests", "")) == len(suite.findall("testcase")) == len(cases)
    assert {"hostname", "time", "errors", "failures"} <= set(suite.keys())
    assert all({"classname", "name", "time"} <= set(case.keys()) for case in suite.findall("testcase"))


def test_a_check_that_does_not_hold_is_a_failed_test() -> None:
    suite = ElementTree.fromstring(junit.render("suite", CASES, "2026-11-26T16:00:00")).find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    holds, fails = suite.findall("testcase")
    assert holds.find("failure") is None and fails.get("name") == "3 of <mm>"
    failure = fails.find("failure")
    assert failure is not None and failure.text == "2 & \ufffd[31m\ufffd of them\nat s0 = 1"
    assert failure.get("message") == "2 & \ufffd[31m\ufffd of them"
