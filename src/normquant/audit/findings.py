"""What a rule reports."""

from dataclasses import dataclass

from normquant.audit.program import Origin

ERROR = "error"  # the kernel need not exist, or the numbers are wrong
WARNING = "warning"  # bytes or launches that another compile would not spend
NOTE = "note"  # worth knowing; often not to be had


@dataclass(frozen=True)
class Finding:
    """One thing that the generated program does and need not do.

    `bytes` is the DRAM traffic that goes away with it, `share` that traffic over the whole program's, `est_us` its
    estimated time on the target.
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
