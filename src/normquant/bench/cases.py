"""What is measured: an op on a shape, its inputs, and the bytes that it must move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from normquant.ops import OPS, Examples, Op
from normquant.spec import QuantSpec

# The ops that peers have, and that a layer is made of.
NORM, ADD_NORM, QUANT = "rms_norm_quant", "add_rms_norm_quant", "group_quant"
SILU, GATED_NORM, LATENTS, ROPE = "silu_mul_quant", "gated_norm_quant", "latent_norm_quant", "rope_last"
MS = tuple(2**i for i in range(15))
SPEC = QuantSpec(layout="col_tma")
PER_CALL = ("x", "residual", "z", "positions")  # what differs between calls of one layer
BENCHMARKED = tuple(op.stem for op in OPS.values() if op.widths and op.name == op.stem)

CaseInputs = dict[str, Any]  # arguments of an op by name, the spec left out


@dataclass(frozen=True)
class Case:
    """An op on [m, k] with `spec`; normed: the norm is written too."""

    op: str
    m: int
    k: int
    normed: bool = False
    spec: QuantSpec = SPEC

    @property
    def op_name(self) -> str:
        """The op as torch knows it, and as the table of configs does."""
        return f"{self.op}_with_norm" if self.normed else self.op

    @property
    def definition(self) -> Op:
        """The op itself."""
        return OPS[self.op_name]

    @property
    def residual(self) -> bool:
        """Whether a residual is added."""
        return "residual" in self.definition.argument_names

    @property
    def traffic(self) -> tuple[int, int]:
        """(bytes read, bytes written), at least."""
        return self.definition.traffic(self.m, self.k, self.spec)

    @property
    def bytes(self) -> int:
        """Bytes moved, at least."""
        return sum(self.traffic)


def inputs(case: Case, sets: int, seed: int = 0) -> list[CaseInputs]:
    """`sets` different sets of inputs for a case, bf16; all have the same weights, as the calls of one layer do."""
    examples = Examples(case.m, case.k, seed=seed)
    first = case.definition.example(examples)
    shared = {name: value for name, value in first.items() if name not in PER_CALL}
    return [first, *(case.definition.example(examples) | shared for _ in range(sets - 1))]


def kernel_cases(ops: tuple[str, ...], ks: tuple[int, ...] | None = None, ms: tuple[int, ...] = MS) -> Iterator[Case]:
    """The full grid of `normquant bench kernels`, or the part of it with these ops, widths and rows."""
    for op in ops:
        for k in OPS[op].widths:
            for m in ms:
                if ks is None or k in ks:
                    yield Case(op, m, k)
                    if f"{op}_with_norm" in OPS:
                        yield Case(op, m, k, normed=True)
