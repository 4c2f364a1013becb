"""Show what a compiler generated for a model: kernels, DRAM bytes, and which of them are waste. Needs no GPU."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normquant.audit import AuditReport, expectations
from normquant.audit.rules import RULE_IDS
from normquant.audit.source.code_files import Unusable
from normquant.audit.targets import HERE, TARGETS, Unavailable
from normquant.cli import terminal
from normquant.cli.arguments import completing, integers
from normquant.cli.audit_output import write_json, write_page
from normquant.cli.audited import CODE, CONFIG, MODEL, STORED, TOKENS, audited, counts, kind
from normquant.cli.output_files import check_writable
from normquant.cli.progress import add_quiet
from normquant.report import audit_text

COMPILING = ("arg", "option", "fuse", "compare_fused", "dynamic", "tokens", "layers")
SIZES = ("m", "size")
STOCK, FUSED = "torch.compile", "with normquant"
# Options that a kind of input does not read: given with it, they are errors.
UNREAD = {
    CODE: COMPILING,
    STORED: (*COMPILING, *SIZES),
    MODEL: ("tokens", "layers"),
    CONFIG: ("arg",),
}
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `normquant audit`."""
    parser.add_argument(
        "what", nargs="?", metavar="WHAT",
        help="what to compile, module:name or path/to/file.py:name; or generated code: a file, a cache directory of "
        "Inductor or vLLM, a log of TORCH_LOGS=output_code; or a transformers config.json; or the JSON of an earlier "
        "audit",
    )  # fmt: skip
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="what changed from A to B, each like WHAT")
    compiling = parser.add_argument_group("what is compiled")
    targets = [*TARGETS, HERE]
    completing(compiling.add_argument("--target", default="h100", help=f"{', '.join(targets)}; default h100"), targets)
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
    compiling.add_argument(
        "--compare-fused", nargs="?", const="auto", metavar="POLICY",
        help="compile twice, without and with normquant.inductor_options(POLICY), and show what changed",
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
    output.add_argument("--html", metavar="PATH", help="as one self-contained page; of two, side by side")
    output.add_argument("--github", action="store_true", help="findings as annotations of a GitHub workflow")
    output.add_argument("--sarif", type=Path, metavar="PATH", help="findings as SARIF 2.1.0, for code scanning")
    output.add_argument("--junit", type=Path, metavar="PATH", help="what exit code 1 is for, as tests in JUnit XML")
    add_quiet(output)
    failing = parser.add_argument_group("exit code 1")
    rules = f"any of {', '.join(RULE_IDS)}"
    completing(failing.add_argument("--fail-on", type=_rules, default=(), metavar="RULE[,RULE]", help=rules), RULE_IDS)
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
    _check_ci_reports(args)
    try:
        if args.diff:
            before, after = (audited(what, args, args.fuse) for what in args.diff)
            return _compared(before, after, (args.diff[0], args.diff[1]), args)
        if args.compare_fused:
            before, after = (audited(args.what, args, policy) for policy in (None, args.compare_fused))
            return _compared(before, after, (STOCK, FUSED), args)
        made = audited(args.what, args, args.fuse)
    except (Unusable, Unavailable) as error:
        print(f"normquant: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    data = [report.to_dict() for report in made]
    if args.sarif or args.junit:
        from normquant.cli import ci_reports

        ci_reports.write(args, data, made, counts(args.expect, "--expect"))
    _print(args, data)
    return _exit_code(made, args)


def _check_read(args: argparse.Namespace) -> None:
    """Raise ValueError where there is nothing to audit, and for an option that would be ignored."""
    if args.diff and args.what is not None:
        raise ValueError(f"--diff takes the two to compare; {args.what!r} is a third")
    if not args.diff and args.what is None:
        raise ValueError("nothing to audit: give module:callable, a path of generated code, or --diff A B")
    comparing = "--diff" if args.diff else "--compare-fused" if args.compare_fused else ""
    unread = {f"--{name}": comparing for name in ("github", "sarif", "junit") if comparing and getattr(args, name)}
    if args.compare_fused and (args.diff or args.fuse):
        unread["--compare-fused"] = "--diff" if args.diff else "--fuse"
    kinds = [kind(what) for what in args.diff or [args.what]]
    for name in (*COMPILING, *SIZES):
        if getattr(args, name) and all(name in UNREAD[one] for one in kinds):
            unread.setdefault(f"--{name.replace('_', '-')}", kinds[0])
    if unread:
        raise ValueError("; ".join(f"{option} is not read with {other}" for option, other in unread.items()))


def _check_ci_reports(args: argparse.Namespace) -> None:
    """Raise OSError for --sarif and --junit that cannot be written, ValueError for a --junit that checks nothing."""
    check_writable(args.sarif, args.junit)
    if args.junit and not (args.fail_on or args.expect or args.max_bytes is not None):
        raise ValueError("--junit writes what is checked: give --fail-on, --expect or --max-bytes as well")


def _print(args: argparse.Namespace, data: Sequence[Mapping[str, Any]]) -> None:
    title = args.what
    if args.html:
        write_page(args.html, [[one] for one in data], title)
    if args.github:
        print(audit_text.github_annotations(data))
    if args.json:
        write_json(args.json, data)
    if not args.github and args.json != "-":
        print(audit_text.render(data, title, terminal.columns() or audit_text.WIDTH), end="")
        if kind(args.what) in (MODEL, CONFIG):  # generated code and stored audits need no torch
            _print_fused()


def _print_fused() -> None:
    """What was fused, where the pass ran: it was asked for, or the model came compiled with it."""
    from normquant.compile import explain, reports

    if reports():
        print(explain())


def _compared(
    before: Sequence[AuditReport], after: Sequence[AuditReport], names: tuple[str, str], args: argparse.Namespace
) -> int:
    """Print what changed; what is expected holds of the second."""
    from normquant.cli import audit_comparison

    audit_comparison.write(before, after, names, args)
    return _exit_code(after, args)


def _exit_code(made: Sequence[AuditReport], args: argparse.Namespace) -> int:
    """Print the expectations that do not hold; 1 when there are any."""
    broken = expectations.broken(made, args.fail_on, counts(args.expect, "--expect"), args.max_bytes)
    for line in broken:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if broken else 0


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
