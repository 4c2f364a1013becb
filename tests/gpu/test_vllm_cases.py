"""vLLM's own cases for its fused norm and quantization kernels, with our kernels. About half a minute."""

import pytest
from shared.vllm_cases import Case, check, check_mixed_weight, some_cases

from normquant.specs import VLLM


def name(case: Case) -> str:
    words = {"residual": case.residual, "strided": case.strided, "small": case.small, "ue8m0": case.spec.is_ue8m0}
    chosen = " ".join(word for word, chosen in words.items() if chosen)
    return f"{case.tokens}x{case.hidden} {case.spec.group} {case.spec.layout} {chosen}".strip()


@pytest.mark.parametrize("case", some_cases(), ids=name)
def test_norm_and_quantization(case):
    check(case, "cuda")


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_weight_of_fp32(with_residual):
    check_mixed_weight(VLLM.replace(group=64), with_residual, "cuda")
