"""A block-FP8 product and the op of ours that reads it become one op, which can split the product over K.

    x = block_fp8_linear(data, scale, weight, weight_scale)     [M, N] bf16 or fp16, read by nothing else
    y = silu_mul_quant(x)                                       or any other op of ours that takes rows, a group's, too

`linear.pairs` says what the pair computes. With the product split, a row's sum is added up in another order than in the
product that is replaced, so pairs have a switch of their own, `Rules.products`: by default those are made that were
measured to be faster. Weights and scales are read as they are; where the pair does not accept them the site stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite
from normquant.compile.find.block_products import Product, product_of
from normquant.compile.find.graph import (
    RESHAPES,
    Unsupported,
    aten,
    is_call,
    mutation_regions,
    op_name,
    value,
)
from normquant.compile.find.graph import arguments as arguments_of
from normquant.compile.fusions.candidate import Candidate, Findings, Rejection, rejected, site_name, source_line
from normquant.compile.policy import Decision
from normquant.linear import GROUP_PAIRS, PAIRS, GroupPair, Pair
from normquant.linear.choice import pays
from normquant.linear.pairs import rivals
from normquant.ops import Op
from normquant.spec import QuantSpec

AnyPair = Pair[Op] | GroupPair
ALL_PAIRS: tuple[AnyPair, ...] = (*PAIRS.values(), *GROUP_PAIRS.values())
READERS = {pair.op.overload: pair for pair in ALL_PAIRS}


def find(graph: Graph) -> Findings:
    """Every op of ours whose rows a product makes."""
    for reader in list(graph.nodes):
        if reader.op == "call_function" and (pair := READERS.get(reader.target)) is not None:
            found = _found(reader, pair, mutation_regions(graph))
            if found is not None:
                yield found


def _found(reader: Node, pair: AnyPair, regions: dict[Node, int]) -> Candidate | Rejection | None:
    args = arguments_of(reader)
    product = product_of(args[0])
    # A sum has no first and second; but of a group's the residual is no part of what is reduced.
    either = not isinstance(pair, GroupPair) and pair.op.argument_names[1:2] == ("residual",)
    if product is None and either:
        args = (args[1], args[0], *args[2:])
        product = product_of(args[0])
    if product is None:
        return None
    name, where = f"{site_name(product.node)} -> {pair.op.name}", source_line(reader)
    x = value(args[0])
    k, n, m = product.k, product.columns, x.shape[0]
    decision = pays(pair.op.name, k, n, x.device, m if isinstance(m, int) else None, rivals(product.otherwise))
    spec = QuantSpec.decode(args[-1])
    try:
        if regions[product.node] != regions[reader]:
            raise Unsupported("a tensor is changed in place between the product and its reader")
        _check(reader, args, product, pair, spec)
    except Unsupported as reason:
        known: dict[str, Any] = {"m": str(x.shape[0]), "k": k, "dtype": str(x.dtype).removeprefix("torch.")}
        return rejected(name, where, str(reason), **known) if decision.split else None
    wanted = "auto" if decision.split else "always"  # asked for, though nothing was measured
    return Candidate(
        name, where, pair.name, x, x.shape[0], k, spec, partial(_replace, reader, args[1:], product, pair, wanted),
        listed=True, own=Decision("fused" if decision.split else "stock", decision.reason),
    )  # fmt: skip


def _check(reader: Node, args: tuple[Any, ...], product: Product, pair: AnyPair, spec: QuantSpec) -> None:
    """Raise Unsupported where the pair would not compute what both do."""
    first, *rest = args
    if product.refused:
        raise Unsupported(product.refused)
    if value(first).shape[1] != product.columns:
        raise Unsupported(f"rows of {value(first).shape[1]} values are read of a product with {product.columns}")
    others = sorted({op_name(user) for user in _readers(product.node) if user is not reader})
    if others:
        raise Unsupported(f"the product is also read by {', '.join(others)}")
    given = [value(arg) if isinstance(arg, Node) else arg for arg in _first_arguments(product, "auto")]
    others_given = [value(arg) if isinstance(arg, Node) else arg for arg in rest[:-1]]
    try:
        pair.check(*given, *others_given, spec)
    except ValueError as error:
        raise Unsupported(f"{pair.name} does not accept this: {error}") from None


def _first_arguments(product: Product, wanted: str) -> tuple[Any, ...]:
    return (*product.tensors, product.dtype, wanted, product.otherwise)


def _readers(node: Node) -> Iterator[Node]:
    """Those that read a node, by way of views or not."""
    for user in node.users:
        if is_call(user, *RESHAPES):
            yield from _readers(user)
        elif not is_call(user, aten.sym_size.int):
            yield user


def _replace(
    reader: Node, rest: tuple[Any, ...], product: Product, pair: AnyPair, wanted: str, new: Builder
) -> Rewrite:
    with new.before(reader):
        made = new(pair.overload, *_first_arguments(product, wanted), *rest)
    return Rewrite(((reader, made),), like=reader, note="the kernel can add a split product's partial sums")
