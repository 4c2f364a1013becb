"""Every file of examples/ runs. tensor_parallel.py has its test in distributed/, the server in vllm/."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
ELSEWHERE = {"tensor_parallel.py": "distributed/test_examples.py", "vllm_server.sh": "vllm/test_server.py"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}

pytest.importorskip("triton", reason="needs triton: pip install 'normquant[nogpu]'")


def run(*arguments: str) -> str:
    """What a script prints; without a cache of compiled graphs, whose graphs have no report."""
    with tempfile.TemporaryDirectory() as cache:
        environ = ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_lists_every_file_and_every_file_is_run() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")}
    assert set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text())) == files
    here = Path(__file__).read_text()
    assert [name for name in files - ELSEWHERE.keys() if f'"{name}"' not in here] == []
    for name, test in ELSEWHERE.items():
        assert name in (ROOT / "tests" / test).read_text()


def test_a_block_of_pytorch() -> None:
    out = run(str(EXAMPLES / "pytorch_block.py"))
    assert "output: 0 of 65536 values differ" in out and "residual: 0 of 65536 values differ" in out
    assert "1 of 1 norm -> quant sites fused" in out
    stock, fused = (int(n) for n in re.findall(r"(?:stock|fused): (\d+) launches", out))
    assert fused < stock


@pytest.mark.exhaustive
def test_a_model_of_transformers() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    out = run(str(EXAMPLES / "transformers_model.py"))
    assert "norm -> quant sites fused (policy always)" in out
    assert "normquant.add_rms_norm_quant" in out


def test_a_model_to_audit() -> None:
    audit = ["-m", "normquant", "audit", str(EXAMPLES / "my_model.py") + ":build"]
    assert len(json.loads(run(*audit, "--json"))["kernels"]) > 0
    assert "2 of 2 norm -> quant sites fused" in run(*audit, "--fuse")


def test_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel, which make setup installs")
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    notebook = nbformat.read(EXAMPLES / "audit_a_model.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "opaque-boundary" in printed and "1 of 1 norm -> quant sites fused" in printed
