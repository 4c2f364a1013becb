"""The launches of a report in the order in which they run, over all its programs, and what they pass to each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normquant.report.audit_text import Report

PRODUCT = "product"
GENERATED = ("pointwise", "reduction", "template")
# class of a launch -> how it is called; the page has a colour for each
CLASSES = {
    PRODUCT: "matrix product",
    "attention": "attention",
    "pointwise": "generated, pointwise",
    "reduction": "generated, with a reduction",
    "template": "template or own Triton kernel",
    "fused": "norm or quantization op",
    "opaque": "other opaque call",
}
# Of an opaque call, by the part of its name behind the namespace; the first that is found holds.
_BY_NAME = (
    ("attention", re.compile(r"attention|attn|sdpa|flash_mla|mla_")),
    (PRODUCT, re.compile(r"mm(?![a-z])|gemm|matmul|linear|einsum|conv(?!ert)|moe|expert")),
    ("fused", re.compile(r"norm|quant")),
)
_NUMBER = re.compile(r"_\d+$")


@dataclass(frozen=True)
class Step:
    """One launch: `data` is that of the report; `first` says that it begins its program."""

    program: Mapping[str, Any]
    data: Mapping[str, Any]
    findings: tuple[Mapping[str, Any], ...]
    kind: str  # a key of CLASSES
    first: bool

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes read and written."""
        return self.data["bytes_read"], self.data["bytes_written"]

    @property
    def origin(self) -> tuple[str, ...]:
        """What it computes, whatever the compiler calls it: equal for the same launch of two compiles."""
        name = str(self.data["name"])
        if self.data["kind"] == "extern":
            return ("extern", name)
        return (self.kind, *(self.data["aten"] or (_NUMBER.sub("", name),)))


@dataclass(frozen=True)
class Passed:
    """Bytes of a buffer that one step reads: `source` wrote them, or None where they come from outside."""

    source: int | None
    target: int
    buffer: str
    bytes: int


@dataclass(frozen=True)
class Timeline:
    """A report's launches, numbered over all programs, and the edges between them."""

    report: Report
    steps: tuple[Step, ...]
    passed: tuple[Passed, ...]


def timeline(report: Report) -> Timeline:
    """All programs, one after the other."""
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for finding in report["findings"]:
        found.setdefault((finding["program"], finding["position"]), []).append(finding)
    steps: list[Step] = []
    passed: dict[tuple[int | None, int, str], int] = {}
    for program in report["programs"]:
        start = len(steps)
        for n, launch in enumerate(program["launches"]):
            here = tuple(found.get((program["number"], launch["position"]), ()))
            steps.append(Step(program, launch, here, kind(launch), n == 0))
        for edge in program["edges"]:
            source = None if edge["from"] is None else start + edge["from"]
            key = (source, start + edge["to"], edge["buffer"])
            passed[key] = passed.get(key, 0) + edge["bytes"]
    edges = tuple(Passed(*key, count) for key, count in passed.items() if key[0] != key[1])
    return Timeline(report, tuple(steps), edges)


def kind(launch: Mapping[str, Any]) -> str:
    """The class of a launch: Inductor's kind of a generated kernel, the name of an opaque call."""
    if launch["kind"] == "extern":
        name = str(launch["name"]).rpartition(".")[2]
        return next((known for known, pattern in _BY_NAME if pattern.search(name)), "opaque")
    if "reduction" in launch["kind"] or launch["kind"] == "split_scan":
        return "reduction"
    return "pointwise" if launch["kind"] in ("pointwise", "foreach") else "template"


def returned(step: Step) -> Sequence[str]:
    """The buffers of a step that its program returns."""
    outputs = set(step.program["outputs"])
    return [name for name in step.data["writes"] if name in outputs]
