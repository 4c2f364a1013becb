"""Which part of normquant may import which, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "normquant"

# layer -> the layers that it imports directly; what those may import it may import too. A layer is a file or a folder.
IMPORTS: dict[str, set[str]] = {
    "spec": set(),
    "specs": {"spec"},
    "approximate_reciprocal": {"spec"},
    "reference": {"spec", "approximate_reciprocal"},
    "kernels": {"spec"},
    "ops": {"reference", "kernels"},
    "linear": {"ops"},
    "compile": {"ops", "specs"},
    "vllm": {"compile", "linear", "version"},
    "integrations": {"vllm"},
    "audit": set(),
    "bench": {"ops", "specs", "version", "compile", "linear", "vllm"},
    "tune": {"bench"},
    "report": set(),
    "demo": {"audit", "bench", "compile", "linear", "report"},
    "version": set(),
    "testing": {"audit"},
}
TOP = {"cli", "__main__"}  # may import everything, and nothing outside of TOP imports them
ROOT = "__init__"  # re-exports the public names: may import every layer, and no layer imports it back


def reachable(layer: str) -> set[str]:
    """The layer itself and all that its arrows lead to."""
    found: set[str] = set()
    pending = [layer]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(IMPORTS[current])
    return found


def allowed(layer: str) -> set[str]:
    if layer in TOP:
        return {*IMPORTS, *TOP, ROOT}
    return set(IMPORTS) if layer == ROOT else reachable(layer)


def layer_of(module: str) -> str:
    """``normquant.audit.rules`` -> ``audit``; ``normquant`` itself -> ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ROOT


def layer_of_file(path: Path, package: Path = PACKAGE) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Every module of ours that the source imports, at any depth (inside functions and TYPE_CHECKING as well)."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                above = parts[: len(parts) - (node.level - is_package)]  # one dot in a package is the package itself
                base = ".".join([*above, *filter(None, [node.module])])
            # `from normquant import env` imports a layer, `from normquant import rms_norm_quant` the root
            names = {alias.name for alias in node.names} if base == "normquant" else set()
            layers = names & {*IMPORTS, *TOP}
            found.update(f"normquant.{name}" for name in layers)
            if not names or names - layers:
                found.add(base)
    return {name for name in found if name.split(".")[0] == "normquant"}


def violations(package: Path) -> list[str]:
    """One line for each import against the arrows, and for each file of no known layer."""
    known = {*IMPORTS, *TOP, ROOT}
    lines = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        layer = layer_of_file(path, package)
        is_package = path.stem == "__init__"
        module = ".".join(["normquant", *where.parent.parts, *([] if is_package else [path.stem])])
        if layer not in known:
            lines.append(f"{where}: is in no layer; add {layer!r} to the table in {Path(__file__).name}")
            continue
        for imported in sorted(imported_modules(path.read_text(encoding="utf-8"), module, is_package)):
            if layer_of(imported) != layer and layer_of(imported) not in allowed(layer):
                lines.append(f"{where}: {layer} imports {imported}, and may import {sorted(allowed(layer) - {layer})}")
    return lines


def test_imports_follow_the_arrows() -> None:
    assert (PACKAGE / "cli" / "entry.py").is_file(), f"no sources under {PACKAGE}"
    assert violations(PACKAGE) == []


def test_arrows_have_no_cycle() -> None:
    for layer, direct in IMPORTS.items():
        assert all(layer not in reachable(other) for other in direct), f"{layer} can be reached from itself"


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("kernels/rms.py", "from normquant.ops import rms", "kernels imports normquant.ops"),
        ("kernels/rms.py", "def f():\n    import normquant.ops", "kernels imports normquant.ops"),
        ("kernels/rms.py", "from ..ops import rms", "kernels imports normquant.ops"),
        ("kernels/rms.py", "from .. import ops", "kernels imports normquant.ops"),
        ("kernels/__init__.py", "from .. import ops", "kernels imports normquant.ops"),
        ("kernels/sub/__init__.py", "from ...ops import rms", "kernels imports normquant.ops"),
        ("audit/rules.py", "from normquant import spec", "audit imports normquant.spec"),
        ("ops.py", "import normquant as nq", "ops imports normquant"),
        ("ops.py", "from normquant import rms_norm_quant", "ops imports normquant"),
        ("spec.py", "from normquant.cli.entry import main", "spec imports normquant.cli.entry"),
        ("__init__.py", "from normquant.cli.entry import main", "__init__ imports normquant.cli.entry"),
        ("utils.py", "", "is in no layer"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, path: str, source: str, expected: str) -> None:
    _write(tmp_path, path, source)
    (line,) = violations(tmp_path)
    assert line.startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/rms.py", "from normquant.spec import QuantSpec\nfrom normquant import kernels\nimport torch"),
        ("kernels/rms.py", "from . import _device\nfrom .launch import config\nfrom ..spec import QuantSpec"),
        ("kernels/__init__.py", "from .rms import rms"),
        ("__init__.py", "from .ops import rms\nfrom normquant.audit import audit"),
        ("demo/__init__.py", "from normquant.audit import audit\nfrom normquant.linear import block_fp8"),
        ("cli.py", "from normquant import demo"),
    ],
)
def test_an_allowed_import_passes(tmp_path: Path, path: str, source: str) -> None:
    _write(tmp_path, path, source)
    assert violations(tmp_path) == []


def _write(package: Path, path: str, source: str) -> None:
    (package / path).parent.mkdir(parents=True, exist_ok=True)
    (package / path).write_text(source)
