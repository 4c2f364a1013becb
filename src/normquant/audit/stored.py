"""Audits that were stored as JSON, read back: for a comparison with what the same code gave earlier."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normquant.audit.program import Access, Buffer, Extern, Kernel, Origin, Program, ProgramLaunch
from normquant.audit.result import SCHEMA_VERSION, AuditReport, Finding
from normquant.audit.source.code_files import Unusable
from normquant.audit.targets import TARGETS, Target

NEEDED = ("target", "kernels", "extern", "findings", "bytes", "wasted_bytes", "est_us", "sizes", "notes", "skipped")
_BEGINS = (b"[", b"{")


@dataclass(frozen=True)
class StoredReport(AuditReport):
    """A report as it was stored: the launches and findings as objects, and the data as it came."""

    data: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)


def is_stored(path: str) -> bool:
    """Whether a file is the JSON of an audit, by its content: it has `programs` or `findings`."""
    try:
        with Path(path).open("rb") as file:
            if file.read(1) not in _BEGINS:
                return False
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    first = found[0] if isinstance(found, list) and found else found
    return isinstance(first, dict) and ("programs" in first or "findings" in first)


def read(path: str) -> list[AuditReport]:
    """The reports of a file that `normquant audit --json` wrote, one for each set of sizes.

    Raises Unusable for a file that is none, naming what is missing.
    """
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        return [_report(data) for data in (found if isinstance(found, list) else [found])]
    except KeyError as error:
        raise Unusable(f"{path}: not a whole audit: it lacks {error}") from None
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise Unusable(f"{path}: not a whole audit ({error})") from None


def _report(data: Mapping[str, Any]) -> AuditReport:
    if data.get("schema_version", 1) != SCHEMA_VERSION:  # which the first ones do not say
        raise ValueError(f"its schema_version is {data['schema_version']}; {SCHEMA_VERSION} is read")
    for name in NEEDED:
        data[name]
    if not all(isinstance(note, str) for note in data["notes"]):
        raise TypeError("its notes are not text")
    for one in data["extern"]:
        int(one["count"])
    programs = [_program(program, data["sizes"]) for program in data["programs"]]
    findings = [Finding(**{**f, "origins": tuple(Origin(**o) for o in f["origins"])}) for f in data["findings"]]
    for finding in findings:
        known = 0 <= finding.program < len(programs)
        if not known or not 0 <= finding.position < len(programs[finding.program].launches):
            raise IndexError(f"a finding at launch {finding.position} of program {finding.program}")
    skipped = tuple((one["file"], one["reason"]) for one in data["skipped"])
    return StoredReport(_target(data["target"]), tuple(programs), tuple(findings), "", skipped, data)


def _target(name: str) -> Target:
    """The target of that name; one that was the machine of then has only its name."""
    return TARGETS.get(name) or dataclasses.replace(TARGETS["h100"], name=name)


def _program(data: Mapping[str, Any], sizes: Mapping[str, int]) -> Program:
    launches = tuple(_launch(launch) for launch in data["launches"])
    for edge in data["edges"]:
        if not (0 <= edge["to"] < len(launches) and 0 <= (edge["from"] or 0) < len(launches)):
            raise IndexError(f"an edge from {edge['from']} to {edge['to']}")
        int(edge["bytes"])
    buffers = {
        name: Buffer(name, b["dtype"], tuple(b["shape"]), tuple(b["stride"]), b["bytes"], b["role"])
        for name, b in data["buffers"].items()
    }
    return Program(launches, buffers, tuple(data["outputs"]), dict(sizes), data["name"])


def _launch(data: Mapping[str, Any]) -> ProgramLaunch:
    common: dict[str, Any] = {
        "position": data["position"],
        "name": data["name"],
        "reads": tuple(Access(name, int(count)) for name, count in data["reads"].items()),
        "writes": tuple(Access(name, int(count)) for name, count in data["writes"].items()),
        "file": data["file"],
        "line": data["line"],
        "code": data.get("code", ""),  # which earlier versions did not store
        "origins": tuple(Origin(**origin) for origin in data["origins"]),
        "aten": tuple(data["aten"]),
    }
    float(data["est_us"])
    if not isinstance(data["kind"], str):
        raise TypeError(f"a launch is of kind {data['kind']!r}")
    return Extern(**common) if data["kind"] == "extern" else Kernel(**common, kind=data["kind"])
