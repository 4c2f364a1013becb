"""The user's code: an object of it by name, `module:name` or `path/to/file.py:name`, and where it raised."""

import contextlib
import difflib
import importlib
import importlib.util
import os
import re
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ATTRIBUTE = r"[A-Za-z_][\w.]*"
_IN_MODULE = re.compile(rf"^[A-Za-z_][\w.]*:{_ATTRIBUTE}$")
_IN_FILE = re.compile(rf"^.+\.py:{_ATTRIBUTE}$")
_PACKAGE = Path(__file__).parents[2]  # normquant itself


def is_named(what: str) -> bool:
    """Whether `what` is spelled module:attribute or path/to/file.py:attribute."""
    return bool(_IN_MODULE.match(what) or _IN_FILE.match(what))


def named(what: str) -> Any:
    """The object at `what`; modules in the working directory are found, too.

    Raises ValueError for a module, file or attribute that does not exist, with names that are close to it. What the
    user's code raises while it is imported is raised unchanged.
    """
    place, _, attribute = what.rpartition(":")
    held: Any = _module_at(Path(place)) if _IN_FILE.match(what) else _module_called(place)
    for part in attribute.split("."):
        if not hasattr(held, part):
            where = getattr(held, "__file__", None) or getattr(held, "__name__", type(held).__name__)
            public = [name for name in dir(held) if not name.startswith("_")]
            raise ValueError(f"{what}: {where} has no {part!r}{_near(part, public)}")
        held = getattr(held, part)
    return held


def _module_called(name: str) -> types.ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the module is there, and imports one that is not
        here = [path.stem for path in Path.cwd().iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
        raise ValueError(
            f"no module {error.name!r} in {Path.cwd()} or installed{_near(name, here)}"
            "; a file elsewhere is path/to/file.py:name"
        ) from None


def _module_at(path: Path) -> types.ModuleType:
    """The module of a file, imported as if its folder were the working directory."""
    if not path.is_file():
        beside = [other.name for other in path.parent.glob("*.py")]
        raise ValueError(f"{path}: no such file{_near(path.name, beside)}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "the name ends with .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def users_frame(error: BaseException) -> str:
    """`file:line` of the user's innermost line that led to an error, else of what it called; "" where neither is known.

    The user's code is what is neither installed nor part of Python.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shown(error.filename)}:{error.lineno}"
    frames = [frame for one in _chain(error) for frame in traceback.extract_tb(one.__traceback__)]
    frames += [frame for one in _chain(error) for frame in getattr(one, "real_stack", None) or ()]  # of code in a trace
    own = [frame for frame in frames if _is_users(frame.filename)]
    return f"{_shown(own[-1].filename)}:{own[-1].lineno}" if own else ""


def cause_of(error: BaseException) -> BaseException:
    """What an error of the compiler wraps; any other error itself."""
    while type(error).__module__.startswith("torch._dynamo"):
        inner = error.__cause__ or getattr(error, "inner_exception", None)
        if inner is None:
            break
        error = inner
    return error


def _chain(error: BaseException) -> list[BaseException]:
    """What led to an error, first, and the error."""
    found = [error]
    while (cause := found[0].__cause__ or found[0].__context__) is not None and cause not in found:
        found.insert(0, cause)
    return found


def _is_users(filename: str) -> bool:
    path = Path(filename)
    installed = {Path(place) for place in sysconfig.get_paths().values()}
    folders = {"site-packages", "dist-packages"}
    return (
        path.is_file()
        and not path.is_relative_to(_PACKAGE)
        and not folders & set(path.parts)
        and not any(path.is_relative_to(place) for place in installed if place.name.startswith("python"))
        and path != Path(sys.argv[0])
    )


def _shown(filename: str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(filename).relative_to(Path.cwd()))
    return filename
