"""Launching a kernel without what Triton works out anew at every call.

`kernel[grid](...)` looks at each argument, spells out its options and walks through the globals that the kernel reads,
to find the binary that it launched the call before. That is a third of the Python of a launch, which counts where a
prompt is short and the GPU waits for the CPU. Here the binary is looked up by what decides over it, and Triton is asked
once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normquant.kernels.launch import Config, Target, on_device

INT32_MAX = 2**31 - 1

_binaries: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[torch.Tensor | None],
    numbers: Sequence[float],
    where: Target,
    config: Config,
    **constants: Any,
) -> None:
    """Launch on the tensors' device: first all tensors, then the numbers, then the constants, in the kernel's order.

    numbers: those that the kernel does not specialize on, of which only the width in bits counts.
    """
    device = tensors[0].device  # type: ignore[union-attr]
    key = (
        kernel,
        device,
        config.num_warps,
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
        *[n > INT32_MAX for n in numbers],
        *constants.values(),
    )
    binary = _binaries.get(key)
    with on_device(device):
        if binary is not None:
            binary[grid](*tensors, *numbers, *constants.values())
            return
        binary = kernel[grid](*tensors, *numbers, **constants, **where.options(config))
    if binary is not None:  # the interpreter has none
        if kernel.arg_names[-len(constants) :] != list(constants):
            raise TypeError(f"{kernel.__name__} takes its constants as {kernel.arg_names[-len(constants) :]}")
        _binaries[key] = binary
