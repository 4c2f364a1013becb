"""`normquant bench linear`: block-FP8 products of few rows, alone and with the kernel that reads them.

Weights are rotated past the L2, as those of a model's layers are. Parts of a record:

    product  the product, its result in bf16
    parts    what a split product hands on: its partial sums, which nobody has added yet
    reader   the op that reads the product, alone, on bf16 rows
    pair     both
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from normquant.bench.providers import packages
from normquant.bench.records import LinearRecord, current_run, time_fields
from normquant.bench.timing import Call, Timing, sets_needed, time_calls
from normquant.linear import dequantize_weight, quantize_weight
from normquant.linear.product import scaled_product
from normquant.linear.split_product import launch_pair, launch_product
from normquant.ops import OPS, Examples, group_quant
from normquant.ops._examples import LATENT
from normquant.spec import QuantSpec
from normquant.version import VERSION

SPEC = QuantSpec(layout="col_tma")
FEW_MS = (1, 8, 16, 31, 64)
DTYPE = torch.bfloat16
NORM, GATED, LATENTS, ROPE, NONE = "add_rms_norm_quant", "silu_mul_quant", "latent_norm_quant", "rope_last", ""
SHAPES = {  # K, N and the op that reads the product, for one GPU of eight; of Qwen3-30B-A3B the dense parts, whole
    "DeepSeek-R1": (
        (7168, 2112, LATENTS), (1536, 3072, ROPE), (2048, 7168, NORM), (7168, 4608, GATED), (2304, 7168, NORM),
    ),
    "Qwen3-32B": ((5120, 1280, NONE), (1024, 5120, NORM), (5120, 6400, GATED), (3200, 5120, NORM)),
    "Llama-3-70B": ((8192, 1280, NONE), (1024, 8192, NORM), (8192, 7168, GATED), (3584, 8192, NORM)),
    "Qwen3-30B-A3B": ((2048, 5120, NONE), (4096, 2048, NORM)),
}  # fmt: skip

Weight = tuple[torch.Tensor, torch.Tensor]
Multiply = Callable[..., torch.Tensor]  # data, scale, weight, weight_scale -> [M, N] bf16


@dataclass(frozen=True)
class ProductCase:
    """[m, k] by [n, k], and the op that reads the result, "" for none."""

    k: int
    n: int
    m: int
    reader: str


@dataclass(frozen=True)
class ProductInputs:
    """data [M, K] and its scale; weights that lie in different memory; the reader's arguments but x, spec included."""

    data: torch.Tensor
    scale: torch.Tensor
    weights: tuple[Weight, ...]
    rest: tuple[Any, ...]


@dataclass(frozen=True)
class ProductProvider:
    """`build` gives the function that multiplies for a case; `lacks` says what keeps it from running here, or None."""

    build: Callable[[ProductInputs], Multiply]
    lacks: Callable[[], str | None] = lambda: None


def product_cases(
    ks: Sequence[int] | None = None, ms: Sequence[int] = FEW_MS, models: Sequence[str] = tuple(SHAPES)
) -> list[ProductCase]:
    """Every product of the models, or those with these K, each once."""
    found = [(k, n, reader) for model in models for k, n, reader in SHAPES[model] if ks is None or k in ks]
    return [ProductCase(k, n, m, reader) for k, n, reader in dict.fromkeys(found) for m in ms]


def product_inputs(case: ProductCase, sets: int, device: str = "cuda") -> ProductInputs:
    """Standard normal activations and weights, always the same ones."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.m, case.k, generator=generator, device=device).to(DTYPE)
    q = group_quant(x, spec=SPEC)
    weight, scale = quantize_weight(torch.randn(case.n, case.k, generator=generator, device=device))
    rest: tuple[Any, ...] = ()
    if case.reader:
        example = OPS[case.reader].example(Examples(case.m, reader_width(case), device))
        rest = (*(value for name, value in example.items() if name != "x"), SPEC)
    return ProductInputs(q.data, q.scale, tuple((weight.clone(), scale.clone()) for _ in range(sets)), rest)


def reader_width(case: ProductCase) -> int:
    """K of the reader, as its examples and its launch configs take it."""
    return {GATED: case.n // 2, LATENTS: case.n - sum(LATENT)}.get(case.reader, case.n)


def _split(i: ProductInputs) -> Multiply:
    launch = launch_product(i.data, i.scale, *i.weights[0], DTYPE)
    return lambda *tensors: launch(*tensors)[0]


def _scaled_mm(i: ProductInputs) -> Multiply:
    return lambda data, scale, weight, by: scaled_product(data, scale, weight, by, DTYPE)


def _deepgemm(i: ProductInputs) -> Multiply:
    deep_gemm = import_module(deepgemm_module() or "deep_gemm")
    start_early(deep_gemm)

    def multiply(data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        out = data.new_empty((data.shape[0], weight.shape[0]), dtype=DTYPE)
        deep_gemm.fp8_gemm_nt((data, scale), (weight, by), out)
        return out

    return multiply


def start_early(module: Any) -> None:
    """Have DeepGEMM launch its kernels while the one before runs, where it has a switch for it, as vLLM does."""
    if hasattr(module, "set_pdl"):
        module.set_pdl(True)


def _flashinfer(i: ProductInputs) -> Multiply:
    from flashinfer.gemm import fp8_blockscale_gemm_sm90

    return lambda data, scale, weight, by: fp8_blockscale_gemm_sm90(data, weight, scale, by)


def deepgemm_module() -> str | None:
    """DeepGEMM, or else the one that vLLM brings, which is not imported for the question, as vLLM would be, too."""
    if find_spec("deep_gemm") is not None:
        return "deep_gemm"
    vllm = find_spec("vllm")
    folders = vllm.submodule_search_locations or () if vllm is not None else ()
    inside = any(Path(folder, "third_party", "deep_gemm").is_dir() for folder in folders)
    return "vllm.third_party.deep_gemm" if inside else None


OURS = "normquant"
PRODUCT_PROVIDERS = {
    OURS: ProductProvider(_split),
    "scaled_mm": ProductProvider(_scaled_mm),
    "deepgemm": ProductProvider(_deepgemm, lambda: None if deepgemm_module() else "deep_gemm not installed"),
    "flashinfer": ProductProvider(_flashinfer, packages("flashinfer")),
}


def work_of(case: ProductCase, i: ProductInputs, providers: dict[str, Multiply]) -> dict[tuple[str, str], list[Call]]:
    """(provider, part) -> a call for each weight."""
    work: dict[tuple[str, str], list[Call]] = {}

    def add(provider: str, part: str, run: Callable[..., Any]) -> None:
        work[provider, part] = [partial(run, i.data, i.scale, *weight) for weight in i.weights]

    for name, multiply in providers.items():
        add(name, "product", multiply)
    if OURS in providers:
        add(OURS, "parts", _parts(i))
    if case.reader:
        read, rows = _reader(case, i), torch.randn(case.m, case.n, device=i.data.device).to(DTYPE)
        work[OURS, "reader"] = [partial(read, rows)]
        for name, multiply in providers.items():
            add(name, "pair", _folded(case, i) if name == OURS else _followed(multiply, read))
    return work


def _parts(i: ProductInputs) -> Callable[..., Any]:
    from normquant.kernels.block_fp8_linear import plan_block_fp8_linear
    from normquant.kernels.launch import Launch

    return Launch(plan_block_fp8_linear(i.data, i.scale, *i.weights[0]))


def _reader(case: ProductCase, i: ProductInputs) -> Callable[[torch.Tensor], Any]:
    op, rest = OPS[case.reader].overload, (*i.rest[:-1], i.rest[-1].encode())
    return lambda x: op(x, *rest)


def _folded(case: ProductCase, i: ProductInputs) -> Callable[..., Any]:
    others = [value for value in i.rest if isinstance(value, torch.Tensor)]
    launch = launch_pair(OPS[case.reader], (i.data, i.scale, *i.weights[0], DTYPE), i.rest)
    return lambda *tensors: launch(*tensors, *others)


def _followed(multiply: Multiply, read: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    return lambda *tensors: read(multiply(*tensors))


def error_of(multiply: Multiply, i: ProductInputs) -> float:
    """Norm of the difference from the product in float64 of the same fp8 values, over that product's norm."""
    weight, scale = i.weights[0]
    exact = (i.data.double().unflatten(1, (-1, 128)) * i.scale.double().unsqueeze(-1)).flatten(1)
    exact = exact @ dequantize_weight(weight.double(), scale.double()).double().t()
    return float((multiply(i.data, i.scale, weight, scale).double() - exact).norm() / exact.norm())


def measure_products(
    case: ProductCase, names: Sequence[str], samples: int
) -> Iterator[tuple[str, str, Timing, float | None]]:
    """Provider, part, time and error of all that is named; the reader and the partial sums have no error."""
    i = product_inputs(case, sets_needed(case.n * case.k))
    providers = {name: PRODUCT_PROVIDERS[name].build(i) for name in names}
    errors = {name: error_of(multiply, i) for name, multiply in providers.items()}
    work = work_of(case, i, providers)
    timings = time_calls({" ".join(key): calls for key, calls in work.items()}, samples)
    for provider, part in work:
        yield provider, part, timings[f"{provider} {part}"], errors[provider] if part in ("product", "pair") else None


def product_records(case: ProductCase, names: Sequence[str], samples: int) -> list[LinearRecord]:
    """One record for each provider and part."""
    run = asdict(current_run(VERSION))
    found = []
    for provider, part, timing, error in measure_products(case, names, samples):
        times = time_fields(timing, 3)
        times["samples"] = times.pop("n")
        found.append(LinearRecord("linear", **asdict(case), provider=provider, part=part, error=error, **times, **run))
    return found


def product_line(records: Sequence[LinearRecord]) -> str:
    """One case as a line of text."""
    first = records[0]
    times = "  ".join(f"{r.provider} {r.part} {r.us:.2f}" for r in records)
    return f"{first.k}x{first.n} m={first.m}{f' -> {first.reader}' if first.reader else ''}: {times}"
