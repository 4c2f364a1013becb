"""List what there is by name: ops, named specs, rules of the auditor, or providers of the benchmark."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Iterator
from itertools import pairwise

from normquant.cli import terminal

KINDS = ("ops", "specs", "rules", "providers")
Row = tuple[str, str]  # a name, and what it is in a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant list`."""
    parser.add_argument("kind", choices=KINDS, help="rules: of the auditor; providers: of `normquant bench kernels`")


def run(args: argparse.Namespace) -> int:
    """Print a line for each."""
    rows = list({"ops": ops, "specs": specs, "rules": rules, "providers": providers}[args.kind]())
    indent = max(len(name) for name, _ in rows) + 2
    for name, what in rows:
        print(terminal.wrapped(f"{name:<{indent}}{what}", " " * indent))
    return 0


def ops() -> Iterator[Row]:
    """Every op as torch knows it: what its function says that it does, and its outputs."""
    from normquant import ops as public

    for name, op in public.OPS.items():
        outputs = ", ".join(output.name for output in op.overload._schema.returns if output.name)
        yield (
            name,
            _first_sentence(getattr(public, op.stem, op.reference).__doc__) + (f": {outputs}" if outputs else ""),
        )


def specs() -> Iterator[Row]:
    """Every named spec, and the first sentence of the text below it."""
    from normquant import specs as named

    texts = _texts_below(inspect.getsource(named))
    for name in (name for name in vars(named) if name.isupper()):
        yield name, _first_sentence(texts[name])


def _texts_below(source: str) -> dict[str, str]:
    """Name -> the string below its assignment, which documents a constant and is not kept at run time."""
    found: dict[str, str] = {}
    for node, text in pairwise(ast.parse(source).body):
        if isinstance(node, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found |= {target.id: str(text.value.value) for target in node.targets if isinstance(target, ast.Name)}
    return found


def rules() -> Iterator[Row]:
    """Every rule of the auditor with its severity, and what it finds."""
    from normquant.audit.rules import RULES

    for rule in RULES:
        yield rule.id, f"{rule.severity}: {_first_sentence(rule.find.__doc__)}"


def providers() -> Iterator[Row]:
    """Every provider, what it runs, and what it lacks here."""
    from normquant.bench.providers import PROVIDERS

    for name, provider in PROVIDERS.items():
        lacks = provider.lacks()
        yield name, _first_sentence(provider.build.__doc__) + (f" (left out here: {lacks})" if lacks else "")


def _first_sentence(text: str | None) -> str:
    """Up to a full stop, in one line and without the marks of code."""
    paragraph = " ".join((text or "").strip().partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".:").replace("`", "")
