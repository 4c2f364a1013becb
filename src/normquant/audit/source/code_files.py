"""Generated code on disk: one file, a log, or a cache directory. Read as text: never imported, run or unpickled."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from normquant.audit.program import GeneratedCode
from normquant.audit.source.wrapper_code import CPP_WRAPPER, is_cpp_wrapper, is_generated

_LARGEST_FILE = 64 << 20  # bytes
_LOG_LINE = re.compile(r"^.*?\[__output_code\] ?")
_LOG_PREFIX = re.compile(r"^[VDIWE]\d{4} [\d:.]+ \d+ \S+:\d+\] (\[[^\]]*\] )*")
_TRACE_NAME = "dedicated_log_torch_trace_"  # what torch calls the files of TORCH_TRACE
_TRACE_RECORD = re.compile(_LOG_PREFIX.pattern + r'\{"(\w+)"')
_TRACE_CODE = "inductor_output_code"
_ARCHIVE = (
    "a zip archive; if it is a package of AOTInductor, its code is C++, which is not read: audit the model, or code "
    "that torch.compile generated"
)


class Unusable(ValueError):
    """Nothing that can be audited."""


@dataclass(frozen=True)
class Skipped:
    """A file that should have been read and could not be."""

    name: str
    reason: str


def find(path: str | os.PathLike[str]) -> tuple[list[GeneratedCode], list[Skipped]]:
    """Every generated module at `path`; Unusable when it holds none."""
    root = Path(path)
    if not root.exists():
        raise Unusable(f"{root}: no such file or directory")
    if root.is_dir():
        return _in_directory(root)
    text = _read(root)
    if isinstance(text, Skipped):
        raise Unusable(f"{text.name}: {text.reason}")
    return _in_file(str(root), text), []


def _in_file(name: str, text: str) -> list[GeneratedCode]:
    """The modules in the text of one file; Unusable for a log without any."""
    if "[__output_code]" in text:
        codes, advice = _split_log(name, text), "; set TORCH_LOGS=output_code"
    elif _TRACE_RECORD.match(text):
        codes, advice = _split_trace(name, text), " of TORCH_TRACE; was anything compiled, with its caches off?"
    else:
        return [GeneratedCode(name, text)]
    if not codes:
        raise Unusable(f"{name}: a log without generated code{advice}")
    return codes


def _in_directory(root: Path) -> tuple[list[GeneratedCode], list[Skipped]]:
    codes: list[GeneratedCode] = []
    skipped: list[Skipped] = []
    for file in _files(root):
        text = _read(file)
        if isinstance(text, Skipped):
            skipped.append(text)
        elif is_cpp_wrapper(text) and file.suffix != ".log":
            skipped.append(Skipped(str(file), CPP_WRAPPER))
        elif file.suffix == ".log":
            codes += _split_trace(str(file), text)
        elif is_generated(text):
            codes.append(GeneratedCode(str(file), text))
    if not codes:
        unread = (
            f"; {len(skipped)} could not be read, the first: {skipped[0].name}: {skipped[0].reason}" if skipped else ""
        )
        raise Unusable(
            f"{root}: no generated Python code in any of its files{unread}. Caches that only hold binary artifacts "
            "are not read: compile with TORCH_LOGS=output_code, or with the cache off, and audit what that writes"
        )
    return codes, skipped


def _files(root: Path) -> Iterator[Path]:
    """Files that may hold a wrapper: those of kernels are left out."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(files) if name.endswith((".py", ".wrapper.cpp", ".pt2")))
        yield from (Path(folder) / name for name in sorted(files) if name.startswith(_TRACE_NAME))


def _read(file: Path) -> str | Skipped:
    try:
        if not file.is_file():
            return Skipped(str(file), "not a regular file")
        size = file.stat().st_size
        if size > _LARGEST_FILE:
            return Skipped(str(file), f"{size >> 20} MiB; files of up to {_LARGEST_FILE >> 20} MiB are read")
        data = file.read_bytes()
    except OSError as error:
        return Skipped(str(file), error.strerror or str(error))
    if data.startswith(b"PK\3\4"):
        return Skipped(str(file), _ARCHIVE)
    if b"\0" in data:
        return Skipped(str(file), "a binary file, not generated Python code")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return Skipped(str(file), "not UTF-8 text")


def _split_log(name: str, text: str) -> list[GeneratedCode]:
    """The modules in a log of TORCH_LOGS=output_code, which prefixes every line."""
    modules: list[list[str]] = []
    for line in text.splitlines():
        found = _LOG_LINE.match(line)
        if found is None:
            if modules and not _LOG_PREFIX.match(line):
                modules[-1].append(line)  # some loggers prefix the first line of a record only
            continue
        content = line[found.end() :]
        if content.startswith("Output code written to:"):
            continue
        if content.startswith("Output code:"):
            modules.append([content.removeprefix("Output code:").strip()])
        elif modules:
            modules[-1].append(content)
    codes = (GeneratedCode(f"{name}, graph {i}", "\n".join(lines)) for i, lines in enumerate(modules))
    return [code for code in codes if is_generated(code.text)]


def _split_trace(name: str, text: str) -> list[GeneratedCode]:
    """The modules in a log of TORCH_TRACE: the tab-indented lines that follow a record of generated code."""
    modules: list[list[str]] = []
    kind = ""
    for line in text.splitlines():
        if record := _TRACE_RECORD.match(line):
            kind = record[record.lastindex or 0]
            if kind == _TRACE_CODE:
                modules.append([])
        elif kind == _TRACE_CODE and line.startswith("\t"):
            modules[-1].append(line[1:])
    return [GeneratedCode(f"{name}, graph {i}", "\n".join(lines)) for i, lines in enumerate(modules)]
