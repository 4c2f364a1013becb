"""The result of an audit: the program, the findings, and both as plain data."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normquant.audit import rules
from normquant.audit.findings import NOTE, Finding
from normquant.audit.program import Buffer, Kernel, Launch, Program
from normquant.audit.targets import Target


@dataclass(frozen=True)
class AuditReport:
    """What was generated for `target`, and what is wrong with it. One entry of `programs` and `source` per graph."""

    target: Target
    programs: tuple[Program, ...]
    findings: tuple[Finding, ...]
    source: str  # the generated code, all graphs
    skipped: tuple[tuple[str, str], ...] = ()  # files that could not be read, and why

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The generated kernels, one entry per launch, in order."""
        return tuple(kernel for program in self.programs for kernel in program.kernels)

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Generated kernels and opaque calls, in order."""
        return tuple(launch for program in self.programs for launch in program.launches)

    @property
    def externs(self) -> dict[str, int]:
        """Opaque calls by name: how often each is called."""
        counts: dict[str, int] = {}
        for program in self.programs:
            for extern in program.externs:
                counts[extern.name] = counts.get(extern.name, 0) + 1
        return counts

    @property
    def bytes(self) -> int:
        """DRAM bytes read and written by all launches."""
        return sum(program.bytes for program in self.programs)

    @property
    def wasted_bytes(self) -> int:
        """Bytes of all findings but notes; a launch with several findings counts once, with its largest."""
        largest: dict[tuple[int, int], int] = {}
        for finding in self.findings:
            if finding.severity != NOTE:
                key = (finding.program, finding.position)
                largest[key] = max(largest.get(key, 0), finding.bytes)
        return sum(largest.values())

    @property
    def est_us(self) -> float:
        """Estimated time of all launches on the target, us: a launch each, and their bytes at copy bandwidth."""
        return sum(launch_us(launch, self.target) for launch in self.launches)

    def count(self, rule: str) -> int:
        """How many findings a rule has."""
        return sum(finding.rule == rule for finding in self.findings)

    def to_sizes(self) -> dict[str, int]:
        """The symbolic sizes, and what they were evaluated at."""
        return {name: size for program in self.programs for name, size in program.sizes.items()}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; `to_json` is its text."""
        return {
            "target": self.target.name,
            "kernels": [_kernel_dict(kernel, self.target) for kernel in self.kernels],
            "extern": [{"name": name, "count": count} for name, count in self.externs.items()],
            "findings": [_finding_dict(finding) for finding in self.findings],
            "bytes": self.bytes,
            "wasted_bytes": self.wasted_bytes,
            "est_us": round(self.est_us, 3),
            "sizes": self.to_sizes(),
            "notes": list(dict.fromkeys(note for program in self.programs for note in program.notes)),
            "skipped": [{"file": name, "reason": reason} for name, reason in self.skipped],
            "programs": [_program_dict(n, program, self.target) for n, program in enumerate(self.programs)],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)


def launch_us(launch: Launch, target: Target) -> float:
    """Estimated time of one launch, us."""
    return target.launch_us + launch.bytes / (target.dram_gbps * 1e3)


def _program_dict(number: int, program: Program, target: Target) -> dict[str, Any]:
    """The data flow: every launch in order, the edges between them, and what they carry."""
    return {
        "number": number,
        "name": program.name,
        "bytes": program.bytes,
        "launches": [_launch_dict(launch, target) for launch in program.launches],
        "edges": [
            {"buffer": e.buffer, "from": e.producer, "to": e.consumer, "bytes": e.bytes} for e in program.edges
        ],
        "buffers": {name: _buffer_dict(program, buffer) for name, buffer in program.buffers.items()},
        "outputs": list(program.outputs),
    }  # fmt: skip


def _buffer_dict(program: Program, buffer: Buffer) -> dict[str, Any]:
    return {
        "dtype": buffer.dtype,
        "shape": list(buffer.shape),
        "stride": list(buffer.stride),
        "bytes": buffer.bytes,
        "role": program.role(buffer.name),
    }


def _launch_dict(launch: Launch, target: Target) -> dict[str, Any]:
    return {
        "position": launch.position,
        "name": launch.name,
        "kind": launch.kind if isinstance(launch, Kernel) else "extern",
        "file": launch.file,
        "line": launch.line,
        "bytes_read": launch.bytes_read,
        "bytes_written": launch.bytes_written,
        "reads": {access.buffer: access.bytes for access in launch.reads},
        "writes": {access.buffer: access.bytes for access in launch.writes},
        "est_us": round(launch_us(launch, target), 3),
        "aten": list(launch.aten),
        "origins": [{"file": o.file, "line": o.line, "code": o.code} for o in launch.origins],
    }


def _kernel_dict(kernel: Kernel, target: Target) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "kind": kernel.kind,
        "file": kernel.file,
        "bytes_read": kernel.bytes_read,
        "bytes_written": kernel.bytes_written,
        "reads": [access.buffer for access in kernel.reads],
        "writes": [access.buffer for access in kernel.writes],
        "est_us": round(launch_us(kernel, target), 3),
        "origins": [{"file": o.file, "line": o.line, "code": o.code} for o in kernel.origins],
    }


def _finding_dict(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "severity": finding.severity,
        "kernel": finding.kernel,
        "bytes": finding.bytes,
        "share": round(finding.share, 6),
        "est_us": round(finding.est_us, 3),
        "message": finding.message,
        "fix": finding.fix,
        "file": finding.file,
        "line": finding.line,
        "buffer": finding.buffer,
        "program": finding.program,
        "position": finding.position,
        "origins": [{"file": o.file, "line": o.line, "code": o.code} for o in finding.origins],
    }


def report(
    programs: Sequence[Program], source: str, target: Target, skipped: Sequence[tuple[str, str]] = ()
) -> AuditReport:
    """Check programs that belong together against every rule, with times estimated for `target`."""
    return AuditReport(target, tuple(programs), rules.check(programs, target), source, tuple(skipped))
