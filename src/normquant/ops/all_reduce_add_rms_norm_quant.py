"""All-reduce, residual add, RMSNorm and group quantization: the ops of a process group.

The parts of a sum, one on each rank, are added in rank order in fp32 and rounded once to their dtype; then as the norms
of one rank. Every rank gets the same bits, whatever computes them.

These ops are not in `OPS` and register themselves: what runs them on a GPU is the workspace of their group, not a plan
for their arguments alone, and a single process can neither warm them up nor benchmark them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from normquant import reference
from normquant.ops._examples import EPS
from normquant.ops._gather import gather, group_of
from normquant.ops._group_calls import prepare, runner
from normquant.ops._op import DEFAULT, Launcher, checked, define
from normquant.ops._tensors import activation, check_eps, check_norm, check_weight_offset, fake_quant, rows
from normquant.spec import QuantizedActivation, QuantSpec

NAME = "all_reduce_add_rms_norm_quant"


def all_reduce_add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = EPS,
    *,
    group: dist.ProcessGroup,
    spec: QuantSpec = DEFAULT,
    weight_offset: float = 0.0,
    sharded: bool = False,
    return_norm: bool = False,
) -> tuple[torch.Tensor | QuantizedActivation, ...]:
    """RMSNorm of the sum of x over all ranks plus the residual, quantized in groups; in one kernel up to some size.

    As `add_rms_norm_quant` of the sum, which is added in rank order in fp32 and rounded once to x's dtype. Every rank
    of the group calls this with inputs of one shape, in the same order, and gets the same bits.

    x: [..., K], this rank's part. residual: like x, the same on all ranks, or None.
    group: its workspace is open (`normquant.distributed.open_workspace`) where x is on a GPU.
    sharded: of the residual a rank reads only the rows that it owns (`own_rows`), and of the returned sum only those
        are written: fewer bytes, where nothing but the next of these ops reads the sum.

    Returns the quantized norm, the sum [..., K] (with the residual) and with return_norm the norm [..., K], in x's
    dtype. Raises ValueError as `add_rms_norm_quant` does, and `MissingRank` where a rank does not come in time.
    """
    op = GroupOp(residual is not None, True, return_norm)
    data, scale, *others = op(x, residual, weight, eps, weight_offset, sharded, group, spec)
    return activation(x.shape[:-1], (data, scale), spec), *(t.view(x.shape) for t in others)


def all_reduce_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = EPS,
    *,
    group: dist.ProcessGroup,
    weight_offset: float = 0.0,
    sharded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without the quantization -> the norm and the sum, both like x."""
    op = GroupOp(residual is not None, False, True)
    total, norm = op(x, residual, weight, eps, weight_offset, sharded, group, DEFAULT)
    return norm.view(x.shape), total.view(x.shape)


def op_name(with_residual: bool, quantized: bool, normed: bool) -> str:
    """The op of these inputs and outputs; the norm alone is the output of an op that does not quantize."""
    name = f"all_reduce_{'add_' if with_residual else ''}rms_norm{'_quant' if quantized else ''}"
    return f"{name}_with_norm" if quantized and normed else name


def own_rows(m: int, rank: int, world: int) -> slice:
    """The rows of m that a rank owns: ceil(m / world) neighbours, at the end fewer or none."""
    chunk = -(-m // world)
    return slice(min(m, rank * chunk), min(m, (rank + 1) * chunk))


def check(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    spec: QuantSpec,
) -> None:
    """As for the norms of one rank; and rows of x and the residual lie a multiple of 8 values apart."""
    check_norm(x, residual, weight, spec)
    check_eps(eps)
    check_weight_offset(weight_offset)
    for name, t in (("x", x), ("residual", residual)):
        if t is not None and t.stride(0) % 8 and t.shape[0] > 1:
            raise ValueError(f"{name} has stride {tuple(t.stride())}; accepted: rows a multiple of 8 values apart")


def on_cpu(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    sharded: bool,
    group_name: str,
    spec: QuantSpec,
) -> tuple[torch.Tensor, ...]:
    """The reference on what all ranks have: data, scale, sum and norm."""
    parts = gather(x, group_name, NAME)  # [ranks, M, K]
    spec = spec.at(x.shape[0])
    if not sharded:
        return reference.all_reduce_add_rms_norm_quant(parts, residual, weight, eps, spec, weight_offset)
    group = group_of(group_name)
    m, world = x.shape[0], group.size()
    own = own_rows(m, group.rank(), world)
    total, y = reference.all_reduce_norm(
        parts[:, own], residual[own] if residual is not None else None, weight, eps, spec, weight_offset
    )
    padded = y.new_zeros((-(-m // world), x.shape[1]))
    padded[: y.shape[0]] = y
    y = gather(padded, group_name, NAME).flatten(0, 1)[:m]
    whole = torch.zeros_like(x)
    whole[own] = total
    return *reference.group_quant(y, spec), whole, y.to(x.dtype)


@dataclass(frozen=True)
class GroupOp:
    """One of the ops, by its inputs and outputs.

    check, fake, reference and launcher take its arguments with the spec decoded, as those of an `Op`; cpu and cuda are
    what torch's dispatcher calls.
    """

    with_residual: bool
    quantized: bool
    normed: bool

    @property
    def name(self) -> str:
        """As torch knows it."""
        return op_name(self.with_residual, self.quantized, self.normed)

    @property
    def schema(self) -> str:
        """Arguments and outputs; the spec is encoded."""
        residual = "Tensor residual, " * self.with_residual
        outputs = ["Tensor data", "Tensor scale"] * self.quantized + ["Tensor sum"] + ["Tensor norm"] * self.normed
        inputs = f"Tensor x, {residual}Tensor weight, float eps, float weight_offset, bool sharded, str group, str spec"
        return f"({inputs}) -> ({', '.join(outputs)})"

    @property
    def overload(self) -> torch._ops.OpOverload:
        """What torch calls."""
        return getattr(torch.ops.normquant, self.name).default

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        sharded: bool,
        group: dist.ProcessGroup,
        spec: QuantSpec,
    ) -> tuple[torch.Tensor, ...]:
        """Call torch's op."""
        tensors = (rows("x", x), *(() if residual is None else (rows("residual", residual),)), weight)
        return self.overload(*tensors, eps, weight_offset, sharded, group.group_name, spec.encode())

    def check(self, *args: Any) -> None:
        """Raise ValueError for arguments that are not accepted."""
        x, residual, weight, eps, weight_offset, *_, spec = self._filled(args)
        check(x, residual, weight, eps, weight_offset, spec)

    def fake(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Outputs of the right shapes."""
        x, spec = args[0], args[-1]
        made = fake_quant(x, x.shape[0], x.shape[1], spec) if self.quantized else ()
        return *made, *(x.new_empty(x.shape) for _ in range(1 + self.normed))

    def reference(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """The outputs, on CPUs."""
        data, scale, total, norm = on_cpu(*self._filled(args))
        return *(data, scale)[: 2 * self.quantized], total, *(norm,)[: self.normed]

    def launch(self, *args: Any) -> Launcher:
        """What launches on the tensors of arguments like these, the spec encoded."""
        return checked(self, self.launcher)(*args)

    def launcher(self, *args: Any) -> Launcher:
        """The same for checked arguments, the spec decoded; x may be `PartialRows`."""
        rest, spec = args[:-1], args[-1]
        return runner(args[-2]).launcher(self.with_residual, self.quantized, self.normed, *rest, spec.encode())

    def cpu(self, *args: Any) -> Any:
        """The reference's outputs."""
        prepare(self.name, *args)
        return checked(self, self.reference)(*args)

    def cuda(self, *args: Any) -> Any:
        """What the group's runner makes of it."""
        prepare(self.name, *args)
        return runner(args[-2])(self.name, self.with_residual, self.quantized, self.normed, *args)

    def _filled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments with a residual, or None."""
        return args if self.with_residual else (args[0], None, *args[1:])


def _register(op: GroupOp) -> GroupOp:
    define(op.name, op.schema, checked(op, op.fake), op.cpu, op.cuda)
    return op


_KINDS = product((False, True), ((True, False), (True, True), (False, True)))  # quantized, with the norm
GROUP_OPS = {op.name: _register(op) for op in (GroupOp(add, *outputs) for add, outputs in _KINDS)}
