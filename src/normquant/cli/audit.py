"""Show what a compiler generated for a model: kernels, DRAM bytes, and which of them are waste. Needs no GPU."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normquant.audit import AuditReport, audit_path, expectations, reports
from normquant.audit.program import GeneratedCode
from normquant.audit.rules import RULE_IDS
from normquant.audit.source.code_files import Unusable
from normquant.audit.targets import HERE, TARGETS, Unavailable
from normquant.cli.arguments import integers
from normquant.cli.output_files import check_writable, write_atomically
from normquant.compile import explain, inductor_options
from normquant.compile import reports as fused
from normquant.report import audit_diff, audit_html, audit_text

TOKENS = 64
COMPILING = ("arg", "option", "fuse", "dynamic", "tokens", "layers")
# Options that a kind of input does not read: given with it, they are errors.
UNREAD = {"generated code": COMPILING, "module:callable": ("tokens", "layers"), "a transformers config": ("arg",)}
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `normquant audit`."""
    parser.add_argument(
        "what", nargs="?", metavar="WHAT",
        help="what to compile, module:name or path/to/file.py:name; or generated code: a file, a cache directory of "
        "Inductor or vLLM, a log of TORCH_LOGS=output_code; or a transformers config.json",
    )  # fmt: skip
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="what changed from A to B, each like WHAT")
    compiling = parser.add_argument_group("what is compiled")
    compiling.add_argument("--target", default="h100", help=f"{', '.join([*TARGETS, HERE])}; default h100")
    compiling.add_argument(
        "--arg", action="append", default=[], metavar="SPEC",
        help="an input of the callable: bf16[64,7168], a number, or a module:callable that makes it. Without any, "
        "WHAT is called without arguments and returns (function or module, inputs)",
    )  # fmt: skip
    compiling.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an Inductor option")
    compiling.add_argument(
        "--fuse", nargs="?", const="auto", metavar="POLICY",
        help="with normquant.inductor_options(POLICY), by default auto; prints what was fused, what was not, and why",
    )  # fmt: skip
    compiling.add_argument("--dynamic", action="store_true", default=None, help="compile with symbolic sizes")
    compiling.add_argument("--tokens", type=_positive, help=f"tokens for a transformers model; default {TOKENS}")
    compiling.add_argument("--layers", type=_positive, help="build only so many layers of a transformers model")
    sizes = parser.add_argument_group("symbolic sizes")
    sizes.add_argument("--m", type=integers, default=(), metavar="1,64,8192", help="evaluate at these numbers of rows")
    sizes.add_argument(
        "--size", action="append", default=[], metavar="NAME=N", help="value of another size, by its name in the code"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", nargs="?", const="-", metavar="PATH", help="as JSON, to PATH or instead of the text")
    output.add_argument("--html", metavar="PATH", help="as one self-contained page")
    output.add_argument("--github", action="store_true", help="findings as annotations of a GitHub workflow")
    failing = parser.add_argument_group("exit code 1")
    failing.add_argument(
        "--fail-on", type=_rules, default=(), metavar="RULE[,RULE]", help=f"any of {', '.join(RULE_IDS)}"
    )
    failing.add_argument(
        "--expect", action="append", default=[], metavar="NAME=N", help="launches by name; * is a wildcard"
    )
    failing.add_argument(
        "--max-bytes", type=_bytes, metavar="N", help="most DRAM traffic; k, M and G are powers of 1024"
    )


def run(args: argparse.Namespace) -> int:
    """Audit, print, and check. 0: all is well; 1: an expectation does not hold; 2: nothing can be audited."""
    check_writable(*(Path(path) for path in (args.json, args.html) if path and path != "-"))
    _check_read(args)
    try:
        if args.diff:
            return _diff(args)
        if args.what is None:
            raise ValueError("nothing to audit: give module:callable, a path of generated code, or --diff A B")
        made = _audit(args.what, args)
    except (Unusable, Unavailable) as error:
        print(f"normquant: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    data = [report.to_dict() for report in made]
    _print(args, data, made)
    return _exit_code(made, args)


def _check_read(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that would be ignored."""
    unread = {f"--{name}": "--diff" for name in ("html", "github") if args.diff and getattr(args, name)}
    kinds = [_kind(what) for what in args.diff or [args.what] if what is not None]
    for name in COMPILING:
        if getattr(args, name) and kinds and all(name in UNREAD[kind] for kind in kinds):
            unread[f"--{name}"] = kinds[0]
    if unread:
        raise ValueError("; ".join(f"{option} is not read with {other}" for option, other in unread.items()))


def _kind(what: str) -> str:
    if not os.path.exists(what):
        return "module:callable"
    return "a transformers config" if _is_config(what) else "generated code"


def _audit(what: str, args: argparse.Namespace) -> list[AuditReport]:
    sizes = _counts(args.size, "--size")
    if _kind(what) == "generated code":
        try:
            return audit_path(what, args.target, args.m, sizes)
        except Unusable as error:
            if not what.endswith(".py"):
                raise
            raise Unusable(f"{error}; to compile what it defines, name it: {what}:build") from None
    return reports.audit_code(_compiled(what, args), args.target, args.m, sizes)


def _compiled(what: str, args: argparse.Namespace) -> list[GeneratedCode]:
    """Compile what was named. An error of the user's code, or of its compile, becomes a ValueError that says where."""
    from normquant.audit.capture import live_compile, model_inputs, named_objects  # the compiler, only where needed

    is_config = os.path.exists(what)
    if not is_config and not named_objects.is_named(what):
        raise Unusable(f"{what}: no such file or directory, and neither module:name nor path/to/file.py:name")
    options = _options(args.option)
    options = inductor_options(args.fuse, **options) if args.fuse else options
    try:
        with live_compile.seeing(args.target):
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
        kind = "" if type(cause) is ValueError else f"{type(cause).__name__}: "
        place = f"{where}: " if where else f"{what} does not compile: "
        raise ValueError(f"{place}{kind}{_first_line(cause)}") from error


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


def _print(args: argparse.Namespace, data: Sequence[Mapping[str, Any]], made: Sequence[AuditReport]) -> None:
    title = args.what
    if args.html:
        write_atomically(Path(args.html), audit_html.page(data, title))
    if args.github:
        print(audit_text.github_annotations(data))
    if args.json:
        text = json.dumps(data[0] if len(data) == 1 else data, indent=2)
        _write(args.json, text)
    if not args.github and args.json != "-":
        print(audit_text.render(data, title), end="")
        if args.fuse or fused():  # a model may come compiled with the pass
            print(explain())
    if args.html:
        print(f"page: {args.html}", file=sys.stderr)


def _diff(args: argparse.Namespace) -> int:
    if args.what is not None:
        raise ValueError(f"--diff takes the two to compare; {args.what!r} is a third")
    before, after = (_audit(what, args) for what in args.diff)
    for a, b in zip(before, after, strict=True):
        pair = a.to_dict(), b.to_dict()
        if args.json:
            counts = {rule: [x, y] for rule, x, y in audit_diff.rule_counts(*pair)}
            changed = [change.__dict__ for change in audit_diff.changes(*pair)]
            _write(args.json, json.dumps({"changes": changed, "findings": counts}, indent=2))
        else:
            print(audit_diff.render(*pair, tuple(args.diff)), end="")
    return _exit_code(after, args)


def _exit_code(made: Sequence[AuditReport], args: argparse.Namespace) -> int:
    """Print the expectations that do not hold; 1 when there are any."""
    broken = expectations.broken(made, args.fail_on, _counts(args.expect), args.max_bytes)
    for line in broken:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if broken else 0


def _write(path: str, text: str) -> None:
    if path == "-":
        print(text)
    else:
        write_atomically(Path(path), text + "\n")


def _counts(pairs: Sequence[str], option: str = "--expect") -> dict[str, int]:
    found = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        if not name or not number.isdigit():
            raise ValueError(f"{option} {pair!r}: give NAME=NUMBER")
        found[name] = int(number)
    return found


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


def _rules(text: str) -> tuple[str, ...]:
    rules = tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        expectations.check_rules(rules)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return rules


def _positive(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _bytes(text: str) -> int:
    unit = _UNITS.get(text[-1:].lower(), 1)
    number = text[:-1] if unit != 1 else text
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, such as 500000, 512k, 20M or 1G")
    return int(number) * unit
