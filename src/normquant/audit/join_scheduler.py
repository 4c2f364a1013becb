"""A program read from code, joined with what the compiler's scheduler knew of it."""

from dataclasses import replace

from normquant.audit.program import Extern, Kernel, Launch, Program


def joined(program: Program, scheduled: Program) -> Program:
    """`program` with each kernel's origins and fusion reasons from `scheduled`, matched by name and order."""
    waiting: dict[str, list[Launch]] = {}
    for launch in scheduled.launches:
        waiting.setdefault(launch.name, []).append(launch)
    launches: list[Launch] = []
    for launch in program.launches:
        same = waiting.get(launch.name)
        known = same.pop(0) if same else None
        if known is not None:
            launch = replace(launch, origins=known.origins or launch.origins, aten=known.aten or launch.aten)
        if isinstance(launch, Extern) and isinstance(known, Extern):
            launch = _with_mutations(launch, known)
        if isinstance(launch, Kernel) and isinstance(known, Kernel):
            launch = replace(launch, why_not_fused=known.why_not_fused)
        launches.append(launch)
    return replace(program, launches=tuple(launches), notes=(*program.notes, *scheduled.notes))


def _with_mutations(launch: Extern, known: Extern) -> Extern:
    """The call with the buffers that its operator's schema says it writes into."""
    written = {access.buffer for access in launch.writes}
    added = tuple(a for a in launch.reads if a.buffer in known.mutates and a.buffer not in written)
    return replace(launch, mutates=launch.mutates or known.mutates, writes=(*launch.writes, *added))
