"""Records of `normquant bench vllm` as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normquant.report.formatting import table

SHOWN = (
    *("norm_quant", "norm", "quant", "silu_quant", "silu", "copy", "pointwise", "rope"),
    *("gemm", "all_reduce", "attention", "moe", "other"),
)


def line(record: Mapping[str, Any]) -> str:
    """One record, while others are still measured."""
    case = f"{setting_name(record)} {_model(record)} batch={record['batch']}"
    gpu = f"{record['gpu_us_per_step']:.1f} us a step on the GPU in {record['kernels']} kernels"
    return f"{case}: {gpu}, {record['tpot_ms']:.3f} ms a token"


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """Two tables: decoding by setting and batch, and what is one figure for a setting."""
    if not records:
        return "no records"
    return f"{decoding(records)}\n\n{settings(records)}"


def decoding(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each record: a step's GPU time, beside those of other settings and by class, in microseconds."""
    classes = [name for name in SHOWN if any(r["classes"].get(name, 0) >= 0.05 for r in records)]
    others = [name for name in ("installed", "default", "off") if any(r["setting"] == name for r in records)]
    header = ["linear", "batch", "setting", "GPU us/step", *(f"vs {name}" for name in others)]
    header += ["replay us", "launch us", "sum us", "kernels", "TPOT ms"]
    rows = []
    for r in sorted(records, key=lambda r: (_model(r), r["batch"])):
        row = [_model(r), str(r["batch"]), setting_name(r), f"{r['gpu_us_per_step']:.1f}"]
        row += [_change(r, records, other) for other in others]
        row += ["" if r.get(name) is None else f"{r[name]:.1f}" for name in ("replay_us", "launch_us")]
        row += [f"{r['sum_us_per_step']:.1f}", str(r["kernels"]), f"{r['tpot_ms']:.3f}"]
        rows.append([*row, *(f"{r['classes'].get(name, 0):.1f}" for name in classes)])
    return table([*header, *classes], rows, "<><" + ">" * (len(header) + len(classes) - 3))


def settings(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each setting: prompts, the logits' error and scales; below, what the auditor found."""
    firsts = {(_model(r), setting_name(r)): r for r in reversed(records)}
    prompts = sorted({tokens for r in records for tokens in r["prefill_ms"]}, key=int)
    header = ["linear", "setting", *(f"{tokens} tokens ms (GPU)" for tokens in prompts)]
    header += ["logit error", "p10 to p90", "scales not 2^n"]
    rows, found = [], []
    for r in reversed(firsts.values()):
        row = [_model(r), setting_name(r)]
        row += [f"{r['prefill_ms'][tokens]:.2f} ({r['prefill_gpu_us'][tokens] / 1e3:.2f})" for tokens in prompts]
        row += [f"{r['logit_error']:.5f}", f"{r['logit_error_p10']:.4f} to {r['logit_error_p90']:.4f}"]
        rows.append([*row, f"{r['scales_not_power_of_two']} of {r['scales']}"])
        rules = ", ".join(f"{count} {rule}" for rule, count in sorted(r["findings"].items()))
        found.append(f"{_model(r)} {setting_name(r)}, generated code: {rules or 'nothing found'}")
    return "\n".join([table(header, rows, "<<" + ">" * (len(header) - 2)), "", *found])


def setting_name(record: Mapping[str, Any]) -> str:
    """The setting, and normquant's rule for products of few rows where it is not "auto"."""
    rule = record.get("products", "")
    return record["setting"] + (f", products {rule}" if rule not in ("", "auto") else "")


def _model(record: Mapping[str, Any]) -> str:
    """The linear kernel, whether the model has experts, and on how many GPUs it ran."""
    ranks = record.get("tensor_parallel", 1)
    return f"{record['linear']}{', experts' if record['moe'] else ''}{f', TP{ranks}' if ranks > 1 else ''}"


def _change(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]], setting: str) -> str:
    """Of a record's GPU time against that of another setting; "" for itself and without such a record.

    On several GPUs of the replayed step: a profiled one measures how late the others were.
    """
    same = ("linear", "layers", "moe", "batch", "tensor_parallel")
    other = next((r for r in records if r["setting"] == setting and all(r.get(n) == record.get(n) for n in same)), None)
    time = "replay_us" if record.get("tensor_parallel", 1) > 1 else "gpu_us_per_step"
    if other is None or other is record or not other[time] or not record[time]:
        return ""
    return f"{100 * (record[time] / other[time] - 1):+.1f} %"
