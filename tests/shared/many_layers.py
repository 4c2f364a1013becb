"""The report of a model of many layers, made of that of one: what the compiler gives where its layers are alike."""

from __future__ import annotations

import copy
from typing import Any


def repeated(report: dict[str, Any], count: int) -> dict[str, Any]:
    """One program of `count` layers: each has its own buffers, and reads what the last launch of the one before wrote.

    A first and a last launch that are not like the others stand around them, as an embedding and a norm do.
    """
    (layer,) = report["programs"]
    size = len(layer["launches"])
    launches = [_alone(layer["launches"][0], 0, "first_kernel")]
    edges: list[dict[str, Any]] = []
    buffers: dict[str, Any] = {"first": _buffer(), "last": _buffer()}
    findings = []
    for number in range(count):
        start = 1 + number * size
        launches += [_renamed(launch, start + n, number) for n, launch in enumerate(layer["launches"])]
        edges += _edges(layer, start, number)
        edges.append({"buffer": _handed_on(launches[start - 1]), "from": start - 1, "to": start, "bytes": 1 << 20})
        buffers |= {f"{name}_{number}": held for name, held in layer["buffers"].items()}
        findings += [{**f, "position": start + f["position"]} for f in report["findings"]]
    launches.append(_alone(layer["launches"][0], len(launches), "last_kernel"))
    edges.append({"buffer": "x", "from": len(launches) - 2, "to": len(launches) - 1, "bytes": 1 << 20})
    program = {**layer, "launches": launches, "edges": edges, "buffers": buffers, "outputs": ["last"]}
    numbers = {key: count * report[key] for key in ("bytes", "wasted_bytes", "est_us")}
    return copy.deepcopy({**report, **numbers, "programs": [program], "findings": findings})


def _handed_on(launch: dict[str, Any]) -> str:
    return next(iter(launch["writes"]), "x")


def _renamed(launch: dict[str, Any], position: int, layer: int) -> dict[str, Any]:
    moved = {key: {f"{name}_{layer}": count for name, count in launch[key].items()} for key in ("reads", "writes")}
    return {**launch, **moved, "position": position}


def _edges(layer: dict[str, Any], start: int, number: int) -> list[dict[str, Any]]:
    return [
        {**e, "buffer": f"{e['buffer']}_{number}", "from": None if e["from"] is None else start + e["from"],
         "to": start + e["to"]}
        for e in layer["edges"]
    ]  # fmt: skip


def _alone(launch: dict[str, Any], position: int, name: str) -> dict[str, Any]:
    written = "first" if position == 0 else "last"
    return {**launch, "name": name, "position": position, "reads": {}, "writes": {written: 1 << 20}}


def _buffer() -> dict[str, Any]:
    return {"dtype": "bfloat16", "shape": ["64", "7168"], "stride": ["7168", "1"], "bytes": 1 << 20, "role": "output"}
