"""GPU kernels of a window of steps: the class of each, and the GPU time that it accounts for."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

OTHER = "other"
# A kernel's class is that of the first rule that its name matches. Inductor names a kernel after the operations in it,
# or, where it no longer knows them, with a number alone: then a reduction is a norm, as nothing else reduces in these
# graphs, and a pointwise kernel is a copy of the residual or the RoPE of k_pe; only the generated code tells which.
RULES: tuple[tuple[str, str], ...] = (
    # Their long names contain other rules' words; sums that wait for other ranks count as theirs.
    ("gemm", r"gemm::kernel::GemmUniversal|gemm_1d[12]d|nvjet|block_fp8_linear_kernel|sum_of_parts_kernel"),
    ("all_reduce", r"all_?reduce|ncclDev|cross_device_reduce|one_shot_kernel|two_shot_kernel|add_parts_kernel"),
    ("moe", r"moe|topk|top_k|expert|count_and_sort|permute_kernel"),
    ("attention", r"flash|fmha|mla|attention|attn|merge_states|reshape_and_cache|paged|varlen"),
    ("norm_quant", r"norm_quant_kernel|rms_norm_per_block_quant|rms_norm_dynamic|norm\w*_quant\w*kernel"),
    ("silu_quant", r"silu_mul_quant_kernel|silu_and_mul_per_block_quant|silu_and_mul_quant|act_and_mul_quant"),
    ("rope", r"rotary|rope|^triton_poi_fused_\w*(index_select|cos|sin|stack)"),
    ("norm", r"rms_norm|layer_norm|^triton_(red|per)_fused"),
    ("quant", r"group_quant|per_token_cast|scaled_fp8_quant"),
    (
        "copy",
        r"^Memcpy|^Memset|direct_copy|transpose|CatArray|FillFunctor|copy_kernel|^triton_poi_fused_(clone|copy)\w*",
    ),
    ("gemm", r"gemm|nvjet|cublas|splitKreduce|cutlass|gemv|dot_kernel"),
    ("pointwise", r"^triton_poi_fused_\d+$"),
    ("silu", r"silu|act_and_mul"),
)
CLASSES = (*dict.fromkeys(name for name, _ in RULES), OTHER)


@dataclass(frozen=True)
class ProfiledKernel:
    """One kernel on the GPU: start and length in microseconds."""

    name: str
    start: float
    us: float


@dataclass(frozen=True)
class Window:
    """A window of steps; all figures are of one step.

    us: time in which at least one kernel ran. classes: the same by class; where kernels overlap, as those do that are
        launched before their predecessor has ended, the time is the earlier one's. sum_us: the sum of all kernels'
        lengths, overlaps counted twice. kernels: how many.
    """

    us: float
    sum_us: float
    kernels: float
    classes: dict[str, float]


def kernel_class(name: str) -> str:
    """The class of a kernel."""
    return next((cls for cls, rule in RULES if re.search(rule, name)), OTHER)


def own_time(kernels: Iterable[ProfiledKernel]) -> list[tuple[ProfiledKernel, float]]:
    """Each kernel, in order of start, and the microseconds during which no earlier one was still running."""
    found, busy_until = [], float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start):
        end = kernel.start + kernel.us
        found.append((kernel, max(0.0, end - max(kernel.start, busy_until))))
        busy_until = max(busy_until, end)
    return found


def window(kernels: Sequence[ProfiledKernel], steps: int) -> Window:
    """The figures of one step, from the kernels of a window."""
    classes: defaultdict[str, float] = defaultdict(float)
    for kernel, us in own_time(kernels):
        classes[kernel_class(kernel.name)] += us / steps
    total = sum(kernel.us for kernel in kernels)
    return Window(sum(classes.values()), total / steps, len(kernels) / steps, dict(classes))


def by_name(kernels: Sequence[ProfiledKernel], steps: int) -> list[tuple[str, str, float, float]]:
    """(class, name, times a step, own microseconds a step) of every kernel, the longest first."""
    count: Counter[str] = Counter()
    us: defaultdict[str, float] = defaultdict(float)
    for kernel, own in own_time(kernels):
        count[kernel.name] += 1
        us[kernel.name] += own
    return [(kernel_class(n), n, count[n] / steps, t / steps) for n, t in sorted(us.items(), key=lambda item: -item[1])]


def recorded(run: Callable[[], object]) -> list[ProfiledKernel]:
    """The GPU kernels, copies and fills of a call; none where there is no GPU."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        run()
        return []
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return [
        ProfiledKernel(e.name, e.time_range.start, e.time_range.elapsed_us())
        for e in trace.events() or ()
        if e.device_type == torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    ]
