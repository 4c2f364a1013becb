"""Programs for the tests of rules: graphs around opaque operators, and programs made by hand."""

from __future__ import annotations

from typing import Any

import torch
from shared.clean_graphs import empty

from normquant.audit import AuditReport, rules
from normquant.audit.program import COPY_SAME, Access, Buffer, Copy, Kernel, Program, ProgramLaunch
from normquant.audit.targets import TARGETS

M, K = 64, 1024


def attend(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.opaque_ops.attend(x)


def rows() -> tuple[torch.Tensor, ...]:
    return (empty(M, K),)


def found(report: AuditReport, rule: str) -> list[tuple[str, int]]:
    return [(finding.kernel, finding.bytes) for finding in report.findings if finding.rule == rule]


def buffer(name: str, dtype: str = "bfloat16", role: str = "intermediate") -> Buffer:
    size = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}[dtype]
    return Buffer(name, dtype, (str(M), str(K)), (str(K), "1"), M * K * size, role, name)


def program(*launches: ProgramLaunch, outputs: tuple[str, ...] = ("out",), **dtypes: str) -> Program:
    names = {a.buffer for launch in launches for a in (*launch.reads, *launch.writes)}
    buffers = {n: buffer(n, dtypes.get(n, "bfloat16"), "input" if n.startswith("x") else "intermediate") for n in names}
    return Program(launches, buffers, outputs)


def kernel(position: int, reads: dict[str, int], writes: dict[str, int], **more: Any) -> Kernel:
    accesses = [tuple(Access(name, size) for name, size in side.items()) for side in (reads, writes)]
    return Kernel(position, f"triton_{position}", *accesses, rows="s0", **more)


def cast(position: int, source: str, target: str, dtypes: tuple[str, ...], sizes: tuple[int, int]) -> Kernel:
    copy = Copy(source, target, COPY_SAME, dtypes)
    return kernel(position, {source: sizes[0]}, {target: sizes[1]}, copies=(copy,), is_copy=True)


def check(*programs: Program) -> dict[str, list[tuple[str, int]]]:
    by_rule: dict[str, list[tuple[str, int]]] = {}
    for finding in rules.check(programs, TARGETS["h100"]):
        by_rule.setdefault(finding.rule, []).append((finding.kernel, finding.bytes))
    return by_rule
