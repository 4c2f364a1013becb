"""The command ``normquant``: finds the subcommand, runs it, and turns what goes wrong into one line and an exit code.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``. It is imported only when it is asked
for, so that ``normquant env`` works where ``normquant demo`` cannot, and imports what is large only in ``run``, so that
its help takes no time. To add one, add a line to ``COMMANDS``.

Exit codes (docs/exit-codes.md): 0 done, 1 a check did not hold, 2 wrong usage, unusable input or any other
failure, 130 interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from normquant.version import VERSION

if TYPE_CHECKING:  # imported in functions: until `main` catches it, a Ctrl-C is a traceback
    import argparse

DEBUG_HELP = "show the traceback of an error"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
CORRECTABLE = (ValueError, OSError, ImportError)  # by the user; UnicodeDecodeError and json's error are ValueErrors


class Command(NamedTuple):
    name: str
    module: str
    help: str


COMMANDS: tuple[Command, ...] = (
    Command("env", "normquant.cli.env", "versions, GPUs, and what decides on this machine, for a bug report"),
    Command("demo", "normquant.cli.demo", "fuse a real DeepSeek-V3 layer and show before and after"),
    Command("audit", "normquant.cli.audit", "what the compiler generates for a model, and what to do about it"),
    Command("bench", "normquant.cli.bench", "measure kernels on this GPU, beside the packages that do the same"),
    Command("compare", "normquant.cli.compare", "what got slower or faster between two files of records"),
    Command("plot", "normquant.cli.plot", "plot the kernels' times in records, relative to normquant's"),
    Command("tune", "normquant.cli.tune", "measure launch configs on this GPU and write their table"),
    Command("list", "normquant.cli.list", "the names of ops, specs, rules and providers, a line each"),
    Command("vllm-report", "normquant.cli.vllm_report", "what the plugin fused in vLLM's compiled graphs"),
)


def main(argv: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Run ``normquant`` with ``argv`` (default: ``sys.argv[1:]``) and return the exit code.

    Input that the user can correct (ValueError, OSError, a package that is not installed) is one line on stderr;
    anything else keeps its traceback as well. argparse's own SystemExit passes through.
    """
    given = sys.argv[1:] if argv is None else argv
    try:
        _print_anything()
        code = _run(given, commands)
        if sys.stdout:  # None where it was closed
            sys.stdout.flush()  # a closed pipe or a full disk must show here, not while the interpreter shuts down
        return code
    except KeyboardInterrupt:
        print("normquant: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        _report(error, debug="--debug" in given)
        return EXIT_ERROR
    finally:
        if argv is None:  # the process ends here: one more Ctrl-C ends it at once, without a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(argv: Sequence[str], commands: Sequence[Command]) -> int:
    completing = "_ARGCOMPLETE" in os.environ  # a shell completes this line, and runs the command to do it
    words = os.environ.get("COMP_LINE", "").split()[1:] if completing else argv
    parser, parsers = _parser(commands, next((w for w in words if w in [c.name for c in commands]), None))
    if completing:
        import argcomplete  # which is there: it made the shell ask

        argcomplete.autocomplete(parser)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parsers[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        code: int = args.run(args)
    except SystemExit as error:  # of a user's module: its exit code would be taken for ours
        raise RuntimeError(f"{args.command} ran code that called sys.exit({error.code!r})") from error
    return code


def _report(error: Exception, debug: bool) -> None:
    expected = isinstance(error, CORRECTABLE)
    if debug or not expected:
        import traceback

        traceback.print_exc()
    print(f"normquant: error: {'' if expected else f'{type(error).__name__}: '}{_one_line(error)}", file=sys.stderr)
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:  # the disk is full, say: the interpreter would fail once more on exit, with a code of its own
        _discard_stdout()


def _parser(
    commands: Sequence[Command], wanted: str | None
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all commands, and each command's own, of which only the wanted one has its arguments."""
    import argparse
    import importlib

    parser = argparse.ArgumentParser(
        prog="normquant",
        description="RMSNorm and FP8 block quantization as one kernel, and an auditor of compiled models.",
        epilog="`normquant COMMAND --help` describes one.",
    )
    parser.add_argument("--version", action="version", version=f"normquant {VERSION}")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    listed = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    parsers = {}
    for command in commands:
        parsers[command.name] = one = listed.add_parser(command.name, help=command.help)
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP)
        if command.name == wanted:
            module = importlib.import_module(command.module)
            one.description = _first_line(module.__doc__)
            one.set_defaults(run=module.run)
            module.add_arguments(one)
    return parser, parsers


def _print_anything() -> None:
    """A character that the terminal's encoding lacks is printed as its number, and ends nothing."""
    import io

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _first_line(text: str | None) -> str | None:
    return text.strip().splitlines()[0].replace("``", "") if text and text.strip() else None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"  # without "[Errno 2]"
    return " ".join(str(error).split()) or type(error).__name__


def _discard_stdout() -> None:
    """Point stdout at nothing: the interpreter flushes it once more on exit and would fail again then."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
