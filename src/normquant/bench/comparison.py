"""Two files of records compared: which cases became slower or faster, and whether by more than their spread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from normquant.bench.records import TIMES

# What makes two records the same case, of whatever suite; the other fields were measured, or are versions.
CASE = (
    *("suite", "op", "model", "setting", "linear", "layers", "moe", "batch", "m", "k", "group", "layout", "scale"),
    *("residual", "normed", "provider", "inputs", "policy", "gpu", "ranks", "reader", "part"),
)
# Of a case, too: what records had before there were these fields.
LATER = {"tensor_parallel": 1, "products": "auto", "compiled": True}
NEEDED = (*TIMES, "us_p10", "us_p90")  # of each record


@dataclass(frozen=True)
class CaseChange:
    """One case in both files. separate: whether the two ranges from p10 to p90 do not overlap."""

    case: str
    before_us: float
    after_us: float
    separate: bool

    @property
    def ratio(self) -> float:
        """after / before; above 1 is slower."""
        return self.after_us / self.before_us


def compare(before: Iterable[dict], after: Iterable[dict]) -> tuple[list[CaseChange], int, int]:
    """The cases in both, and how many are only in `before` and only in `after`."""
    old, new = ({key(r): r for r in records} for records in (before, after))
    changes = [_change(old[k], new[k]) for k in old if k in new]
    return changes, len(old.keys() - new.keys()), len(new.keys() - old.keys())


def key(record: dict) -> tuple:
    """What makes two records the same case."""
    columns = record.get("n") if record.get("suite") == "linear" else None  # elsewhere n counts samples
    later = LATER | {name: record[name] for name in LATER if record.get(name, "") != ""}
    return (*(str(record.get(name)) for name in CASE), str(columns), *map(str, later.values()))


def _change(before: dict, after: dict) -> CaseChange:
    low, high = sorted((before, after), key=_us)
    separate = low.get("us_p90", _us(low)) < high.get("us_p10", _us(high))
    return CaseChange(_label(before), _us(before), _us(after), separate)


def _us(record: dict) -> float:
    """What a record measured: a call, or a step of vLLM on the GPU."""
    return record["us"] if "us" in record else record["gpu_us_per_step"]


def _label(record: dict) -> str:
    """A case in a few words."""
    words = [record.get(name) for name in ("provider", "part", "setting", "linear", "op", "model") if record.get(name)]
    sizes = [f"{name}={record[name]}" for name in ("ranks", "m", "k", "batch") if name in record]
    return " ".join([*map(str, words), *sizes, *(["normed"] if record.get("normed") else [])])
