"""An audit in SARIF 2.1.0, which code scanning of GitHub and others shows beside the lines that findings come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

Report = Mapping[str, Any]
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
ROOT = "%SRCROOT%"  # the checkout, where it is for those who read the file


def render(reports: Sequence[Report], rules: Sequence[Mapping[str, str]], version: str, root: Path) -> str:
    """The findings of all reports, each once.

    rules: id, severity and description of each. version: of this package. root: of the checkout, an absolute path;
    files in it are named relative to it.
    """
    position = {rule["id"]: number for number, rule in enumerate(rules)}
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        for finding in report["findings"]:
            one = _result(finding, position[finding["rule"]], root)
            found.setdefault(json.dumps([one["message"], one["locations"]]), one)
    driver = {"name": "normquant", "semanticVersion": version, "rules": [_rule(rule) for rule in rules]}
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": "normquant/"},
        "columnKind": "unicodeCodePoints",
        "results": list(found.values()),
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(rule: Mapping[str, str]) -> dict[str, Any]:
    return {
        "id": rule["id"],
        "shortDescription": {"text": rule["description"]},
        "defaultConfiguration": {"level": rule["severity"]},
    }


def _result(finding: Mapping[str, Any], number: int, root: Path) -> dict[str, Any]:
    """A finding, at the user's line where it is known, else at that of the generated code."""
    generated = _location(finding, root) | {"message": {"text": "the generated code"}}
    origins = [_location(origin, root) for origin in finding["origins"]]
    where, *others = [*origins, generated]
    where = {key: what for key, what in where.items() if key != "message"}
    where["logicalLocations"] = [{"name": finding["kernel"], "kind": "function"}]
    identity = json.dumps([finding["rule"], finding["kernel"], finding["buffer"], where["physicalLocation"]])
    return {
        "ruleId": finding["rule"],
        "ruleIndex": number,
        "level": finding["severity"],
        "message": {"text": f"{finding['kernel']}: {finding['message']}. Fix: {finding['fix']}"},
        "locations": [where],
        "relatedLocations": others,
        "partialFingerprints": {"normquant/v1": hashlib.sha256(identity.encode()).hexdigest()},
        "properties": {name: finding[name] for name in ("bytes", "share", "est_us")},
    }


def _location(place: Mapping[str, Any], root: Path) -> dict[str, Any]:
    path = Path(place["file"])
    absolute = path if path.is_absolute() else root / path
    if absolute.is_relative_to(root):
        artifact = {"uri": quote(absolute.relative_to(root).as_posix()), "uriBaseId": ROOT}
    else:
        artifact = {"uri": absolute.as_uri()}
    region = {"region": {"startLine": place["line"]}} if place["line"] > 0 else {}
    return {"physicalLocation": {"artifactLocation": artifact, **region}}
