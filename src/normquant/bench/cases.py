"""What is measured: an op on a shape, its inputs, and the bytes that it must move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from normquant.ops import _bytes
from normquant.spec import QuantSpec

DEEPSEEK_KS = (7168, 1536, 512)  # hidden, q_lora and kv_lora of DeepSeek-V3/R1
OTHER_KS = (2048, 4096, 5120, 8192)  # Qwen3 and Llama
KS = DEEPSEEK_KS + OTHER_KS
MLP_KS = (2304, 18432, 2048)  # DeepSeek-R1's dense MLP at TP8 and whole, and its expert
MS = tuple(2**i for i in range(15))
LATENT = (1536, 512, 64)  # q_a, kv_a, k_pe of DeepSeek-R1
SPEC = QuantSpec(layout="col_tma")


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
    def residual(self) -> bool:
        """Whether a residual is added."""
        return self.op == "add_rms_norm_quant"

    @property
    def traffic(self) -> tuple[int, int]:
        """(bytes read, bytes written), at least."""
        if self.op.endswith("rms_norm_quant"):
            return _bytes.rms_norm_quant(self.m, self.k, self.spec, residual=self.residual, normed=self.normed)
        if self.op == "silu_mul_quant":
            return _bytes.silu_mul_quant(self.m, self.k, self.spec)
        if self.op == "latent_norm_quant":
            return _bytes.latent_norm_quant(self.m, *LATENT, self.spec)
        return _bytes.group_quant(self.m, self.k, self.spec)

    @property
    def bytes(self) -> int:
        """Bytes moved, at least."""
        return sum(self.traffic)


@dataclass(frozen=True)
class Inputs:
    """One set of tensors on the GPU; what an op does not read is None."""

    x: torch.Tensor
    weight: torch.Tensor
    residual: torch.Tensor | None = None
    kv_weight: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    positions: torch.Tensor | None = None


def inputs(case: Case, sets: int, seed: int = 0) -> list[Inputs]:
    """`sets` different sets of inputs for a case, bf16; all have the same weights, as the calls of one layer do."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    def weight(k: int) -> torch.Tensor:
        return torch.rand(k, generator=generator, device="cuda").add_(0.5).bfloat16()

    if case.op == "latent_norm_quant":
        q, c, r = LATENT
        cache = randn(4096, r)  # any angles do
        shared = weight(q), None, weight(c), cache[:, : r // 2], cache[:, r // 2 :]
        positions = torch.randint(0, 4096, (case.m,), generator=generator, device="cuda")
        return [Inputs(randn(case.m, q + c + r), *shared, positions) for _ in range(sets)]
    width = 2 * case.k if case.op == "silu_mul_quant" else case.k
    shared_weight = weight(case.k)
    return [
        Inputs(randn(case.m, width), shared_weight, randn(case.m, width) if case.residual else None)
        for _ in range(sets)
    ]


def kernel_cases(ops: tuple[str, ...], ks: tuple[int, ...] | None = None, ms: tuple[int, ...] = MS) -> Iterator[Case]:
    """The full grid of `normquant bench kernels`, or the part of it with these ops, widths and rows."""
    for op in ops:
        if op == "latent_norm_quant":
            widths: tuple[int, ...] = (LATENT[0],)
        else:
            widths = MLP_KS if op == "silu_mul_quant" else KS
        for k in widths:
            for m in ms:
                if ks is None or k in ks:
                    yield Case(op, m, k)
                    if op.endswith("rms_norm_quant"):
                        yield Case(op, m, k, normed=True)


OPS = ("rms_norm_quant", "add_rms_norm_quant", "group_quant", "silu_mul_quant", "latent_norm_quant")
