"""What is looked for in a generated program: one function per rule, each from a `Program` to findings.

Every rule has an id, a severity and a page, docs/rules/<id>.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from normquant.audit.findings import ERROR, Finding
from normquant.audit.program import COPY_LAYOUT, COPY_SAME, Copy, Kernel, Launch, Program

Draft = Iterator[Finding]


@dataclass(frozen=True)
class Rule:
    """A check: `find` yields findings whose `est_us` and `share` are filled in by `check`."""

    id: str
    severity: str
    summary: str
    find: Callable[["Rule", Program], Draft]

    def finding(self, launch: Launch, size: int, message: str, fix: str, buffer: str = "") -> Finding:
        return Finding(
            self.id, self.severity, launch.name, launch.position, size, 0.0, 0.0, message, fix, buffer,
            launch.file, launch.line, launch.origins,
        )  # fmt: skip


def check(program: Program, seconds_per_byte: float, launch_us: float) -> tuple[Finding, ...]:
    """All findings of all rules, in launch order."""
    total = program.bytes or 1
    found = [finding for rule in RULES for finding in rule.find(rule, program)]
    found.sort(key=lambda finding: (finding.position, finding.rule))
    return tuple(
        replace(f, share=f.bytes / total, est_us=f.bytes * seconds_per_byte * 1e6 + launch_us * (f.rule in _A_LAUNCH))
        for f in found
    )


def _plain_copies(program: Program, kind: str) -> Iterator[tuple[Kernel, Copy]]:
    """Kernels that move one buffer to another, and do nothing else."""
    for kernel in program.kernels:
        if kernel.is_copy and len(kernel.copies) == 1 and kernel.copies[0].kind == kind:
            copy = kernel.copies[0]
            if copy.dtypes[0] == copy.dtypes[-1] and kernel.bytes:
                yield kernel, copy


def _role(program: Program, name: str) -> str:
    buffer = program.buffers.get(name)
    return buffer.role if buffer else "intermediate"


def _casts(copy: Copy) -> str:
    ways = [dtype for index, dtype in enumerate(copy.dtypes) if index == 0 or dtype != copy.dtypes[index - 1]]
    return f", through {' -> '.join(ways)}" if len(ways) > 1 else ""


def _identity(rule: Rule, program: Program) -> Draft:
    for kernel, copy in _plain_copies(program, COPY_SAME):
        if _role(program, copy.destination) == "output" and _role(program, copy.source) in ("input", "output"):
            continue  # two results that must not share memory: the program asked for this copy
        if _role(program, copy.destination) == "input":
            continue  # an update of an input
        yield rule.finding(
            kernel,
            kernel.bytes,
            f"copies {copy.source} to {copy.destination} unchanged{_casts(copy)}",
            "let the consumer read the source: make the op before it functional, or run the no-op removal passes after "
            "your own graph pass",
            copy.destination,
        )


def _layout_copy(rule: Rule, program: Program) -> Draft:
    for kernel, copy in _plain_copies(program, COPY_LAYOUT):
        yield rule.finding(
            kernel,
            kernel.bytes,
            f"only changes the layout of {copy.source} into {copy.destination}{_casts(copy)}",
            "write the wanted strides in the producer, or let the consumer take any strides (torch.Tag.flexible_layout)",
            copy.destination,
        )


RULES: tuple[Rule, ...] = (
    Rule("identity", ERROR, "a kernel that copies a buffer unchanged", _identity),
    Rule("layout-copy", ERROR, "a kernel that only changes a buffer's layout", _layout_copy),
)
_A_LAUNCH = frozenset({"identity", "layout-copy", "mutated-input-copy"})  # without them there is a launch less
