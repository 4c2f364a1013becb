"""An audit of generated code that is on disk."""

import os
from collections.abc import Mapping, Sequence

from normquant.audit import result, targets
from normquant.audit.join_scheduler import joined
from normquant.audit.program import Program
from normquant.audit.result import AuditReport
from normquant.audit.source import code_files, evaluate, wrapper_code
from normquant.audit.source.code_files import Skipped, Unusable
from normquant.audit.source.generated_module import Module, NotGenerated
from normquant.audit.source.symbols import leads, symbols


def audit_path(
    path: str | os.PathLike[str],
    target: str = "h100",
    rows: Sequence[int] = (),
    sizes: Mapping[str, int] | None = None,
) -> list[AuditReport]:
    """Audit generated code at `path`: a file, a cache directory of Inductor or vLLM, or a TORCH_LOGS=output_code log.

    Args:
        target: the GPU that times are estimated for.
        rows: numbers of rows to evaluate a symbolic leading size at, a report each; as compiled when empty.
        sizes: values of other symbolic sizes, by the name that they have in the code.

    Raises:
        Unusable: nothing at `path` can be audited.
        ValueError: an unknown target, or a size that is not in the code.
    """
    sources, skipped = code_files.find(path)
    modules: list[Module] = []
    for source in sources:
        try:
            modules.append(wrapper_code.read_module(source.text, source.name))
        except NotGenerated as error:
            skipped.append(Skipped(source.name, str(error)))
        except RecursionError:
            skipped.append(Skipped(source.name, "expressions nested too deeply"))
    if not modules:
        raise Unusable(f"{skipped[0].name}: {skipped[0].reason}")
    text = "\n".join(source.text for source in sources)
    return reports(modules, text, target, rows, sizes, skipped)


def reports(
    modules: Sequence[Module],
    text: str,
    target: str,
    rows: Sequence[int] = (),
    sizes: Mapping[str, int] | None = None,
    skipped: Sequence[Skipped] = (),
    scheduled: Sequence[Program] = (),
) -> list[AuditReport]:
    """One report per number of rows. `scheduled`: what the compiler knew of each module, after a live compile."""
    chosen = targets.resolve(target)
    named = {name for module in modules for name in symbols(module)}
    unknown = sorted(set(sizes or {}) - named)
    if unknown:
        has = f"its symbolic sizes are {', '.join(sorted(named))}" if named else "it has no symbolic sizes"
        raise ValueError(f"no size called {', '.join(unknown)} in the code; {has}")
    made = []
    for number in rows or (None,):
        programs = []
        for index, module in enumerate(modules):
            given = {**_rows(module, number), **{n: s for n, s in (sizes or {}).items() if n in symbols(module)}}
            known = scheduled[index] if scheduled else None
            program = evaluate.build(module, given, known.buffers if known else None)
            programs.append(joined(program, known) if known else program)
        made.append(result.report(programs, text, chosen, [(s.name, s.reason) for s in skipped]))
    return made


def _rows(module: Module, number: int | None) -> dict[str, int]:
    """The symbol that is the leading size of most tensors, as the number of rows."""
    found = symbols(module)
    if number is None or not found:
        return {}
    return {max(found, key=lambda symbol: leads(module, symbol)): number}
