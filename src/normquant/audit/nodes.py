"""Inductor's scheduler nodes, read into a `Program`.

Runs inside a compile, after the code was generated: `V.graph` is the graph being compiled, and the scheduler holds its
nodes in launch order.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from normquant.audit.program import COPY_LAYOUT, COPY_SAME, Access, Buffer, Copy, Extern, Kernel, Launch, Origin, Program

_TRITON_KINDS = (("persistent_reduction", "_per_"), ("reduction", "_red_"), ("template", "_tem_"), ("foreach", "_for_"))


def read_program(graph: Any, kernel_names: Mapping[str, str], reasons: Mapping[str, list[tuple[str, str]]]) -> Program:
    """The program that `graph`'s scheduler launches.

    `kernel_names` maps a scheduler node's name to the generated kernel that holds it, `reasons` a node's name to
    (other node, why it was not fused with it).
    """
    nodes = [node for node in graph.scheduler.nodes if _launches(node)]
    launches: list[Launch] = []
    owner = {name: kernel_names.get(name, node.get_name()) for node in nodes for name in _member_names(node)}
    parts = _parts(graph.scheduler.nodes)
    for node in nodes:
        position = len(launches)
        launches.append(_extern(position, node, parts) if _is_extern(node) else _kernel(position, node, owner, reasons))
    outputs = tuple(graph.get_output_names())
    return Program(tuple(launches), _buffers(graph, launches, outputs), outputs, name=graph.name or "")


def _launches(node: Any) -> bool:
    from torch._inductor import ir, scheduler

    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return False
    # the i-th output of a call is a name, not a call
    return not isinstance(getattr(node, "node", None), ir.MultiOutput)


def _parts(nodes: Iterable[Any]) -> dict[str, list[Access]]:
    """The outputs of calls that have several: the name of the call's buffer -> its parts."""
    from torch._inductor import ir

    found: dict[str, list[Access]] = {}
    for node in nodes:
        part = getattr(node, "node", None)
        if isinstance(part, ir.MultiOutput) and hasattr(part.layout, "dtype"):
            numel = _numel(part.layout.size)
            found.setdefault(part.inputs[0].get_name(), []).append(
                Access(part.get_name(), numel * part.layout.dtype.itemsize)
            )
    return found


def _is_extern(node: Any) -> bool:
    from torch._inductor import scheduler

    return isinstance(node, scheduler.ExternKernelSchedulerNode)


def _member_names(node: Any) -> list[str]:
    return [member.get_name() for member in node.get_nodes()]


def _kernel(position: int, node: Any, owner: Mapping[str, str], reasons: Mapping[str, list[tuple[str, str]]]) -> Kernel:
    members = list(node.get_nodes())
    name = owner[members[0].get_name()]
    copies = [copy for copy in map(_copy, members) if copy is not None]
    why = {(owner.get(other, other), reason) for n in [node.get_name(), *_member_names(node)]
           for other, reason in reasons.get(n, ())}  # fmt: skip
    return Kernel(
        position=position,
        name=name,
        kind=next((kind for kind, mark in _TRITON_KINDS if mark in name), "pointwise"),
        reads=_accesses(node, writes=False),
        writes=_accesses(node, writes=True),
        origins=_origins(members),
        aten=_aten(members),
        rows=str(members[0].group[1][0]) if getattr(members[0], "group", None) else "",
        copies=tuple(copies),
        is_copy=len(copies) == len(members),
        why_not_fused=tuple(sorted(pair for pair in why if pair[0] != name)),
    )


def _extern(position: int, node: Any, parts: Mapping[str, list[Access]]) -> Extern:
    writes = _accesses(node, writes=True)
    return Extern(
        position=position,
        name=extern_name(node.node),
        reads=_accesses(node, writes=False),
        writes=tuple(part for access in writes for part in parts.get(access.buffer, [access])),
        origins=_origins([node]),
        aten=_aten([node]),
        mutates=tuple(node.node.get_mutation_names()) if hasattr(node.node, "get_mutation_names") else (),
    )


def extern_name(operation: Any) -> str:
    """`namespace.operator` of a call that Inductor did not generate."""
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
    """The innermost frame of a formatted stack trace."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith('File "'):
            path, _, rest = lines[index].removeprefix('File "').partition('", line ')
            number = rest.split(",")[0]
            code = lines[index + 1] if index + 1 < len(lines) else ""
            return Origin(path, int(number) if number.isdigit() else 0, code)
    return None


def _aten(members: Iterable[Any]) -> tuple[str, ...]:
    names = {str(n.target) for m in members for n in getattr(m.node, "origins", None) or () if n.op == "call_function"}
    return tuple(sorted(name.removesuffix(".default") for name in names))


def _copy(member: Any) -> Copy | None:
    """How a loop body that only moves elements moves them; None when it computes something."""
    body = getattr(member, "_body", None)
    if body is None or member.is_reduction() or body.subblocks:
        return None
    calls = [n for n in body.root_block.graph.nodes if n.op == "call_method"]
    if not {n.target for n in calls} <= {"get_index", "load", "to_dtype", "store"}:
        return None
    loads, stores = [n for n in calls if n.target == "load"], [n for n in calls if n.target == "store"]
    reads, writes = list(member.read_writes.reads), list(member.read_writes.writes)
    if len(loads) != 1 or len(stores) != 1 or len(reads) != 1 or len(writes) != 1:
        return None
    kind = _copy_kind(body, reads[0], writes[0])
    if kind is None:
        return None
    casts = tuple(_dtype_name(n.args[2]) for n in calls if n.target == "to_dtype")
    first, last = _dtype_of(reads[0].name), _dtype_of(writes[0].name)
    return Copy(reads[0].name, writes[0].name, kind, (first, *casts, last))


def _copy_kind(body: Any, read: Any, write: Any) -> str | None:
    from torch._inductor.dependencies import MemoryDep

    if not isinstance(read, MemoryDep) or not isinstance(write, MemoryDep) or read.is_indirect():
        return None
    (load,), (store,) = body.get_read_exprs(), body.get_write_exprs()
    if load == store:
        return COPY_SAME
    # a broadcast reads fewer elements than it writes: that is not a change of layout
    return COPY_LAYOUT if load.free_symbols == store.free_symbols else None


def _dtype_of(name: str) -> str:
    from torch._inductor.virtualized import V

    return _dtype_name(V.graph.get_dtype(name))


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _buffers(graph: Any, launches: Iterable[Launch], outputs: tuple[str, ...]) -> dict[str, Buffer]:
    names = {access.buffer for launch in launches for access in (*launch.reads, *launch.writes)}
    return {name: _buffer(graph, name, outputs) for name in sorted(names)}


def _buffer(graph: Any, name: str, outputs: tuple[str, ...]) -> Buffer:
    role = "intermediate"
    if name in graph.graph_inputs:
        role = "input"
    elif name in graph.constants:
        role = "constant"
    elif name in outputs:
        role = "output"
    held = graph.try_get_buffer(name)
    layout = held.maybe_get_layout() if hasattr(held, "maybe_get_layout") else None
    size, stride = getattr(layout, "size", ()), getattr(layout, "stride", ())
    if layout is None or not hasattr(layout, "dtype") or not hasattr(layout, "size"):  # several outputs, or no tensor
        return Buffer(name, "", (), (), 0, role, name)
    dtype = _dtype_name(layout.dtype)
    numel = _numel(size)
    texts = tuple(str(s) for s in size), tuple(str(s) for s in stride)
    return Buffer(name, dtype, *texts, numel * layout.dtype.itemsize, role, name)


def _numel(size: Iterable[Any]) -> int:
    from torch._inductor.virtualized import V

    hint = getattr(V.graph.sizevars, "optimization_hint", None) or V.graph.sizevars.size_hint
    return math.prod(int(hint(extent)) for extent in size)
