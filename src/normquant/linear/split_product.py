"""The product of few rows, split over K: its partial sums, and their sum where no kernel of ours reads them.

A launcher takes checked tensors and knows everything else; `normquant.ops` caches it by shape, stride and dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from normquant import reference
from normquant.kernels.product_configs import blocks_of_part, split_of
from normquant.ops import Op
from normquant.ops._op import Launcher
from normquant.ops.all_reduce_add_rms_norm_quant import GroupOp

if TYPE_CHECKING:
    from normquant.kernels.configs import Config


def split_product(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What the kernels compute, in torch on any device: data [M, K], weight [N, K] -> [M, N] in dtype."""
    k, n = data.shape[1], weight.shape[0]
    parts = reference.block_fp8_linear(data, scale, weight, weight_scale, blocks_of_part(k, split_of(k, n)))
    return reference.sum_of_parts(parts, dtype)


def launch_product(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> Launcher:
    """A launcher of the product of tensors like these and of the sum: four tensors -> [[M, N] in dtype]."""
    from normquant.kernels.launch import Launch
    from normquant.kernels.sum_of_parts import plan_sum_of_parts

    product, rows = _planned(data, scale, weight, weight_scale, dtype)
    return _in_turn(Launch(product), Launch(plan_sum_of_parts(rows)))


def launch_pair(
    op: Op | GroupOp, product_args: tuple[Any, ...], rest: tuple[Any, ...], config: Config | None = None
) -> Launcher:
    """A launcher of the product and of an op that reads it as its x: their tensors in turn -> the op's outputs.

    product_args: data, scale, weight, weight_scale, dtype. rest: the op's other arguments, the spec decoded.
    config: the op's, unless it chooses itself; an op of a group does.
    """
    from normquant.kernels.launch import Launch

    product, rows = _planned(*product_args)
    chosen = {} if config is None else {"config": config}
    return _in_turn(Launch(product), op.launcher(rows, *rest, **chosen))


def _planned(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> tuple[Any, Any]:
    """The plan of the product, and the rows that its partial sums stand for."""
    from normquant.kernels.block_fp8_linear import plan_block_fp8_linear
    from normquant.kernels.partial_rows import PartialRows

    (m, k), n = data.shape, weight.shape[0]
    rows = PartialRows(m, n, split_of(k, n), dtype, data.device)
    return plan_block_fp8_linear(data, scale, weight, weight_scale), rows


def _in_turn(product: Launcher, consumer: Launcher) -> Launcher:
    def launch(
        data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, *others: torch.Tensor
    ) -> list[torch.Tensor]:
        return consumer(*product(data, scale, weight, weight_scale), *others)

    return launch
