"""Say, per type of layer, what normquant fused in vLLM, in compiled graphs or without, and what not, and why.

Reads what the plugin wrote beside vLLM's compile cache; neither vLLM nor a GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normquant.cli.terminal import wrapped
from normquant.report.formatting import count

if TYPE_CHECKING:  # what imports torch is imported where records are read
    from normquant.vllm.graph_records import GraphRecord

SHARED = "Layers whose graph is the same share one compiled graph; it is listed once, under the first of them."
BELOW = " " * 9  # before what belongs to a site
INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", type=Path, help="a compile cache of vLLM, or a folder of them (default: vLLM's own)"
    )
    parser.add_argument("--all", action="store_true", help="every cache under the path, not only the one written last")
    parser.add_argument("--json", action="store_true", help="the records as they are, one JSON line for each graph")


def run(args: argparse.Namespace) -> int:
    from normquant.vllm.graph_records import FILE, find

    root = args.path or default_root(os.environ)
    if not root.exists():
        raise ValueError(f"{root} does not exist; give the compile cache that vLLM's log names")
    files = find(root)
    if not files:
        raise ValueError(f"no {FILE} under {root}; vLLM compiled nothing there with normquant switched on")
    folders: dict[str, list[str]] = {}  # of a report; the ranks of a group have the same
    for path in files if args.all else files[:1]:
        report = _report(path, args.json)
        if args.json:
            print(report)
        else:
            folders.setdefault(report, []).append(str(path.parent))
    for report, of in folders.items():
        print("\n".join([*sorted(of), report]))
    return 0


def _report(path: Path, as_json: bool) -> str:
    """A file of records, as JSON lines or as text. Raises ValueError where it holds anything else."""
    from normquant.vllm.graph_records import read

    try:
        records = list(read(path))
        if as_json:
            return "\n".join(json.dumps(asdict(record) | {"path": str(path)}) for record in records)
        return text(records)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not hold what the plugin writes: {type(error).__name__}: {error}") from error


def default_root(environ: Mapping[str, str]) -> Path:
    """Where vLLM keeps its compile caches when it is not told otherwise."""
    root = environ.get("VLLM_CACHE_ROOT") or Path(environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "vllm"
    return Path(root) / "torch_compile_cache"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise ValueError("this user has no home directory with a cache of vLLM in it; give the path of one") from None


def text(records: Iterable[GraphRecord]) -> str:
    """The records as a table of layer types, fused ones first."""
    from normquant.vllm.graph_records import NOT_COMPILED

    records = list(records)
    fused, sites = 0, 0
    kinds: dict[tuple[str, ...], set[str]] = {}
    linear: Counter[str] = Counter()
    for record in records:
        linear.update(record.linear)
        own = record.report["sites"]
        sites, fused = sites + len(own), fused + sum(site["fused"] for site in own)
        for site in (*own, *record.report["others"]):
            kinds.setdefault(_kind(site), set()).update(INDEX.findall(site["name"])[:1])
    versions = sorted({f"normquant {r.normquant}, vLLM {r.vllm}, policy {r.report['policy']}" for r in records})
    apart = [record.rows for record in records if record.rows.startswith(NOT_COMPILED)]
    graphs = len(records) - len(apart)
    where = count(graphs, "compiled graph") if not apart else f"a model that is {apart[0]}"
    lines = [*versions, f"{fused} of {sites} sites fused in {where}"]
    for kind, layers in sorted(kinds.items(), key=lambda item: item[0]):
        lines += _lines(kind, layers)
    lines += [f"  linear kernel: {name}, {n} calls{_note(name)}" for name, n in sorted(linear.items())]
    lines += [f"  a graph was compiled as it was: {r.report['error']}" for r in records if r.report["error"]]
    if graphs:
        lines.append(SHARED)
    return "\n".join(lines)


def _kind(site: Mapping[str, Any]) -> tuple[str, ...]:
    """strategy, layer type, what is done, why: everything that the sites of one line have in common."""
    from normquant.compile.fusion_report import op_text

    what = op_text(site["op"], site["spec"]) if site["op"] else ""
    shape = f"K={site['k']} {site['dtype']}" if site["k"] else ""
    return site["strategy"], INDEX.sub("*", site["name"]), shape, what, site["reason"]


def _lines(kind: tuple[str, ...], layers: set[str]) -> list[str]:
    """Where, what and why, a line each, in the width of the terminal."""
    strategy, name, shape, what, reason = kind
    where = f"(layer {', '.join(sorted(layers, key=int))})" if layers else ""
    head = f"  {strategy:<6} {' '.join(filter(None, (name, shape, where)))}"
    return [wrapped(head, BELOW), *(wrapped(BELOW + line, BELOW) for line in (what, reason) if line)]


def _note(kernel: str) -> str:
    from normquant.vllm.graph_records import remark

    return f"; {remark(kernel)}" if remark(kernel) else ""
