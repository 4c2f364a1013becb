"""What the compile pass did: every site of every compiled graph, fused or not, and why."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from normquant.spec import QuantSpec

log = logging.getLogger("normquant")
KEPT = 256  # reports of the graphs compiled last


@dataclass(frozen=True)
class Site:
    """One site: a norm and its quantizations, or another part of the graph that a fusion knows.

    name: where it is in the model, e.g. "layers.3.input_layernorm". where: "file:line" of the quantization's input.
    strategy: "fused", "native" or "stock". reason: why.
    op: the op of the site after a fusion, else "". spec: the encoded QuantSpec, "" where it could not be read.
    m, k: rows (as text, since it may be symbolic) and columns; dtype: of the activation.
    bytes_moved: the least DRAM bytes that the site can move, which one kernel does, for the sizes seen while compiling.
    bytes_saved: against a norm kernel and one more for each quantization; kernels_saved: launches.
    """

    name: str
    where: str
    strategy: str
    reason: str
    op: str = ""
    spec: str = ""
    m: str = "?"
    k: int = 0
    dtype: str = ""
    bytes_moved: int = 0
    bytes_saved: int = 0
    kernels_saved: int = 0

    @property
    def fused(self) -> bool:
        """Whether the site is one fused kernel now."""
        return self.strategy == "fused"

    def __str__(self) -> str:
        shape = f" [{self.m}, {self.k}] {self.dtype}" if self.k else ""
        what = f" {op_text(self.op, self.spec)}" if self.op else ""
        saves = self.kernels_saved or self.bytes_saved
        saved = f"; saves {self.kernels_saved} kernels, {self.bytes_saved:,} bytes" if saves else ""
        return f"{self.strategy:<6} {self.name}{shape}{what}: {self.reason}{saved} ({self.where})"


@dataclass(frozen=True)
class FusionReport:
    """One graph: its sites; others, the quantizations that have no norm in front of them and all-reduces that stay.

    graph: number of the graph in this process. error: why a part of the pass, or all of it, was given up, else "".
    cleaned: identities and copies that the pass removed.
    """

    graph: int
    policy: str
    sites: tuple[Site, ...]
    others: tuple[Site, ...] = ()
    cleaned: int = 0
    error: str = ""

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    @property
    def fused(self) -> tuple[Site, ...]:
        """The sites that are one fused kernel now."""
        return tuple(site for site in self.sites if site.fused)

    @property
    def bytes_saved(self) -> int:
        return sum(site.bytes_saved for site in self.sites)

    @property
    def kernels_saved(self) -> int:
        return sum(site.kernels_saved for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data; each site with `fused` beside its fields."""
        record = asdict(self)
        for kind in ("sites", "others"):
            record[kind] = [asdict(site) | {"fused": site.fused} for site in getattr(self, kind)]
        return record

    def __str__(self) -> str:
        fused = f"{len(self.fused)} of {len(self.sites)} norm -> quant sites fused"
        lines = [f"graph {self.graph}: {fused} (policy {self.policy})"]
        if self.error:
            rewritten = any(site.strategy != "stock" for site in (*self.sites, *self.others))
            lines.append(f"  {'a part of the pass failed' if rewritten else 'compiled as it was'}: {self.error}")
        lines += [f"  {site}" for site in self.sites]
        lines += [f"  {site.strategy:<6} {site.name}: {site.reason} ({site.where})" for site in self.others]
        return "\n".join(lines)


def op_text(op: str, encoded: str) -> str:
    """An op and its spec as a person would write them: only what differs from the default spec."""
    try:
        spec, default = QuantSpec.decode(encoded), QuantSpec()
    except ValueError:  # a record of another version
        return f"{op}({encoded})"
    given = [(f.name, getattr(spec, f.name)) for f in fields(spec) if getattr(spec, f.name) != getattr(default, f.name)]
    return f"{op}({', '.join(f'{name}={choice}' for name, choice in given)})"


_reports: list[FusionReport] = []
_lock = threading.Lock()
_count = 0


def add(report: FusionReport) -> FusionReport:
    """Number a report, keep it, and log it at INFO."""
    global _count
    with _lock:
        _count += 1
        report = replace(report, graph=_count)
        _reports.append(report)
        del _reports[:-KEPT]
    log.info("%s", report)
    return report


def reports() -> tuple[FusionReport, ...]:
    """The reports of the graphs compiled in this process, oldest first; the last 256."""
    with _lock:
        return tuple(_reports)


def last_report() -> FusionReport | None:
    """The report of the graph compiled last that has a norm or a quantization in it; None when there is none."""
    return next((r for r in reversed(reports()) if r.sites or r.others or r.error), None)


def clear() -> None:
    """Forget all reports."""
    with _lock:
        _reports.clear()


def explain() -> str:
    """All reports as text: what fused, what did not, and why. A graph loaded from a compile cache has no report."""
    found = [r for r in reports() if r.sites or r.others or r.error]
    if not found:
        return (
            "normquant: no graph with a quantization was compiled in this process. A graph from the compile cache has "
            "no report; TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 compiles it anew"
        )
    return "\n".join(str(report) for report in found)
