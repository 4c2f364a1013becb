"""What a rule reports."""

from dataclasses import dataclass

from normquant.audit.program import Launch, Origin

ERROR = "error"  # a kernel that need not exist, or numbers that are not those asked for
WARNING = "warning"  # bytes or launches that another compile would not spend
NOTE = "note"  # worth knowing; its bytes may come from a cache, and are not counted as wasted


@dataclass(frozen=True)
class Draft:
    """What a rule's function yields: the launch, the bytes and launches that go away, and what to do."""

    launch: Launch
    bytes: int
    message: str
    fix: str
    buffer: str = ""
    launches: int = 0


@dataclass(frozen=True)
class Finding:
    """One thing that the generated program does and need not do.

    `bytes` is the DRAM traffic that goes away with it, `share` that traffic over its program's, `est_us` the time that
    goes away on the target. `program` and `position` say which launch it is about.
    """

    rule: str
    severity: str
    kernel: str
    position: int
    bytes: int
    est_us: float
    share: float
    message: str
    fix: str
    buffer: str = ""
    file: str = ""
    line: int = 0
    origins: tuple[Origin, ...] = ()
    program: int = 0
