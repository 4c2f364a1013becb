"""Classes of kernels by name, with names as profilers and compilers write them, and windows of overlapping kernels."""

import pytest

from normquant.bench.vllm.kernel_profile import (
    CLASSES,
    ProfiledKernel,
    by_name,
    kernel_class,
    own_time,
    recorded,
    window,
)

NAMES = {
    "norm_quant": [
        "rms_norm_quant_kernel",
        "latent_norm_quant_kernel",
        "void vllm::rms_norm_per_block_quant_kernel<c10::BFloat16, c10::Float8_e4m3fn, true, true, false, 128>(...)",
    ],
    "silu_quant": [
        "silu_mul_quant_kernel",
        "void vllm::silu_and_mul_per_block_quant_kernel<c10::BFloat16, c10::Float8_e4m3fn, true, 128>(...)",
    ],
    "silu": ["void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel<c10::BFloat16>, true>(...)"],
    "norm": [
        "triton_red_fused_fused_add_rms_norm_per_token_group_fp8_quant_0",  # the op that quantizes is not in it
        "triton_red_fused_2",
        "triton_per_fused_rms_norm_1",
        "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(...)",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
    ],
    "quant": [
        "group_quant_kernel",
        "void per_token_group_quant_8bit_kernel<c10::BFloat16, c10::Float8_e4m3fn, true, true, float>(...)",
    ],
    "copy": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void deep_gemm::transpose_fp32<512u, 64u, 18u>(float const*, float*, unsigned int)",
        "void at::native::elementwise_kernel<128, 4, at::native::at::native::direct_copy_kernel_cuda(...)>",
        "triton_poi_fused_copy_3",
    ],
    "pointwise": ["triton_poi_fused_0"],
    "rope": [
        "triton_poi_fused_add_copy_index_select_mul_slice_split_stack_sub_unsqueeze_view_3",
        "void vllm::rotary_embedding_kernel<c10::BFloat16, false>(...)",
    ],
    "gemm": [
        "void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 2112u, 7168u, 1u, 16u, 128u, 128u, 128u, 128u, 32u>(...)",
        "nvjet_tst_64x16_64x13_2x1_v_bz_splitK_TNT",
        "void cutlass::device_kernel<vllm::enable_sm90_only<cutlass::gemm::kernel::GemmUniversal<int>>>(...)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>(...)",
        "block_fp8_linear_kernel",
        "sum_of_parts_kernel",
    ],
    "all_reduce": [
        "one_shot_kernel",
        "two_shot_kernel",
        "add_parts_kernel",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 4>(...)",
        "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<...>(...)",
    ],
    "attention": [
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<int>>>(...)",
        "void flash_fwd_splitkv_mla_kernel<Flash_fwd_kernel_traits_mla<576, 64, 64, 8>>(...)",
        "void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, __nv_bfloat16, (vllm::Fp8KVCacheDataType)0>(...)",
    ],
    "moe": [
        "fused_moe_kernel",
        "void vllm::moe::moe_align_block_size_kernel<int>(...)",
        "void vllm::moe::grouped_topk_fused_kernel<float, float, int>(...)",
    ],
    "other": ["void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>(...)"],
}


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in NAMES.items() for name in names])
def test_classes(cls, name):
    assert kernel_class(name) == cls


def test_every_class_has_a_name_here():
    assert set(NAMES) == set(CLASSES)


# a runs from 0 to 4; b is launched at 3 and ends at 6; c lies within b; d comes after a gap of 2
TIMES = (("nvjet_d", 8, 1), ("rms_norm_quant_kernel", 3, 3), ("nvjet_a", 0, 4), ("x", 4, 1))
KERNELS = [ProfiledKernel(*times) for times in TIMES]


def test_overlapping_time_is_the_earlier_kernels():
    assert [(k.name, us) for k, us in own_time(KERNELS)] == [
        ("nvjet_a", 4),
        ("rms_norm_quant_kernel", 2),
        ("x", 0),
        ("nvjet_d", 1),
    ]


def test_a_window_is_per_step():
    found = window(KERNELS, 2)
    assert (found.us, found.sum_us, found.kernels) == (3.5, 4.5, 2)
    assert found.classes == {"gemm": 2.5, "norm_quant": 1, "other": 0}
    assert by_name(KERNELS, 2)[0] == ("gemm", "nvjet_a", 0.5, 2)


def test_an_empty_window():
    assert window([], 4).us == 0 and recorded(lambda: None) == []
