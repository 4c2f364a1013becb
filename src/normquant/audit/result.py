"""The result of an audit: the programs, the findings, and both as plain data."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from normquant.audit.program import Buffer, Kernel, Origin, Program, ProgramLaunch
from normquant.audit.targets import Target

ERROR = "error"  # a kernel that need not exist, or numbers other than those asked for
WARNING = "warning"  # bytes or launches that another compile would not spend
SCHEMA_VERSION = 1  # of `AuditReport.to_dict`, as audit.schema.json has it: the next where a field goes or changes
NOTE = "note"  # worth knowing; its bytes may come from a cache, and are not counted as wasted


@dataclass(frozen=True)
class Draft:
    """What a rule's function yields: the launch, the bytes and launches that can be saved, and what to do."""

    launch: ProgramLaunch
    bytes: int
    message: str
    fix: str
    buffer: str = ""
    launches: int = 0


@dataclass(frozen=True)
class Finding:
    """Something that the generated program does and need not do. The fields are the keys in JSON.

    `bytes` is the DRAM traffic that can be saved, `share` its part of the program's traffic, `est_us` the time that can
    be saved on the target. `program` and `position` identify the launch.
    """

    rule: str
    severity: str
    kernel: str
    bytes: int
    share: float
    est_us: float
    message: str
    fix: str
    file: str
    line: int
    buffer: str
    program: int
    position: int
    origins: tuple[Origin, ...]


@dataclass(frozen=True)
class AuditReport:
    """What was generated for `target`, and what is wrong with it. `programs` has one entry per graph."""

    target: Target
    programs: tuple[Program, ...]
    findings: tuple[Finding, ...]
    source: str  # the generated code of all graphs
    skipped: tuple[tuple[str, str], ...] = ()  # files that could not be read, and why

    def __str__(self) -> str:
        from normquant.report import audit_text

        return audit_text.one(self.to_dict(), "generated code")

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The generated kernels, one entry per launch, in program order."""
        return tuple(kernel for program in self.programs for kernel in program.kernels)

    @property
    def launches(self) -> tuple[ProgramLaunch, ...]:
        """Generated kernels and opaque calls, in program order."""
        return tuple(launch for program in self.programs for launch in program.launches)

    @property
    def externs(self) -> dict[str, int]:
        """How often each opaque operator is called, by name."""
        return dict(Counter(extern.name for program in self.programs for extern in program.externs))

    @property
    def bytes(self) -> int:
        """DRAM bytes read and written by all launches."""
        return sum(program.bytes for program in self.programs)

    @property
    def wasted_bytes(self) -> int:
        """Bytes of all findings except notes; a launch with several findings counts once, with the largest."""
        largest: dict[tuple[int, int], int] = {}
        for finding in self.findings:
            if finding.severity != NOTE:
                key = (finding.program, finding.position)
                largest[key] = max(largest.get(key, 0), finding.bytes)
        return sum(largest.values())

    @property
    def est_us(self) -> float:
        """Estimated time of all launches on the target, us: the launch overhead, and the bytes at copy bandwidth."""
        return sum(launch_us(launch, self.target) for launch in self.launches)

    def count(self, rule: str) -> int:
        """How many findings a rule has."""
        return sum(finding.rule == rule for finding in self.findings)

    def to_sizes(self) -> dict[str, int]:
        """The symbolic sizes, and the values that they were evaluated at."""
        return {name: size for program in self.programs for name, size in program.sizes.items()}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; `to_json` is its text."""
        return {
            "schema_version": SCHEMA_VERSION,
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


def launch_us(launch: ProgramLaunch, target: Target) -> float:
    """Estimated time of one launch, us."""
    return target.launch_us + launch.bytes / (target.dram_gbps * 1e3)


def _program_dict(number: int, program: Program, target: Target) -> dict[str, Any]:
    """The data flow: every launch in order, the edges between them, and what they carry."""
    edges = [{"buffer": e.buffer, "from": e.producer, "to": e.consumer, "bytes": e.bytes} for e in program.edges]
    return {
        "number": number,
        "name": program.name,
        "bytes": program.bytes,
        "launches": [_launch_dict(launch, target) for launch in program.launches],
        "edges": edges,
        "buffers": {name: _buffer_dict(program, buffer) for name, buffer in program.buffers.items()},
        "outputs": list(program.outputs),
    }


def _buffer_dict(program: Program, buffer: Buffer) -> dict[str, Any]:
    return {
        "dtype": buffer.dtype,
        "shape": list(buffer.shape),
        "stride": list(buffer.stride),
        "bytes": buffer.bytes,
        "role": program.role(buffer.name),
    }


def _launch_dict(launch: ProgramLaunch, target: Target) -> dict[str, Any]:
    return {
        "position": launch.position,
        "name": launch.name,
        "kind": launch.kind if isinstance(launch, Kernel) else "extern",
        "file": launch.file,
        "line": launch.line,
        "code": launch.code,
        "bytes_read": launch.bytes_read,
        "bytes_written": launch.bytes_written,
        "reads": {access.buffer: access.bytes for access in launch.reads},
        "writes": {access.buffer: access.bytes for access in launch.writes},
        "est_us": round(launch_us(launch, target), 3),
        "aten": list(launch.aten),
        "origins": [asdict(origin) for origin in launch.origins],
    }


_KERNEL_KEYS = ("name", "kind", "file", "bytes_read", "bytes_written", "reads", "writes", "est_us", "origins")


def _kernel_dict(kernel: Kernel, target: Target) -> dict[str, Any]:
    """A kernel in the report's own list: buffers by name, without their bytes."""
    launch = _launch_dict(kernel, target)
    launch.update(reads=[access.buffer for access in kernel.reads], writes=[access.buffer for access in kernel.writes])
    return {key: launch[key] for key in _KERNEL_KEYS}


def _finding_dict(finding: Finding) -> dict[str, Any]:
    data = asdict(finding)
    data.update(share=round(finding.share, 6), est_us=round(finding.est_us, 3), origins=list(data["origins"]))
    return data
