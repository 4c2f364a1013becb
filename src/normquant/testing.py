"""For a model's own tests: assert what the compiler generates for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normquant.audit import AuditReport, audit, expectations


def assert_generated(
    fn: Callable[..., Any],
    make_inputs: Callable[[], Any] | tuple[Any, ...] | Mapping[str, Any] | Any,
    *,
    expect: Mapping[str, int] | None = None,
    forbid: Sequence[str] = ("identity", "layout-copy"),
    max_bytes: int | None = None,
    target: str = "h100",
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> AuditReport:
    """Compile `fn` for `target`, which need not be present, and assert what was generated. Returns the report.

    Args:
        fn, make_inputs, target, options, dynamic: as for `normquant.audit`.
        expect: launches by name, e.g. {"mm": 3, "kernels": 5}: an operator with or without its namespace,
            a generated kernel, a pattern with * and ?, or "kernels" for all generated kernels.
        forbid: ids of rules that must find nothing.
        max_bytes: the most bytes that may be read from and written to DRAM.

    Raises:
        AssertionError: lists every expectation that does not hold, and every launch.
        ValueError: an unknown rule, target or option.
    """
    expectations.check_rules(forbid)
    report = audit(fn, make_inputs, target, options, dynamic)
    broken = expectations.broken([report], forbid, expect, max_bytes)
    if broken:
        launches = (f"  {n.name}: reads {n.bytes_read}, writes {n.bytes_written} bytes" for n in report.launches)
        raise AssertionError("\n".join([*broken, "launched:", *launches]))
    return report
