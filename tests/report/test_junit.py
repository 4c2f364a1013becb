"""JUnit XML, held against the schema of Ant's JUnit task, which is in fixtures/junit.xsd (Apache-2.0, Windy Road)."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import xmlschema

from normquant.report import junit
from normquant.report.junit import JUnitCase

XSD = xmlschema.XMLSchema(Path(__file__).parent / "fixtures" / "junit.xsd")
CASES = [
    JUnitCase("layer", "no identity"),
    JUnitCase("layer", "3 of <mm>", ["2 & \x1b[31m\ud800 of them", "at s0 = 1"]),
]


def test_the_schema_holds() -> None:
    for cases in ([], CASES):
        XSD.validate(junit.render("normquant audit", cases, "2026-11-26T16:00:00"))
    assert not XSD.is_valid("<testsuites><testsuite/></testsuites>")


def test_a_check_that_does_not_hold_is_a_failed_test() -> None:
    suite = ElementTree.fromstring(junit.render("suite", CASES, "2026-11-26T16:00:00")).find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    holds, fails = suite.findall("testcase")
    assert holds.find("failure") is None and fails.get("name") == "3 of <mm>"
    failure = fails.find("failure")
    assert failure is not None and failure.text == "2 & \ufffd[31m\ufffd of them\nat s0 = 1"
    assert failure.get("message") == "2 & \ufffd[31m\ufffd of them"
