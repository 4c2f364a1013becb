"""Which part of normquant may import which, and what belongs where; read from the sources."""

from __future__ import annotations

import ast
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest

from normquant.ops import OPS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "src" / "normquant"

# layer -> the layers that it imports directly; what those may import it may import too. A layer is a file or a folder.
IMPORTS: dict[str, set[str]] = {
    "spec": set(),
    "specs": {"spec"},
    "approximate_reciprocal": {"spec"},
    "reference": {"spec", "approximate_reciprocal"},
    "kernels": {"spec"},
    "ops": {"reference", "kernels"},
    "linear": {"ops"},
    "distributed": {"ops"},
    "compile": {"linear", "specs", "distributed"},
    "vllm": {"compile", "linear", "version"},
    "integrations": {"vllm"},
    "audit": {"report"},
    "bench": {"ops", "specs", "version", "compile", "linear", "distributed", "vllm"},
    "tune": {"bench"},
    "report": set(),
    "demo": {"audit", "bench", "compile", "linear", "report"},
    "version": set(),
    "testing": {"audit"},
}
TOP = {"cli", "__main__"}  # may import everything, and nothing outside of TOP imports them
ROOT = "__init__"  # re-exports the public names: may import every layer, and no layer imports it back

FRAMEWORKS = {"vllm", "transformers", "flashinfer", "sglang", "deep_gemm"}  # known by name in compile and audit
BUILDS_MODELS = "audit/capture/model_inputs.py"  # of transformers, where it is asked for one by name
GROUP_OPS = {"all_reduce_add_rms_norm_quant"}  # run by the workspace of their group, so that they are not in OPS
REGISTER_OPS = (
    *("ops/_op.py", "ops/all_reduce_add_rms_norm_quant.py", "linear/", "vllm/fp8_linear.py", "vllm/experts_op.py"),
    "bench/decoder_layers.py",  # a stand-in
)
DOCUMENTED = {"compile/cleanup.py"}  # an import path of users, whose code has the same name elsewhere

MACHINE_ONLY = {"gpu", "vllm"}  # tests by what they need; they mirror nothing
FOLDERS = {"vllm_plugin": "vllm"}  # tests/vllm needs vLLM
# Tests of several modules together.
TOGETHER = (
    *("test_docs", "test_examples", "test_import", "test_layering", "test_peers", "test_reference_values"),
    *("cli/test_audit_model", "integrations/test_documented_paths", "compile/find/test_reasons", "compile/test_zoo"),
    *("test_screenshots", "vllm_plugin/test_on_call"),
    *("compile/test_inductor", "compile/test_models", "compile/test_nested_graphs", "compile/test_random_graphs"),
    "compile/test_unusual_graphs",
    *("compile/test_vllm_graphs", "compile/fusions/test_vllm_cases", "kernels/test_machine_code", "ops/test_ops"),
    *("cli/test_completion", "cli/test_exit_codes"),
    "report/page/test_browser",
    *("linear/test_checkpoints", "linear/test_export", "linear/test_models", "linear/test_sharding"),
    *(
        "bench/test_baselines",
        "bench/test_products_page",
        "bench/test_scale_page",
        "distributed/test_compiled",
        "distributed/test_exchange",
        "distributed/test_examples",
        "distributed/test_ops",
    ),
)
# Modules without a test file of their own -> the tests that cover them.
COVERED = {
    "__main__.py": "cli/test_entry",
    "version.py": "cli/test_entry",
    "audit/[oprt]*.py": "audit/test_reports",
    "audit/capture/model_inputs.py": "cli/test_audit",
    "audit/capture/fake_build.py": "cli/test_audit_model",
    "audit/capture/named_objects.py": "cli/test_audit_model",
    "audit/rules/data_flow.py": "audit/rules/test_traffic",
    "audit/source/*.py": "audit/source/test_wrapper_code",
    "bench/decoder_layers.py": "compile/test_models",
    "bench/kernels.py": "cli/test_bench",
    "bench/providers.py": "bench/test_cases",
    "bench/rank*.py": "cli/test_bench",
    "bench/vllm/*.py": "vllm/test_bench",
    "cli/arguments.py": "cli/test_bench",
    "cli/env/packages.py": "cli/env/test_machine",
    "cli/terminal.py": "cli/test_list",
    "cli/audit?*.py": "cli/test_audit",
    "compile/*.py": "compile/test_inductor",
    "compile/edit/*.py": "compile/fusions/test_latent_norm_quant",
    "compile/find/*.py": "compile/find/test_sites",
    "compile/fusions/*.py": "compile/find/test_sites",
    "demo/demonstration.py": "cli/test_demo",
    "distributed/*.py": "distributed/test_ops",
    "integrations/*.py": "integrations/test_documented_paths",
    "kernels/*.py": "kernels/test_machine_code",
    "linear/split_product.py": "linear/test_pairs",
    "ops/*.py": "ops/test_ops",
    "report/page/view.py": "report/page/test_html",
    "report/formatting.py": "report/test_audit_text",
    "tune/by_decode_step.py": "tune/test_decode_step",
    "vllm/compile_pass.py": "vllm_plugin/test_plugin",
    "vllm/experts_op.py": "vllm_plugin/test_compiled_experts",
    "vllm/first_forward.py": "vllm_plugin/test_uncompiled",
    "vllm/fp8_linear.py": "compile/fusions/test_vllm_linear",
    "vllm/linear_inputs.py": "vllm/test_manual",
    "vllm/manual.py": "vllm/test_manual",
    "vllm/norm_modules.py": "vllm_plugin/test_uncompiled",
    "vllm/module_paths.py": "vllm_plugin/test_uncompiled",
    "vllm/producers.py": "vllm_plugin/test_uncompiled",
    "vllm/quantizing_readers.py": "vllm_plugin/test_uncompiled",
    "vllm/taking.py": "vllm_plugin/test_uncompiled",
    "vllm/tensor_parallel.py": "vllm_plugin/test_plugin",
}


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


def sources() -> list[tuple[str, ast.Module]]:
    """Path under the package and syntax tree of every module."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [(file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))) for file in files]


def modules(folder: str = "") -> list[str]:
    """Paths of the modules under a folder, those of packages left out."""
    return [path for path, _ in sources() if path.startswith(folder) and not path.endswith("__init__.py")]


def own_test(module: str) -> str:
    """`vllm/plugin.py` -> `vllm_plugin/test_plugin`."""
    folder, _, name = module.removesuffix(".py").rpartition("/")
    folder = next((tests for tests, ours in FOLDERS.items() if ours == folder), folder)
    return f"{folder}/test_{name}".removeprefix("/")


def files_of_tests() -> set[str]:
    """Paths of all test files but those that are sorted by what they need."""
    found = {file.relative_to(TESTS).with_suffix("").as_posix() for file in TESTS.rglob("test_*.py")}
    return {path for path in found if path.split("/")[0] not in MACHINE_ONLY}


def test_every_module_has_tests() -> None:
    files = files_of_tests()
    alone = [module for module in modules() if own_test(module) not in files]
    assert [module for module in alone if not any(fnmatch(module, pattern) for pattern in COVERED)] == []
    assert [pattern for pattern in COVERED if not any(fnmatch(module, pattern) for module in alone)] == []
    assert [path for path in COVERED.values() if not (TESTS / f"{path}.py").is_file()] == []


def test_every_test_file_has_a_module() -> None:
    folders = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py")}
    own = {own_test(name) for name in (*modules(), *folders)}
    assert files_of_tests() - own - set(TOGETHER) == set()
    assert set(TOGETHER) - files_of_tests() == set()


def test_the_pass_and_the_auditor_import_no_framework() -> None:
    for path, tree in sources():
        if path.startswith(("compile/", "audit/")):
            roots = {name.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names}
            roots |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not roots & FRAMEWORKS - ({"transformers"} if path == BUILDS_MODELS else set()), path


def test_a_name_is_given_once() -> None:
    ops = {Path(path).stem for path in modules("ops/")}
    stems = Counter(Path(path).stem for path in modules() if path not in DOCUMENTED)
    assert {stem for stem, count in stems.items() if count > 1} <= ops
    classes = Counter(n.name for _, tree in sources() for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1] == []


def test_every_file_of_an_op_registers_it() -> None:
    stems = {Path(path).stem for path in modules("ops/")}
    assert {op.stem for op in OPS.values()} | GROUP_OPS == {stem for stem in stems if not stem.startswith("_")}


def test_ops_are_registered_in_few_places() -> None:
    for path, tree in sources():
        uses = any(isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.library" for n in ast.walk(tree))
        assert not uses or path.startswith(REGISTER_OPS), path


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
