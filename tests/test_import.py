"""What ``import normquant`` brings in, and when the ops are registered with torch, each test in fresh processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import normquant
from normquant.cli import COMMANDS
from normquant.cli.bench import SUITES

SOURCES = Path(__file__).parents[1] / "src"
LAZY = ("triton", "transformers", "vllm", "torch._inductor")  # never imported by `import normquant` itself
OPS = "{'group_quant', 'rms_norm_quant', 'rope_last', 'block_fp8_linear'}"
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is blocked by this test")
sys.meta_path.insert(0, Blocked())
"""
EXPORT = """
import io, torch
import normquant as nq
class Quantize(torch.nn.Module):
    def forward(self, x):
        return nq.block_fp8_linear(nq.group_quant(x), self.weight, self.scale)
model = Quantize()
model.weight, model.scale = nq.quantize_weight(torch.randn(128, 128))
torch.export.save(torch.export.export(model, (torch.randn(2, 128, dtype=torch.bfloat16),)), sys.argv[1])
"""


def python(source: str, *args: str) -> str:
    """What a fresh interpreter prints."""
    path = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + source, *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_works_without_torch_triton_vllm_and_transformers() -> None:
    blocked = BLOCK.format(blocked={"torch", "triton", "vllm", "transformers"})
    source = """
import normquant
assert normquant.__file__, "normquant has no __init__.py"
assert set(normquant.__all__) <= set(dir(normquant)) and normquant.__version__
assert callable(normquant.audit)
try:
    normquant.group_quant
except ImportError as error:
    print(error)
"""
    expected = "normquant.group_quant needs torch, which cannot be imported: torch is blocked by this test"
    assert python(blocked + source) == expected


def test_the_ops_work_without_triton_vllm_and_transformers() -> None:
    blocked = BLOCK.format(blocked={"triton", "vllm", "transformers"})
    python(blocked + "import torch, normquant\nnormquant.group_quant(torch.ones(2, 128, dtype=torch.bfloat16))")


def test_import_brings_in_nothing_heavy() -> None:
    # torch may itself import what it likes: only what normquant adds on top of it counts
    source = (
        "import torch\nbefore = set(sys.modules)\nimport normquant\n"
        "assert all(hasattr(normquant, name) for name in dir(normquant))\n"
        f"print(sorted(m for m in set(sys.modules) - before if m.startswith({LAZY!r})))"
    )
    assert python(source) == "[]"


def test_import_warns_of_nothing() -> None:
    python("import warnings\nwarnings.simplefilter('error')\nimport normquant, normquant.cli")


def test_a_type_checker_knows_the_public_names() -> None:
    tree = ast.parse(Path(normquant.__file__).read_text())
    typed = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    names = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == {*normquant.__all__, *normquant._MODULES}


def test_dir_shows_what_is_public() -> None:
    shown = {name for name in dir(normquant) if not name.startswith("__")}
    assert shown == {*normquant.__all__, *normquant._MODULES}


HEAVY = ("torch", "triton", "transformers", "vllm", "numpy", "sympy", "jinja2", "matplotlib", "rich", "tqdm")
WORDS = (["--version"], ["--help"], *([c.name, "--help"] for c in COMMANDS), *(["bench", s, "--help"] for s in SUITES))


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_the_command_says_what_it_is_without_large_packages(words: list[str]) -> None:
    source = f"""
from normquant.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print([name for name in {HEAVY} if name in sys.modules], ended.code)
"""
    assert python(source, *words).endswith("[] 0")


LOOKED_UP = "import normquant, importlib.util\nassert importlib.util.find_spec('torch')\nimport torch"


@pytest.mark.parametrize("order", ["import torch, normquant", "import normquant, torch", LOOKED_UP])
def test_the_ops_are_registered_with_torch_in_whichever_order(order: str) -> None:
    python(f"{order}\nassert all(hasattr(torch.ops.normquant, name) for name in {OPS})")


@pytest.mark.parametrize("order", ["import torch, normquant", "import normquant, torch"])
def test_a_saved_program_is_loaded_by_a_process_that_only_imports(order: str, tmp_path: Path) -> None:
    python(EXPORT, str(tmp_path / "program.pt2"))
    run = "torch.export.load(sys.argv[1]).module()(torch.ones(2, 128, dtype=torch.bfloat16))"
    assert python(f"{order}\nprint({run}.shape)", str(tmp_path / "program.pt2")) == "torch.Size([2, 128])"


def test_a_compiler_resolves_public_names() -> None:
    source = """
import normquant as nq, torch
compiled = torch.compile(lambda x: nq.group_quant(x).data, backend="eager", fullgraph=True)
print(compiled(torch.ones(2, 128, dtype=torch.bfloat16)).dtype)
"""
    assert python(source) == "torch.float8_e4m3fn"


@pytest.mark.parametrize("module", ["spec", "reference", "kernels.capability", "compile.driver"])
def test_any_module_may_be_the_first_to_import_torch(module: str) -> None:
    ask = "import torch\nassert hasattr(torch.ops.normquant, 'group_quant')"
    python(f"import normquant.{module}\nimport normquant.linear\n{ask}")


def test_an_unknown_name_is_an_attribute_error() -> None:
    python("import normquant\nassert not hasattr(normquant, 'rms_norm')")
