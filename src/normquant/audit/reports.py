"""Whole audits: code that was just compiled, or lies on disk -> modules -> programs -> findings -> report."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from normquant.audit import rules, targets
from normquant.audit.program import Extern, GeneratedCode, Kernel, Program, ProgramLaunch
from normquant.audit.result import AuditReport
from normquant.audit.source import code_files, evaluate, wrapper_code
from normquant.audit.source.code_files import Skipped, Unusable
from normquant.audit.source.generated_module import GeneratedModule, NotGenerated


def audit(
    fn: Callable[..., Any],
    make_inputs: Callable[[], Any] | tuple[Any, ...] | Mapping[str, Any] | Any,
    target: str = "h100",
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> AuditReport:
    """Compile `fn` for `target`, on any machine, and report what was generated and which of it is waste.

    Args:
        fn: a function or an `nn.Module`; compiled without gradients, never run on data. Modules that a function names
            may be on any device. What torch.compile has had already is compiled with the options that it has.
        make_inputs: one tensor, a tuple of inputs, or a mapping of them by name, with tensors on any device: only their
            metadata is used. Or a function without arguments that makes these with device="cuda", modules among them,
            too: it is called where every tensor is fake and takes no memory.
        target: "h100", "h200", "b200", or "here" for this machine's GPU.
        options: Inductor options, as for `torch.compile(options=...)`.
        dynamic: as for `torch.compile`.

    Raises:
        ValueError: an unknown target or option; a function that calls backward(); a model that is compiled already,
            where `options` are given too, where its backend is not Inductor, or where only parts of it are compiled.
        RuntimeError: target "here" without a GPU; no triton; no C++ compiler where torch was built without CUDA.
        Whatever `make_inputs`, or the compile of `fn`, raises.

    For a target that is not this machine's GPU, Inductor's patterns for attention written out in PyTorch and for
    padding matrix products are left out, because it traces them on a GPU; the notes of `report.programs` list any other
    difference.

    The compiler's state is reset: compiled functions of this process are compiled anew when they are next called.
    """
    from normquant.audit.capture.live_compile import capture

    return audit_code(capture(fn, make_inputs, target, options, dynamic), target)[0]


def audit_path(
    path: str | os.PathLike[str],
    target: str = "h100",
    rows: Sequence[int] = (),
    sizes: Mapping[str, int] | None = None,
) -> list[AuditReport]:
    """Audit generated code at `path`: a file, a cache directory of Inductor or vLLM, a TORCH_LOGS=output_code log,
    or a log or folder of TORCH_TRACE.

    Args:
        target: the GPU that times are estimated for.
        rows: numbers of rows at which to evaluate a symbolic leading size, one report each; as compiled when empty.
        sizes: values of other symbolic sizes, by their names in the code.

    Raises:
        Unusable: nothing at `path` can be audited.
        ValueError: an unknown target, or a size that is not in the code.
    """
    codes, skipped = code_files.find(path)
    return audit_code(codes, target, rows, sizes, skipped)


def audit_code(
    codes: Iterable[GeneratedCode],
    target: str,
    rows: Sequence[int] = (),
    sizes: Mapping[str, int] | None = None,
    skipped: Sequence[Skipped] = (),
) -> list[AuditReport]:
    """Audit generated code; what cannot be read joins `skipped`, and Unusable is raised when that is all of it."""
    modules: list[GeneratedModule] = []
    unread = [*skipped]
    for code in codes:
        try:
            modules.append(wrapper_code.read_module(code))
        except NotGenerated as error:
            unread.append(Skipped(code.name, str(error)))
        except RecursionError:
            unread.append(Skipped(code.name, "expressions nested too deeply"))
    if not modules:
        raise Unusable(f"{unread[0].name}: {unread[0].reason}")
    return audit_modules(modules, target, rows, sizes, unread)


def audit_modules(
    modules: Sequence[GeneratedModule],
    target: str,
    rows: Sequence[int] = (),
    sizes: Mapping[str, int] | None = None,
    skipped: Sequence[Skipped] = (),
) -> list[AuditReport]:
    """One report for each number of rows, or one at the sizes that the code was compiled with."""
    chosen = targets.resolve(target)
    _check_sizes(modules, sizes or {})
    text = "\n".join(module.code.text for module in modules)
    unread = tuple((one.name, one.reason) for one in skipped)
    reports = []
    for number in rows or (None,):
        programs = tuple(_program(module, number, sizes or {}) for module in modules)
        reports.append(AuditReport(chosen, programs, rules.check(programs, chosen), text, unread))
    return reports


def _check_sizes(modules: Iterable[GeneratedModule], sizes: Mapping[str, int]) -> None:
    known = sorted({name for module in modules for name in module.symbols()})
    unknown = sorted(set(sizes) - set(known))
    if unknown:
        has = f"its symbolic sizes are {', '.join(known)}" if known else "it has no symbolic sizes"
        raise ValueError(f"no size called {', '.join(unknown)} in the code; {has}")


def _program(module: GeneratedModule, rows: int | None, sizes: Mapping[str, int]) -> Program:
    """The program at these sizes, with what the compiler's scheduler knew of it where there was a compile."""
    symbols = module.symbols()
    given = {name: size for name, size in sizes.items() if name in symbols}
    if rows is not None and symbols:  # the symbol that is the leading size of most tensors counts the rows
        given = {max(symbols, key=module.count_leading): rows, **given}
    scheduled = module.code.scheduled
    program = evaluate.program(module, given, scheduled.buffers if scheduled else {})
    return _with_scheduler(program, scheduled) if scheduled else program


def _with_scheduler(program: Program, scheduled: Program) -> Program:
    """`program` with the origins, fusion reasons and mutations of `scheduled`, launches matched by name and order."""
    waiting: dict[str, list[ProgramLaunch]] = {}
    for launch in scheduled.launches:
        waiting.setdefault(launch.name, []).append(launch)
    launches = []
    for launch in program.launches:
        same = waiting.get(launch.name)
        launches.append(_merged(launch, same.pop(0)) if same else launch)
    return replace(program, launches=tuple(launches), notes=(*program.notes, *scheduled.notes))


def _merged(launch: ProgramLaunch, scheduled: ProgramLaunch) -> ProgramLaunch:
    launch = replace(launch, origins=scheduled.origins or launch.origins, aten=scheduled.aten or launch.aten)
    if isinstance(launch, Kernel) and isinstance(scheduled, Kernel):
        return replace(launch, why_not_fused=scheduled.why_not_fused)
    if isinstance(launch, Extern) and isinstance(scheduled, Extern):  # its schema says which arguments it writes into
        written = {access.buffer for access in launch.writes}
        added = tuple(a for a in launch.reads if a.buffer in scheduled.mutates and a.buffer not in written)
        return replace(launch, mutates=launch.mutates or scheduled.mutates, writes=(*launch.writes, *added))
    return launch
