"""Files that a command writes: paths are checked before the work starts, and a file is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_writable(*paths: Path | None) -> None:
    """Raise OSError for a path that cannot be written, before minutes are spent on what belongs there."""
    for path in filter(None, paths):
        if str(path) == "-":
            raise FileNotFoundError("- is no path of a file; /dev/stdout is one")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory; the path of a file is accepted")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} is not a directory, so {path} cannot be written")
        needed = [path] if _is_special(path) else [path.parent, *([path] if path.exists() else [])]
        for place in needed:
            if not os.access(place, os.W_OK):
                raise PermissionError(f"{place} is read-only, so {path} cannot be written")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path`, with its suffix, to write to: it replaces `path` at the end.

    If the block fails or is interrupted, `path` stays as it was. A pipe or a device is written to directly.
    """
    if _is_special(path):
        yield path
        return
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    part = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield part
        if target.exists():
            shutil.copymode(target, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole; where that fails, the file that was there stays as it was."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()
