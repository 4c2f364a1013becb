"""What the pass did to vLLM's graphs, kept beside vLLM's compile cache: one JSON line for each graph. It has the
graph's block-FP8 linear kernels as well, some of which leave nothing to fuse.

A server that loads its graphs from that cache compiles nothing, and the file still says what is in them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import Graph

from normquant.compile.find.quant_ops import DEEPGEMM, called
from normquant.compile.fusions.vllm_linear import FLASHINFER, FLASHINFER_OR_DEEPGEMM, PRODUCT

FILE = "normquant.jsonl"
NOT_COMPILED = "not compiled"  # in place of a range of token counts
SELF_QUANTIZING = "takes bf16 and quantizes inside: nothing is fused in front of it, for the reason at its sites"

# name of vLLM's operation -> how a person calls the kernel, and what keeps it from being fused with
KERNELS: Mapping[str, tuple[str, str]] = {
    DEEPGEMM: ("DeepGEMM", ""),
    "_C::cutlass_scaled_mm": ("Cutlass", ""),
    "vllm::w8a8_triton_block_scaled_mm_func": ("Triton", ""),
    FLASHINFER: ("FlashInfer", SELF_QUANTIZING),
    FLASHINFER_OR_DEEPGEMM: ("FlashInfer or DeepGEMM, by rows", SELF_QUANTIZING),
    PRODUCT: ("FlashInfer or DeepGEMM, by rows, on FP8 inputs", ""),
}
PAIR = "normquant::block_fp8_linear_"  # with what its name ends with
PAIRED = "vLLM's, or normquant's for few rows, in an op with what reads the product"


@dataclass(frozen=True)
class GraphRecord:
    """One graph that the pass has seen.

    normquant, vllm: versions. rows: the range of token counts that the graph is for, as vLLM writes it; of a model that
        vLLM does not compile, that and why.
    report: `FusionReport.to_dict()`. linear: block-FP8 linear kernel -> calls in the graph.
    """

    normquant: str
    vllm: str
    rows: str
    report: Mapping[str, Any]
    linear: Mapping[str, int] = field(default_factory=dict)


def append(directory: Path, record: GraphRecord) -> None:
    """Add a record to the file of a compile cache. Raises OSError where it cannot be written."""
    with (directory / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def overwrite(directory: Path, record: GraphRecord) -> None:
    """Make a record the only one of a folder. Raises OSError where it cannot be written; what was there stays then."""
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f".{os.getpid()}.{FILE}"
    try:
        part.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")
        os.replace(part, directory / FILE)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> Iterator[GraphRecord]:
    """The records of a file, the same graph compiled twice only once. Raises ValueError for any other file."""
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = GraphRecord(**json.loads(line))
            report = record.report
            key = json.dumps([record.rows, report["policy"], report["sites"], report["others"], report["error"]])
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}:{number} is no record of a graph: {error}") from None
        if key not in seen:
            seen.add(key)
            yield record


def find(root: Path) -> list[Path]:
    """The files under a folder, the one written last first; root itself where it is such a file."""
    if root.is_file():
        return [root]
    return sorted(root.rglob(FILE), key=lambda path: path.stat().st_mtime, reverse=True)


def linear_kernels(graph: Graph) -> dict[str, int]:
    """Name of each known linear kernel -> how many calls of it the graph has."""
    return dict(Counter(filter(None, (_kernel(called(node)) for node in graph.nodes))))


def _kernel(name: str) -> str:
    """How a person calls the linear kernel in an operation; "" where there is none."""
    if name.startswith(PAIR):
        return PAIRED
    return KERNELS[name][0] if name in KERNELS else ""


def remark(kernel: str) -> str:
    """What keeps a linear kernel, named as `linear_kernels` does, from being fused with; "" when nothing does."""
    return next((note for name, note in KERNELS.values() if name == kernel), "")
