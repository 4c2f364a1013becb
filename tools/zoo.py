"""Run the zoo of tiny models and write docs/zoo.md; `make zoo`. Exits with 1 where a model breaks the promise.

    PYTHONPATH=tests python tools/zoo.py [--jobs 2] [--models llama,mamba2] [--resume]

Each outcome is kept in build/zoo.jsonl as soon as it is known; --resume runs the models that are not there.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from shared.zoo import TinyModel, tiny_models
from shared.zoo_outcome import ZooOutcome, zoo_outcome

ROOT = Path(__file__).parents[1]
PAGE, RECORDS = ROOT / "docs" / "zoo.md", ROOT / "build" / "zoo.jsonl"
MEMORY = 8 << 30  # bytes; a tiny model takes less than one
TEXT = """# The model zoo

Every causal language model of transformers {transformers} that can be built tiny (two layers, 256 wide, random bf16
weights), its linear layers block-FP8 (`nq.block_fp8`), compiled by torch {torch} with the pass at policy `always`. The
graphs that Inductor would lower are run on a CPU without generating code, so a difference from eager is one of the
rewrite. `make zoo` writes this page.

{summary}

"Converted" counts block-FP8 layers, "sites" the norms whose output is quantized. A cell "2 of 1,024" under "differ"
says how many logits are not eager's to the bit; where that is not 0, the same graphs without a rewrite differ from
eager in the same values.

{models}
{failures}
## Sites that stay as they are

{unfused}

## Models that were not compared

{not_run}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--models", help="names of model types, separated by commas; all by default")
    parser.add_argument("--resume", action="store_true", help="keep the outcomes of an earlier run")
    args = parser.parse_args(argv)
    names = args.models.split(",") if args.models else [model.name for model in tiny_models()]
    done = _kept() if args.resume else {}
    RECORDS.parent.mkdir(exist_ok=True)
    with RECORDS.open("a" if args.resume else "w") as records:
        for outcome in run([model for model in tiny_models() if model.name in set(names) - set(done)], args.jobs):
            done[outcome.name] = outcome
            print(json.dumps(asdict(outcome)), file=records, flush=True)
    outcomes = [done[name] for name in sorted(done)]
    PAGE.write_text(page(outcomes))
    return any(outcome.failure for outcome in outcomes)


def run(models: Sequence[TinyModel], jobs: int) -> Iterator[ZooOutcome]:
    """Each model once, in processes that are replaced now and then: compiled code stays in memory."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), _set_up, max_tasks_per_child=25) as pool:
        pending = [pool.submit(zoo_outcome, model) for model in models]
        for count, done in enumerate(as_completed(pending), 1):
            outcome = done.result()
            print(f"{count:>3}/{len(models)} {_line(outcome)}", flush=True)
            yield outcome


def _kept() -> dict[str, ZooOutcome]:
    outcomes = [ZooOutcome(**json.loads(line)) for line in RECORDS.read_text().splitlines()]
    return {outcome.name: outcome for outcome in outcomes}


def _set_up() -> None:
    """Of a process: what a model takes more is an error of that model, and not of the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def _line(outcome: ZooOutcome) -> str:
    told = outcome.failure or outcome.not_run
    return f"{outcome.name}: {told or f'{outcome.fused} of {outcome.sites} fused, {outcome.differ} values differ'}"


def page(outcomes: Sequence[ZooOutcome]) -> str:
    compared = [o for o in outcomes if not o.not_run]
    return TEXT.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        summary=_summary(outcomes),
        models=_table(("Model", "Converted", "Sites", "Fused", "Differ"), map(_cells, compared)),
        failures=_failures(compared),
        unfused=_table(("Reason", "Sites", "Models"), _reasons(compared)),
        not_run=_table(("Model", "Reason"), ((o.name, o.not_run) for o in outcomes if o.not_run)),
    )


def _summary(outcomes: Sequence[ZooOutcome]) -> str:
    ran = [o for o in outcomes if not o.not_run and not o.failure]
    fused, sites, differ, values, more = (
        sum(getattr(o, name) for o in ran) for name in ("fused", "sites", "differ", "values", "more_than_stock")
    )
    return (
        f"Of {len(outcomes)} models {len(ran)} ran: {fused} of {sites} sites fused; {differ:,} of {values:,} logits "
        f"differ from eager's, {more:,} of them because of a rewrite. {sum(bool(o.failure) for o in outcomes)} failed."
    )


def _cells(outcome: ZooOutcome) -> tuple[object, ...]:
    differ = f"{outcome.differ:,} of {outcome.values:,}" if outcome.differ else 0
    return outcome.name, outcome.converted, outcome.sites, outcome.fused, differ


def _reasons(outcomes: Sequence[ZooOutcome]) -> list[tuple[object, ...]]:
    reasons = {reason for outcome in outcomes for reason in outcome.unfused}
    rows = []
    for reason in reasons:
        having = [o for o in outcomes if reason in o.unfused]
        rows.append((reason, sum(o.unfused[reason] for o in having), ", ".join(o.name for o in having)))
    return sorted(rows, key=lambda row: (-row[1], row[0]))


def _failures(outcomes: Sequence[ZooOutcome]) -> str:
    failed = [(o.name, o.failure) for o in outcomes if o.failure]
    return f"\n## Failures\n\n{_table(('Model', 'What fails'), failed)}\n" if failed else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
