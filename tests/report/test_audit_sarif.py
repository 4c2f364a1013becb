"""SARIF 2.1.0: what the standard asks of the objects that are written, and where findings are shown."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from shared.generated_code import ON

from normquant.audit import audit_path
from normquant.audit.rules import RULES
from normquant.report import audit_sarif


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*required], "properties": properties, "additionalProperties": False}


def _list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


# Of the standard: what the objects must have, and the properties of theirs that are written here.
TEXT, WHOLE = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
MESSAGE = _object(("text",), text=TEXT)
ARTIFACT = _object((), uri={"type": "string", "format": "uri-reference"}, uriBaseId=TEXT)
REGION = _object((), startLine={"type": "integer", "minimum": 1})
PHYSICAL = _object(("artifactLocation",), artifactLocation=ARTIFACT, region=REGION)
LOGICAL = _object((), name=TEXT, kind=TEXT)
LOCATION = _object((), physicalLocation=PHYSICAL, logicalLocations=_list_of(LOGICAL), message=MESSAGE)
RESULT = _object(
    ("message",), ruleId=TEXT, ruleIndex=WHOLE, level=LEVEL, message=MESSAGE, locations=_list_of(LOCATION),
    relatedLocations=_list_of(LOCATION), properties={"type": "object"},
    partialFingerprints={"type": "object", "additionalProperties": TEXT},
)  # fmt: skip
RULE = _object(("id",), id=TEXT, shortDescription=MESSAGE, defaultConfiguration=_object((), level=LEVEL))
DRIVER = _object(("name",), name=TEXT, semanticVersion=TEXT, rules=_list_of(RULE))
RUN = _object(
    ("tool",), tool=_object(("driver",), driver=DRIVER), results=_list_of(RESULT),
    automationDetails=_object((), id=TEXT),
    columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
)  # fmt: skip
SCHEMA = _object(("version", "runs"), **{"$schema": TEXT}, version={"const": "2.1.0"}, runs=_list_of(RUN))
RULE_DATA = [{"id": rule.id, "severity": rule.severity, "description": "what it finds"} for rule in RULES]
HOME = Path("/checkout")


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return [report.to_dict() for report in audit_path(ON, rows=(1, 64))]


def sarif(reports: list[dict[str, Any]], root: Path = HOME) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(audit_sarif.render(reports, RULE_DATA, "0.1.0", root))
    jsonschema.validate(made, SCHEMA)
    return made["runs"][0]


def placed(reports: list[dict[str, Any]], *origins: dict[str, Any]) -> list[dict[str, Any]]:
    """One finding, with these origins."""
    report = copy.deepcopy(reports[0])
    report["findings"] = [report["findings"][0] | {"origins": list(origins)}]
    return [report]


def test_every_finding_is_there_once(reports: list[dict[str, Any]]) -> None:
    run = sarif(reports)
    found = {(f["rule"], f["file"], f["line"], f["kernel"]) for report in reports for f in report["findings"]}
    assert len(found) > 5 and len(run["results"]) == len(found)
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.id for rule in RULES]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] == rules[result["ruleIndex"]]["defaultConfiguration"]["level"]
        assert "Fix: " in result["message"]["text"]
    prints = [result["partialFingerprints"]["normquant/v1"] for result in run["results"]]
    assert len(set(prints)) == len(prints)


def test_nothing_found_is_a_run_without_results(reports: list[dict[str, Any]]) -> None:
    assert sarif([reports[0] | {"findings": []}])["results"] == []


def test_a_finding_is_at_the_user_s_line_relative_to_the_checkout(reports: list[dict[str, Any]]) -> None:
    origins = {"file": "/checkout/my model.py", "line": 12, "code": "y = norm(x)"}, {"file": "/lib/nn.py", "line": 3}
    (result,) = sarif(placed(reports, *origins))["results"]
    (location,) = result["locations"]
    assert location["physicalLocation"] == {
        "artifactLocation": {"uri": "my%20model.py", "uriBaseId": "%SRCROOT%"},
        "region": {"startLine": 12},
    }
    assert location["logicalLocations"] == [{"name": reports[0]["findings"][0]["kernel"], "kind": "function"}]
    related = [one["physicalLocation"]["artifactLocation"]["uri"] for one in result["relatedLocations"]]
    assert related[0] == "file:///lib/nn.py" and related[1].endswith("fuse_norm_quant_on_layer.py")


def test_without_a_known_line_it_is_that_of_the_generated_code(reports: list[dict[str, Any]]) -> None:
    (result,) = sarif(placed(reports), root=Path(ON).parent)["results"]
    artifact = result["locations"][0]["physicalLocation"]
    assert artifact["artifactLocation"]["uri"] == Path(ON).name
    assert artifact["region"]["startLine"] == reports[0]["findings"][0]["line"] > 0
    assert result["relatedLocations"] == []


def test_a_graph_that_is_in_no_file_has_a_name_and_no_line(reports: list[dict[str, Any]]) -> None:
    (report,) = placed(reports)
    report["findings"][0].update(file="graph 0", line=0)
    (result,) = sarif([report])["results"]
    assert result["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "graph%200", "uriBaseId": "%SRCROOT%"}
    }
