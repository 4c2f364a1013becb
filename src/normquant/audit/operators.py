"""What is known of opaque operators: from their names, and for some from their public schemas.

A call in generated code shows which tensors are passed, not which are written. A tensor that was just allocated is an
output; for one that already holds data, only the operator's schema tells.
"""

import re
from dataclasses import dataclass

_ROW_WISE = re.compile(r"norm|quant|silu|gelu|relu|act_and_mul|rope|rotary|cast|convert|clamp|softmax")
_NOT_ROW_WISE = re.compile(
    r"mm(?![a-z])|gemm|matmul|linear|conv(?!ert)|attention|attn|sdpa|mla|moe|expert|all_|reduce_|sort|topk"
)


@dataclass(frozen=True)
class Operator:
    """What a schema says of an operator. Numbers are argument positions."""

    mutates: tuple[int, ...] = ()
    quantizes: bool = False
    ue8m0: int | None = None  # the argument that asks for power-of-two scales; None without such an argument
    always_ue8m0: bool = False
    takes_scales: tuple[int, ...] = ()  # scales that are copied unless column-major with columns padded to 16 bytes


# vLLM's csrc/torch_bindings.cpp and its Python custom ops, and SGLang's kernels, as published.
_KNOWN: dict[str, Operator] = {
    "_C.per_token_group_fp8_quant": Operator((1, 2), True, ue8m0=7),
    "_C.per_token_group_fp8_quant_packed": Operator((1, 2), True, always_ue8m0=True),
    "_C.per_token_group_quant_int8": Operator((1, 2)),
    "_C.rms_norm_per_block_quant": Operator((0, 3, 6), True),
    "_C.silu_and_mul_per_block_quant": Operator((0, 2), True),
    "_C.rms_norm": Operator((0,)),
    "_C.fused_add_rms_norm": Operator((0, 1)),
    "_C.silu_and_mul": Operator((0,)),
    "_C.rms_norm_static_fp8_quant": Operator((0,)),
    "_C.fused_add_rms_norm_static_fp8_quant": Operator((0, 2)),
    "_C.rms_norm_dynamic_per_token_quant": Operator((0, 3, 6)),
    "_C.static_scaled_fp8_quant": Operator((0,)),
    "_C.dynamic_scaled_fp8_quant": Operator((0, 2)),
    "_C.dynamic_per_token_scaled_fp8_quant": Operator((0, 2)),
    "_C.silu_and_mul_quant": Operator((0,)),
    "_C.rotary_embedding": Operator((1, 2)),
    "vllm.fp8_gemm_nt_op": Operator((4,), takes_scales=(1,)),
    "sgl_kernel.sgl_per_token_group_quant_fp8": Operator((1, 2), True, ue8m0=7),
}
_UNKNOWN = Operator()


def operator(name: str) -> Operator:
    """What is known of the operator `namespace.name`; the defaults when nothing is."""
    return _KNOWN.get(name, _UNKNOWN)


def is_known(name: str) -> bool:
    return name in _KNOWN


def is_row_wise(name: str) -> bool:
    """Whether, by its name, each row of an operator's output depends on that row of its input alone.

    Such an operator does little but move bytes, and a generated kernel next to it could do its work.
    """
    short = name.rpartition(".")[2]
    return bool(_ROW_WISE.search(short)) and not _NOT_ROW_WISE.search(short)


def uses_ue8m0(name: str, arguments: tuple[str, ...]) -> bool | None:
    """Whether a call quantizes with power-of-two scales; None when it is not a known quantization."""
    known = operator(name)
    if known.always_ue8m0:
        return True
    if known.quantizes:
        return known.ue8m0 is not None and len(arguments) > known.ue8m0 and arguments[known.ue8m0] == "True"
    package, _, op = name.rpartition(".")
    if package == "normquant" and "quant" in op:
        return any("ue8m0" in argument for argument in arguments)
    return None
