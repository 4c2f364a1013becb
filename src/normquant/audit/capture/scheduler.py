"""Reads Inductor's scheduler nodes into a `Program`.

Runs inside a compile, after code generation: `V.graph` is the graph being compiled, and its scheduler has the nodes in
launch order.
"""

import math
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from normquant.audit.program import Access, Buffer, Extern, Kernel, Origin, Program, ProgramLaunch

Reasons = Iterable[tuple[str, str, str]]  # a node, another, why they were not fused

_GENERAL_REASONS = ("no shared data", "intermediate nodes between")
# Packages whose frames say what is computed, and not where in a model.
_BUILDING_BLOCKS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))
_TRITON_KINDS = (("persistent_reduction", "_per_"), ("reduction", "_red_"), ("template", "_tem_"), ("foreach", "_for_"))


def read_program(graph: Any, kernel_names: Mapping[str, str], reasons: Reasons) -> Program:
    """The program that `graph`'s scheduler launches.

    `kernel_names` maps a scheduler node's name to the generated kernel that holds it; `reasons` lists pairs of nodes
    that were not fused, and why.
    """
    nodes = [node for node in graph.scheduler.nodes if _is_launch(node)]
    launches: list[ProgramLaunch] = []
    owner = {name: kernel_names.get(name, node.get_name()) for node in nodes for name in _member_names(node)}
    parts, why = _parts(graph.scheduler.nodes), _between_kernels(reasons, owner)
    for node in nodes:
        position = len(launches)
        launches.append(_extern(position, node, parts) if _is_extern(node) else _kernel(position, node, owner, why))
    outputs = tuple(graph.get_output_names())
    return Program(tuple(launches), _buffers(graph, launches, outputs), outputs, name=graph.name or "")


def _between_kernels(reasons: Reasons, owner: Mapping[str, str]) -> dict[str, dict[str, list[str]]]:
    """Why kernels were not fused: kernel -> other kernel -> reasons. A fused node's name joins its members' names."""

    def kernel(name: str) -> str | None:
        owners = {owner[part] for part in (name, *name.split("_")) if part in owner}
        return owners.pop() if len(owners) == 1 else None

    found: dict[str, dict[str, list[str]]] = {}
    for first, second, reason in reasons:
        pair = kernel(first), kernel(second)
        if pair[0] and pair[1] and pair[0] != pair[1]:
            for one, other in (pair, pair[::-1]):
                held = found.setdefault(str(one), {}).setdefault(str(other), [])
                if reason not in held:
                    held.append(reason)
    return found


def _is_launch(node: Any) -> bool:
    from torch._inductor import ir, scheduler

    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return False
    # one of the outputs of a call is a name, not a call
    return not isinstance(getattr(node, "node", None), ir.MultiOutput)


def _parts(nodes: Iterable[Any]) -> dict[str, list[Access]]:
    """The outputs of calls that have several, by the name of the call's buffer."""
    from torch._inductor import ir

    found: dict[str, list[Access]] = {}
    for node in nodes:
        part = getattr(node, "node", None)
        if isinstance(part, ir.MultiOutput) and isinstance(part.layout, ir.Layout):
            call: Any = part.inputs[0]
            size = _numel(part.layout.size) * part.layout.dtype.itemsize
            found.setdefault(call.get_name(), []).append(Access(part.get_name(), size))
    return found


def _is_extern(node: Any) -> bool:
    from torch._inductor import scheduler

    return isinstance(node, scheduler.ExternKernelSchedulerNode)


def _member_names(node: Any) -> list[str]:
    return [member.get_name() for member in node.get_nodes()]


def _kernel(position: int, node: Any, owner: Mapping[str, str], why: Mapping[str, dict[str, list[str]]]) -> Kernel:
    members = list(node.get_nodes())
    name = owner[members[0].get_name()]
    return Kernel(
        position=position,
        name=name,
        kind=next((kind for kind, mark in _TRITON_KINDS if mark in name), "pointwise"),
        reads=_accesses(node, writes=False),
        writes=_accesses(node, writes=True),
        origins=_origins(members),
        aten=_aten(members),
        why_not_fused=tuple((other, "; ".join(_specific(reasons))) for other, reasons in why.get(name, {}).items()),
    )


def _specific(reasons: list[str]) -> list[str]:
    """The reasons that do not hold for almost every pair at some point of the search; all, when there are no others."""
    return [reason for reason in reasons if not reason.startswith(_GENERAL_REASONS)] or reasons


def _extern(position: int, node: Any, parts: Mapping[str, list[Access]]) -> Extern:
    writes = _accesses(node, writes=True)
    return Extern(
        position=position,
        name=extern_name(node.node),
        reads=_accesses(node, writes=False),
        writes=tuple(part for access in writes for part in parts.get(access.buffer, [access])),
        origins=_origins([node]),
        aten=_aten([node]),
        mutates=tuple(name for output in node.get_outputs() for name in output.get_mutations()),
    )


def extern_name(operation: Any) -> str:
    """`namespace.operator` of an opaque call."""
    overload = getattr(operation, "op_overload", None)
    if overload is not None:
        namespace, _, rest = str(overload).partition(".")
        return f"{namespace}.{rest.split('.')[0]}"
    return str(getattr(operation, "python_kernel_name", None) or type(operation).__name__)


def _accesses(node: Any, *, writes: bool) -> tuple[Access, ...]:
    counted = node.get_read_write_buffer_accesses(include_reads=not writes, include_writes=writes)
    return tuple(Access(name, int(count)) for name, count in counted.items())


def _origins(members: Iterable[Any]) -> tuple[Origin, ...]:
    found: dict[tuple[str, int], Origin] = {}
    for member in members:
        for fx_node in getattr(member.node, "origins", None) or ():
            origin = _parse_stack(fx_node.meta.get("stack_trace") or "")
            if origin is not None:
                found.setdefault((origin.file, origin.line), origin)
    return tuple(sorted(found.values(), key=lambda origin: (origin.file, origin.line)))


def _parse_stack(trace: str) -> Origin | None:
    """The innermost frame of a formatted stack trace that is a model's: torch's and our own only where no other is."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    frames = []
    for line, following in pairwise([*lines, ""]):
        if line.startswith('File "'):
            path, _, rest = line.removeprefix('File "').partition('", line ')
            number = rest.split(",")[0]
            frames.append(Origin(path, int(number) if number.isdigit() else 0, following))
    own = [frame for frame in frames if not frame.file.startswith(_BUILDING_BLOCKS)]
    return next(reversed(own or frames), None)


def _aten(members: Iterable[Any]) -> tuple[str, ...]:
    names = {str(n.target) for m in members for n in getattr(m.node, "origins", None) or () if n.op == "call_function"}
    return tuple(sorted(name.removesuffix(".default") for name in names))


def _buffers(graph: Any, launches: Iterable[ProgramLaunch], outputs: tuple[str, ...]) -> dict[str, Buffer]:
    names = {access.buffer for launch in launches for access in (*launch.reads, *launch.writes)}
    return {name: _buffer(graph, name, outputs) for name in sorted(names)}


def _buffer(graph: Any, name: str, outputs: tuple[str, ...]) -> Buffer:
    named = {"input": graph.graph_inputs, "constant": graph.constants, "output": outputs}
    role = next((role for role, names in named.items() if name in names), "intermediate")
    held = graph.try_get_buffer(name)
    layout = held.maybe_get_layout() if hasattr(held, "maybe_get_layout") else None
    size, stride = getattr(layout, "size", ()), getattr(layout, "stride", ())
    if layout is None or not hasattr(layout, "dtype") or not hasattr(layout, "size"):  # several outputs, or no tensor
        return Buffer(name, "", (), (), 0, role, name)
    dtype, texts = str(layout.dtype).removeprefix("torch."), [tuple(map(str, sizes)) for sizes in (size, stride)]
    return Buffer(name, dtype, texts[0], texts[1], _numel(size) * layout.dtype.itemsize, role, name)


def _numel(size: Iterable[Any]) -> int:
    from torch._inductor.virtualized import V

    sizevars: Any = V.graph.sizevars
    hint = getattr(sizevars, "optimization_hint", None) or sizevars.size_hint  # renamed between torch versions
    return math.prod(int(hint(extent)) for extent in size)
