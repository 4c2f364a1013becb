"""A product and the op that reads it, as one op: the op's kernel adds the partial sums of a product that is split.

Each op of ours that takes rows has its pair. The pair takes the product's arguments in place of x, and gives what the
op gives for x = block_fp8_linear(...) in `dtype`:

    block_fp8_linear_silu_mul_quant(data, scale, weight, weight_scale, dtype, wanted, otherwise, limit, spec)
        -> (data, scale)

Which kernels run is decided at the call, for its number of rows (`choice`): the split product and a kernel that reads
partial sums, or the product of today and the op. A compiled graph holds one op for any number of rows. `otherwise` is
the operator of a product that is not split, with what it takes beside the four tensors, in integers: "" for
`block_fp8_linear`, "normquant_vllm::block_fp8_linear 32 1". Only CUDA has others.

The ops of a group have pairs of their own, for row-parallel products: a rank adds the partial sums of its part, rounds
them once, and sends that. Rows are sent in the same form with and without a split, so the ranks need not agree on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from normquant.linear.choice import Rivals, choose
from normquant.linear.product import RIVALS, check_product, dequantized_linear
from normquant.linear.split_product import launch_pair, split_product
from normquant.ops import OPS, Op
from normquant.ops._gradients import refuse_gradients
from normquant.ops._group_calls import is_prepared, prepare, runner
from normquant.ops._op import Launcher, cached, define, launch_of
from normquant.ops.all_reduce_add_rms_norm_quant import GROUP_OPS, GroupOp
from normquant.spec import ACTIVATION_DTYPES, QuantSpec

OF_PRODUCT = 5  # arguments: data, scale, weight, weight_scale, dtype
GIVEN = "Tensor data, Tensor scale, Tensor weight, Tensor weight_scale, ScalarType dtype, str wanted, str otherwise"
OpT = TypeVar("OpT", Op, GroupOp)


@dataclass(frozen=True)
class Pair(Generic[OpT]):
    """The pair of an op. Its functions take the arguments of the pair."""

    op: OpT

    @property
    def name(self) -> str:
        return f"block_fp8_linear_{self.op.name}"

    @property
    def schema(self) -> str:
        return self.op.schema.replace("(Tensor x", f"({GIVEN}", 1)

    @property
    def overload(self) -> torch._ops.OpOverload:
        """What torch calls."""
        return getattr(torch.ops.normquant, self.name).default

    def check(self, *args: Any) -> None:
        """Raise ValueError for arguments, the spec decoded, that the product or the op does not accept."""
        product, _, rest = _parts(args)
        _unsplit_product(args[OF_PRODUCT + 1])
        if product[-1] not in ACTIVATION_DTYPES:
            raise ValueError(f"dtype is {product[-1]}; accepted: bfloat16, float16")
        check_product(*product)
        self.op.check(_rows_like(product), *rest)

    def fake(self, *args: Any) -> Any:
        """Outputs of the same shapes, strides and dtypes."""
        product, _, rest = _parts(self._checked(args))
        return self.op.fake(_rows_like(product), *rest)

    def reference(self, *args: Any) -> Any:
        """The outputs, in torch on any device."""
        args = self._checked(args)
        product, _, rest = _parts(args)
        multiply = split_product if self._is_split(args) else dequantized_linear
        return self.op.reference(multiply(*product), *rest)

    def launcher(self, *args: Any) -> Launcher:
        """What launches on CUDA tensors like these."""
        product, _, rest = _parts(self._checked(args))
        return launch_pair(self.op, product, rest) if self._is_split(args) else self._unfolded(args)

    def warmup_settings(self: Pair[Op], *args: Any) -> tuple[dict[str, Any], tuple[int, int]]:
        """The op's own for arguments of the pair, the spec encoded, and K and N of the product."""
        product, _, rest = _parts(args)
        return self.op.warmup_settings(_rows_like(product), *rest), (product[0].shape[1], product[2].shape[0])

    def _unfolded(self, args: tuple[Any, ...]) -> Launcher:
        """The product of today and the op, on the tensors among arguments like these.

        What a product gives for the same shapes is laid out alike, so the op's launch is made once, at the first call.
        """
        product, _, rest = _parts(args)
        multiply, dtype, read = _unsplit_product(args[OF_PRODUCT + 1]), product[-1], None

        def launch(
            data: torch.Tensor,
            scale: torch.Tensor,
            weight: torch.Tensor,
            weight_scale: torch.Tensor,
            *others: torch.Tensor,
        ) -> list[torch.Tensor]:
            nonlocal read
            x = multiply(data, scale, weight, weight_scale, dtype)
            if read is None:
                read = self.op.launch(x, *rest)
            return read(x, *others)

        return launch

    def _checked(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        refuse_gradients(self.name, args)
        args = (*args[:-1], QuantSpec.decode(args[-1]))
        self.check(*args)
        return args

    def _is_split(self, args: tuple[Any, ...]) -> bool:
        (data, _, weight, *_), wanted, _ = _parts(args)
        (m, k), n = data.shape, weight.shape[0]
        return choose(self.op.name, k, n, m, data.device, wanted, rivals(args[OF_PRODUCT + 1])).split


@dataclass(frozen=True)
class GroupPair(Pair[GroupOp]):
    """The pair of an op of a group."""

    def cpu(self, *args: Any) -> Any:
        """The reference's outputs."""
        self._prepare(args)
        return self.reference(*args)

    def cuda(self, *args: Any) -> Any:
        """What the group's runner makes of it, or of the op after the product."""
        self._prepare(args)
        return runner(args[-2]).cached(self.name, self.launcher)(*args)

    def _prepare(self, args: tuple[Any, ...]) -> None:
        product, _, rest = _parts(args)
        if not is_prepared(rest[-2]):
            prepare(self.op.name, _rows_like(product), *rest)


def _parts(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, tuple[Any, ...]]:
    """The arguments of the product, `wanted`, and the op's own; `otherwise` is left out."""
    return args[:OF_PRODUCT], args[OF_PRODUCT], args[OF_PRODUCT + 2 :]


def rivals(otherwise: str) -> Rivals:
    """The products of which one runs where none is split, by their names in the table of choices; () for any."""
    return () if otherwise else RIVALS


def _unsplit_product(otherwise: str) -> Callable[..., torch.Tensor]:
    """What takes the arguments of a product on CUDA, dtype among them. Raises ValueError where nothing does."""
    if not otherwise:
        return launch_of(torch.ops.normquant.block_fp8_linear.default)
    name, *numbers = otherwise.split()
    library, _, op = name.partition("::")
    if not hasattr(getattr(torch.ops, library), op):
        raise ValueError(f"otherwise is {otherwise!r}; {name} is not defined in this process")
    overload = getattr(getattr(torch.ops, library), op).default
    types = [str(argument.type) for argument in overload._schema.arguments[4:]]
    own = [int(n) != 0 if of == "bool" else int(n) for n, of in zip(numbers, types, strict=True)]
    run = launch_of(overload)
    return lambda data, scale, weight, weight_scale, dtype: run(data, scale, weight, weight_scale, *own)


def _rows_like(product: tuple[Any, ...]) -> torch.Tensor:
    data, _, weight, _, dtype = product
    return data.new_empty((data.shape[0], weight.shape[0]), dtype=dtype)


def _register(op: Op) -> Pair[Op]:
    pair = Pair(op)
    define(pair.name, pair.schema, pair.fake, pair.reference, cached(pair.name, pair.launcher))
    return pair


def _register_of_group(op: GroupOp) -> GroupPair:
    pair = GroupPair(op)
    define(pair.name, pair.schema, pair.fake, pair.cpu, pair.cuda)
    return pair


PAIRS = {op.name: _register(op) for op in OPS.values()}
GROUP_PAIRS = {op.name: _register_of_group(op) for op in GROUP_OPS.values()}
