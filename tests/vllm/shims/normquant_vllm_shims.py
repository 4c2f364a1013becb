"""A vLLM plugin for tests: makes vLLM on a CPU compile a block-FP8 model the way it does on a GPU.

vLLM on CPU turns its compile passes off, multiplies fp8 weights with bf16 activations, and lacks the CUDA op that
quantizes. This puts back the passes, a linear kernel that takes a quantized activation, and the op, in plain torch.
NORMQUANT_SHIM names faults to plant, with commas between them: "failing_pass", "other_version", "native_quant",
"verify". NORMQUANT_SHIM_OUT: folder where "verify" writes what it compared.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

FP8_MAX = 448.0
FAULTS = set(filter(None, os.environ.get("NORMQUANT_SHIM", "").split(",")))

if "other_version" in FAULTS:  # on import, since vLLM imports every plugin before it calls the first
    from normquant.vllm import plugin

    plugin.NEWEST = plugin.OLDEST

_C = torch.library.Library("_C", "FRAGMENT")
_C.define(
    "per_token_group_fp8_quant(Tensor input, Tensor(a!) output_q, Tensor(b!) output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()"
)
_OURS = torch.library.Library("normquant_shims", "DEF")
_OURS.define("block_linear(Tensor data, Tensor scale, Tensor weight, Tensor weight_scale) -> Tensor")


def _per_token_group_fp8_quant(x, data, scale, group, eps, fp8_min, fp8_max, ue8m0, transposed, aligned):
    grouped = x.float().unflatten(-1, (-1, group))  # [M, G, group]
    s = grouped.abs().amax(-1).clamp(min=eps) / torch.tensor(FP8_MAX)
    if ue8m0:
        s = torch.exp2(torch.ceil(torch.log2(s.clamp(min=1e-10))))
    data.copy_((grouped / s.unsqueeze(-1)).clamp(fp8_min, fp8_max).flatten(-2).to(torch.float8_e4m3fn))
    scale.copy_(s)


def _block_linear(data, scale, weight, weight_scale):
    def blocks(s, *size):
        for dim, n in enumerate(size):
            s = s.repeat_interleave(n, dim)
        return s

    n, k = weight.shape
    x = data.float() * blocks(scale, 1, 128)
    w = weight.float() * blocks(weight_scale.float(), 128, 128)[:n, :k]
    return (x @ w.t()).to(torch.bfloat16)


_C.impl("per_token_group_fp8_quant", _per_token_group_fp8_quant, "CPU")
torch.library.register_fake("_C::per_token_group_fp8_quant", lambda *args: None, lib=_C)
_OURS.impl("block_linear", _block_linear, "CPU")
torch.library.register_fake(
    "normquant_shims::block_linear",
    lambda data, scale, weight, weight_scale: data.new_empty((data.shape[0], weight.shape[0]), dtype=torch.bfloat16),
    lib=_OURS,
)


def register() -> None:
    _keep_compile_passes()
    _take_quantized_activations()
    _reduce_in_one_operation()
    _make_up_weights()
    if "native_quant" not in FAULTS:
        _quantize_with_the_op()
    if "failing_pass" in FAULTS:
        from normquant.compile import driver

        driver.VLLM_FUSIONS = tuple(functools.partial(_fail, i) for i in range(len(driver.VLLM_FUSIONS)))
    if "verify" in FAULTS:
        import normquant_vllm_verify

        normquant_vllm_verify.install(os.environ["NORMQUANT_SHIM_OUT"])


def _fail(fusion: int, *args: Any) -> Any:
    raise RuntimeError(f"planted by a test in fusion {fusion}")


def _keep_compile_passes() -> None:
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def wrapped(cls: Any, config: Any) -> None:
        compilation = config.compilation_config
        mode, wrap = compilation.mode, compilation.ir_enable_torch_wrap
        original(cls, config)
        if mode == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.ir_enable_torch_wrap = mode, wrap

    CpuPlatform.check_and_update_config = classmethod(wrapped)

    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass

    # It compares every functionalized op with CUDA ops that a CPU build lacks. Inductor puts the calls back by itself.
    FixFunctionalizationPass.__call__ = lambda self, graph: None


def _reduce_in_one_operation() -> None:
    """`vllm::all_reduce` as on CUDA, where it gives a new tensor. On a CPU it gives its input: torch refuses that of an
    operation in a compiled graph where the variable CI is set, and warns elsewhere."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.use_custom_op_collectives = classmethod(lambda cls: True)
    original = CpuCommunicator.all_reduce
    if not hasattr(original, "__wrapped__"):

        @functools.wraps(original)
        def all_reduce(self: Any, x: torch.Tensor) -> torch.Tensor:
            return original(self, x.clone())

        CpuCommunicator.all_reduce = all_reduce


def _take_quantized_activations() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    class ReferenceBlockKernel(Fp8BlockScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability: Any = None) -> tuple[bool, None]:
            return True, None

        def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> torch.Tensor:
            return torch.ops.normquant_shims.block_linear(A, As, B, Bs)

    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [ReferenceBlockKernel]


def _quantize_with_the_op() -> None:
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

    def forward(self: Any, x: torch.Tensor, scale: Any = None, scale_ub: Any = None, use_triton: bool = False) -> Any:
        data = torch.empty(x.shape, device=x.device, dtype=torch.float8_e4m3fn)
        s = torch.empty((x.shape[0], x.shape[1] // self.group_size), device=x.device, dtype=torch.float32)
        torch.ops._C.per_token_group_fp8_quant(
            x, data, s, self.group_size, 1e-10, -FP8_MAX, FP8_MAX, self.use_ue8m0, False, False
        )
        return data, s

    QuantFP8.forward_native = forward


def _make_up_weights() -> None:
    """Dummy weights of a size that a trained model has; vLLM's own are so small that every logit is the same."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    original = DummyModelLoader.load_weights
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def wrapped(self: Any, model: torch.nn.Module, model_config: Any) -> None:
        original(self, model, model_config)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "scale" in name:
                noise = (0.5 + torch.rand(parameter.shape, generator=generator)) / 512**0.5
            elif parameter.dim() == 1:
                noise = 1 + 0.2 * noise
            parameter.data.copy_(noise.to(parameter.dtype))

    DummyModelLoader.load_weights = wrapped
