"""What `normquant audit` is given: a model to compile, generated code, or an audit that was stored; and its audit."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normquant.audit import AuditReport, audit_path, reports, stored
from normquant.audit.program import GeneratedCode
from normquant.audit.source.code_files import Unusable
from normquant.audit.targets import Unavailable
from normquant.cli.progress import showing

TOKENS = 64
MODEL, CODE, STORED, CONFIG = "module:callable", "generated code", "a stored audit", "a transformers config"


def kind(what: str) -> str:
    """MODEL, CODE, STORED or CONFIG."""
    if not os.path.exists(what):
        return MODEL
    if os.path.isfile(what) and stored.is_stored(what):
        return STORED
    return CONFIG if _is_config(what) else CODE


def audited(what: str, args: argparse.Namespace, fuse: str | None) -> list[AuditReport]:
    """The audit of `what`, compiled with normquant's pass where `fuse` is its policy; one for each number of rows."""
    sizes = counts(args.size, "--size")
    given = kind(what)
    if given == STORED:
        return stored.read(what)
    if given != CODE:
        return reports.audit_code(_compiled(what, args, fuse), args.target, args.m, sizes)
    try:
        return audit_path(what, args.target, args.m, sizes)
    except Unusable as error:
        if not what.endswith(".py"):
            raise
        raise Unusable(f"{error}; to compile what it defines, name it: {what}:build") from None


def counts(pairs: Sequence[str], option: str) -> dict[str, int]:
    """NAME=NUMBER, of an option that is given several times."""
    found = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        if not name or not number.isdigit():
            raise ValueError(f"{option} {pair!r}: give NAME=NUMBER")
        found[name] = int(number)
    return found


def _compiled(what: str, args: argparse.Namespace, fuse: str | None) -> list[GeneratedCode]:
    """Compile what was named. An error of the user's code, or of its compile, becomes a ValueError that says where."""
    from normquant.audit.capture import live_compile, model_inputs, named_objects  # the compiler, only where needed
    from normquant.compile import inductor_options

    is_config = os.path.exists(what)
    if not is_config and not named_objects.is_named(what):
        raise Unusable(f"{what}: no such file or directory, and neither module:name nor path/to/file.py:name")
    options = _options(args.option)
    options = inductor_options(fuse, **options) if fuse else options
    try:
        with showing(1, args.quiet, ticking=True) as progress, live_compile.seeing(args.target):
            progress.begin(f"compiling {what} for {args.target}")
            if is_config:
                function, make = model_inputs.hugging_face(what, args.tokens or TOKENS, args.layers)
            else:
                function, make = model_inputs.named_callable(what, args.arg)
            return live_compile.capture(function, make, args.target, options, args.dynamic)
    except (Unavailable, KeyboardInterrupt):
        raise
    except Exception as error:
        where = named_objects.users_frame(error)
        if isinstance(error, (ValueError, ImportError)) and not where:
            raise  # of this package, or of what it was given: a sentence already
        cause = named_objects.cause_of(error)
        named = "" if type(cause) is ValueError else f"{type(cause).__name__}: "
        place = f"{where}: " if where else f"{what} does not compile: "
        raise ValueError(f"{place}{named}{_first_line(cause)}") from error


def _first_line(error: BaseException) -> str:
    """The message; of one of Dynamo's, which has a title first, the explanation."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    explained = (line for line in lines if line.startswith("Explanation: "))
    return next(explained, lines[0] if lines else "no message")


def _is_config(what: str) -> bool:
    """Whether a path is a transformers config.json, or a folder with one."""
    path = Path(what)
    if path.is_dir():
        return (path / "config.json").is_file()
    return path.suffix == ".json"


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--option {pair!r}: give NAME=VALUE")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            found[name] = value
    return found
