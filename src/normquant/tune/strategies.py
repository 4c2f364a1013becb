"""`normquant tune --strategies`: times the three strategies of the compile pass and writes the table that "auto" reads.

A site is a transformers norm in front of an opaque quantization, alone in a graph. "stock" leaves it to Inductor,
"native" has Inductor generate the quantization as well, "fused" is one kernel of this package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor_config

from normquant.bench.cases import QUANT, Case, CaseInputs, inputs
from normquant.bench.providers import any_rows, no_recompile_limit, norm
from normquant.bench.timing import Call, Timing, sets_of, time_calls
from normquant.compile import clear, inductor_options, reports
from normquant.ops import OPS

POLICIES = {"fused": "always", "native": "native", "stock": "never"}
LAST = 2**31 - 1  # what was measured at the most rows speaks for all above
SiteFunction = Callable[[CaseInputs], tuple[torch.Tensor, ...]]


def site(case: Case) -> SiteFunction:
    """The graph of a norm op, as a model writes it."""
    quant, spec, residual, normed = OPS[QUANT].overload, case.spec.encode(), case.residual, case.normed

    def run(i: CaseInputs) -> tuple[torch.Tensor, ...]:
        h = i["x"] + i["residual"] if residual else i["x"]
        y = norm(h, i["weight"])
        outputs = tuple(quant(y, spec))
        return (*outputs, *((h,) if residual else ()), *((y,) if normed else ()))

    return run


def measure(op: Sequence[Case], samples: int, in_l2: bool = False) -> Iterator[dict[str, Any]]:
    """Entries of the table for cases of one op and width, ascending in m; each speaks for the rows up to its own m.

    A strategy that the pass could not apply, and so left the site to the compiler, is not in them.
    """
    compiled = {name: torch.compile(site(op[0]), fullgraph=True, options=options(name)) for name in POLICIES}
    became: dict[str, str] = {}
    for first, case in zip(firsts(op), op, strict=True):
        sets = inputs(case, sets_of(case, in_l2))
        with torch.no_grad(), no_recompile_limit(), inductor_config.patch(force_disable_caches=True):
            work: dict[str, list[Call]] = {}
            for name, run in compiled.items():
                clear()
                work[name] = calls(run, sets)
                for report in reports():  # none where nothing was compiled
                    became[name] = report.sites[0].strategy
            yield entry(case, first, time_calls({n: w for n, w in work.items() if became[n] == n}, samples))
    torch._dynamo.reset()


def options(strategy: str) -> dict[str, Any]:
    """Inductor options of a strategy."""
    return inductor_options(policy=POLICIES[strategy], strict=True)


def firsts(cases: Sequence[Case]) -> list[int]:
    """The fewest rows that each case speaks for."""
    return [1, *(before.m + 1 for before, _ in pairwise(cases))]


def calls(run: SiteFunction, sets: Sequence[CaseInputs]) -> list[Call]:
    """One call for each set, compiled for any number of rows above one."""
    found: list[Call] = []
    for i in sets:
        any_rows((i["x"], i.get("residual")))
        found.append(partial(run, i))
        found[-1]()
    return found


def entry(case: Case, first: int, timings: dict[str, Timing]) -> dict[str, Any]:
    """One entry, its last row open until the table is written."""
    us = {name: round(timing.us, 2) for name, timing in timings.items()}
    return {"op": case.op_name, "k": case.k, "m": [first, case.m], "us": us}


def table_path(capability: tuple[int, int]) -> Path:
    """Where the table of a compute capability lies in this installation."""
    import normquant.compile

    return Path(normquant.compile.__path__[0]) / "tables" / f"sm{capability[0]}{capability[1]}.json"


def write(path: Path, capability: tuple[int, int], command: str, entries: Sequence[dict[str, Any]]) -> None:
    """Write the table, one line an entry; entries of an (op, K) that was not measured again are kept.

    "torch" is the version that it was measured with, or several where entries of another one are kept: "stock" and
    "native" are what that torch generates.
    """
    old = json.loads(path.read_text()) if path.is_file() else {"entries": []}
    measured = {(e["op"], e["k"]) for e in entries}
    kept = [e for e in old["entries"] if (e["op"], e["k"]) not in measured]
    merged = sorted([*kept, *(_open_ended(e, entries) for e in entries)], key=lambda e: (e["op"], e["k"], e["m"]))
    versions = ", ".join(sorted({str(torch.__version__), *(old.get("torch", "unknown").split(", ") if kept else ())}))
    head = json.dumps({"capability": "{}.{}".format(*capability), "torch": versions, "source": command})[:-1]
    lines = ",\n".join("  " + json.dumps(e) for e in merged)
    path.write_text(f'{head}, "entries": [\n{lines}\n]}}\n')


def _open_ended(e: dict[str, Any], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    last = max(other["m"][1] for other in entries if (other["op"], other["k"]) == (e["op"], e["k"]))
    return e | {"m": [e["m"][0], LAST if e["m"][1] == last else e["m"][1]]}
