"""vLLM's engine in this process, one step at a time: what each step ran, its logits, and the scales that it used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from normquant.bench.vllm.rank_processes import Ranks

# The functions of DeepGEMM as `vllm.utils.deep_gemm` holds them; each gets (data, scales) of the activation first.
DEEP_GEMM_ENTRIES = ("_fp8_gemm_nt_impl", "_grouped_impl", "_grouped_masked_impl")
MANTISSA = 0x7FFFFF
ALONE = Ranks()


@dataclass(frozen=True)
class EngineStep:
    """What one run of the model had: requests, and tokens of all of them together."""

    requests: int
    tokens: int


class Engine:
    """An `LLM` that runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0).

    steps: every run of the model so far. ranks: this process among those that compute the model.
    """

    def __init__(self, llm: Any, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self._engine = llm.llm_engine
        self.runner = self._engine.model_executor.driver_worker.model_runner
        self.model: Any = self.runner.get_model()  # an nn.Module
        self.steps: list[EngineStep] = []
        self._requests = 0
        self._watch()

    def _watch(self) -> None:
        original = self.runner.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if scheduled.total_num_scheduled_tokens:
                self.steps.append(EngineStep(len(scheduled.num_scheduled_tokens), scheduled.total_num_scheduled_tokens))
            return original(scheduled, *args, **kwargs)

        self.runner.execute_model = execute_model

    def add(self, prompt: Sequence[int], tokens: int) -> None:
        """A request that ends after so many greedy tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._requests += 1
        self._engine.add_request(str(self._requests), {"prompt_token_ids": list(prompt)}, sampling)

    def step(self) -> list[Any]:
        """One step of the engine; scheduling asynchronously, it returns the outputs of the step before."""
        outputs: list[Any] = self._engine.step()
        return outputs

    def finish(self) -> list[list[int]]:
        """EngineStep until no request is left; the tokens of those that ended, in the order of their end."""
        ended = []
        while self._engine.has_unfinished_requests():
            ended += [list(o.outputs[0].token_ids) for o in self.step() if o.finished]
        return ended

    @contextlib.contextmanager
    def logits(self) -> Iterator[list[torch.Tensor]]:
        """The logits [requests, vocabulary] of every run of the model inside the block, in float32 on the CPU."""
        found: list[torch.Tensor] = []
        original = self.model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            if out is not None:  # as it is on ranks that do not sample
                found.append(out.detach().to("cpu", torch.float32, copy=True))
            return out

        self.model.compute_logits = compute_logits
        try:
            yield found
        finally:
            del self.model.compute_logits  # uncovers the method of the class

    @contextlib.contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Run the compiled code directly, not from CUDA graphs, so that Python sees each of its calls."""
        if hasattr(self.runner, "cudagraph_dispatcher"):
            owner, name = self.runner.cudagraph_dispatcher, "keys_initialized"
        else:  # vLLM's second model runner
            owner, name = self.runner.cudagraph_manager, "_graphs_captured"
        before = getattr(owner, name)
        setattr(owner, name, False)
        try:
            yield
        finally:
            setattr(owner, name, before)

    def decode_graph(self, batch: int) -> torch.cuda.CUDAGraph | None:
        """The CUDA graph of a whole step that decodes `batch` requests; None where vLLM captured none."""
        wrapped = getattr(self.runner.model, "concrete_cudagraph_entries", None)
        if wrapped is not None:
            graphs = {descriptor: entry.cudagraph for descriptor, entry in wrapped.items()}
        else:
            graphs = dict(getattr(getattr(self.runner, "cudagraph_manager", None), "graphs", {}))
        found = (graph for descriptor, graph in graphs.items() if graph and descriptor.num_tokens == batch)
        return next(found, None)


def linear_kernels(model: torch.nn.Module) -> set[str]:
    """Class names of the block-FP8 kernels that vLLM chose for a model's linears."""
    return {type(method.fp8_linear).__name__ for method in _methods(model) if hasattr(method, "fp8_linear")}


def expert_kernels(model: torch.nn.Module) -> set[str]:
    """Names of the kernels that vLLM chose for a model's experts; empty for a dense model."""
    return {str(getattr(m.fp8_backend, "value", m.fp8_backend)) for m in _methods(model) if hasattr(m, "fp8_backend")}


def _methods(model: torch.nn.Module) -> Iterator[Any]:
    return (getattr(module, "quant_method", None) for module in model.modules())


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class ScaleCounts:
    """Scales seen, and those of them that are not powers of two."""

    scales: int = 0
    others: int = 0


def not_powers_of_two(scale: torch.Tensor) -> int:
    """How many scales are not powers of two; packed int32 ones hold exponents only, so they always are."""
    if scale.dtype == torch.int32:
        return 0
    bits = scale.float().contiguous().view(torch.int32)
    return int(((bits & MANTISSA != 0) | (bits <= 0)).sum())  # bits <= 0: zero or negative


@contextlib.contextmanager
def counted_scales() -> Iterator[ScaleCounts]:
    """Count the scales of all activations that vLLM passes to DeepGEMM in the block; each call waits for the GPU."""
    from vllm.utils import deep_gemm

    counts = ScaleCounts()
    originals = {name: getattr(deep_gemm, name, None) for name in DEEP_GEMM_ENTRIES}

    def wrapper(original: Any) -> Any:
        def call(activation: Any, *args: Any, **kwargs: Any) -> Any:
            scale = activation[1]
            counts.scales += scale.numel() * (4 if scale.dtype == torch.int32 else 1)
            counts.others += not_powers_of_two(scale)
            return original(activation, *args, **kwargs)

        return call

    present = {name: original for name, original in originals.items() if original is not None}
    try:
        for name, original in present.items():
            setattr(deep_gemm, name, wrapper(original))
        yield counts
    finally:
        for name, original in present.items():
            setattr(deep_gemm, name, original)
