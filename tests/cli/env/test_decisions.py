"""What `normquant env` says decides, on machines made of files and variables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from normquant.cli.env import decisions
from normquant.cli.env.machine import Gpu
from normquant.compile.measured import measured
from normquant.kernels.configs import _table
from normquant.vllm.switches import read_switches

SRC = Path(__file__).parents[3] / "src"
H100, L4, A100, B200 = (
    Gpu(name, cc, 1) for name, cc in (("H100", "9.0"), ("L4", "8.9"), ("A100", "8.0"), ("B", "10.0"))
)


def value(name: str, gpus: list[Gpu], environ: dict[str, str]) -> str:
    found = {s.name: s for s in decisions.settings(gpus, environ)}
    return f"{found[name].value} ({found[name].meaning})"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vLLM with a DeepGEMM inside, FlashInfer, and nothing else of that kind."""
    for package in ("vllm", "flashinfer", "vllm/third_party/deep_gemm"):
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", ["", "0", "1", "yes"])
def test_the_switch_means_what_the_plugin_reads(given: str) -> None:
    meaning = decisions.switch({"NORMQUANT": given}).meaning
    try:
        enabled = read_switches({"NORMQUANT": given}, {"normquant": {}}).enabled
    except ValueError:
        assert "an error" in meaning
        return
    alone = read_switches({"NORMQUANT": given}, None).enabled
    assert (" is on" in meaning, " is off" in meaning) == (enabled and alone, not enabled)
    assert ("additional_config asks" in meaning) == (enabled and not alone)


@pytest.mark.parametrize(
    ("gpu", "environ", "kernel"),
    [
        (H100, {}, "FlashInfer below 32 rows, DeepGEMM from there on"),
        (H100, {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0"}, "DeepGEMM"),
        (H100, {"VLLM_USE_DEEP_GEMM": "0"}, "FlashInfer"),
        (H100, {"VLLM_USE_DEEP_GEMM": "0", "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0"}, "Cutlass"),
        (B200, {}, "DeepGEMM"),
        (L4, {}, "Triton"),
    ],
)
def test_the_linear_kernel_that_vllm_takes(installed: Path, gpu: Gpu, environ: dict[str, str], kernel: str) -> None:
    name = f"linear in vLLM, sm_{gpu.capability.replace('.', '')}"  # type: ignore[union-attr]
    assert value(name, [gpu], environ) == f"{kernel} ()"
    for variable in environ:
        assert value(variable, [gpu], environ).startswith("0 (0: vLLM uses no ")


def test_without_vllm_there_is_no_linear_kernel() -> None:
    assert decisions.linear_kernel((9, 0), {}) == "none: vLLM is not installed"


def test_tables_are_those_that_kernels_and_policy_read() -> None:
    table, strategies = _table((9, 0)), measured((9, 0))
    assert strategies is not None
    widths = sum(len(by_k) for by_k in table.values())
    configs = f"sm90.json (measured for {widths} widths of {len(table)} ops, else a rule)"
    assert value("launch configs, sm_90", [H100, H100], {}) == configs
    entries = f"sm90.json ({len(strategies.entries)} entries, measured with torch 2.11.0: what policy auto goes by)"
    assert value("strategies, sm_90", [H100], {}) == entries
    assert _table((8, 9)) == {} and measured((8, 9)) is None
    assert value("launch configs, sm_89", [L4], {}).startswith("none: a rule chooses")
    assert value("strategies, sm_89", [L4], {}).startswith("none (policy auto leaves every site")
    assert "need compute capability 8.9" in value("launch configs, sm_80", [A100], {})


def test_a_plugin_that_vllm_is_told_not_to_load(installed: Path) -> None:
    assert value("vLLM plugin", [], {"VLLM_PLUGINS": "other"}).endswith("(VLLM_PLUGINS leaves it out)")
    (installed / "vllm-0.25.1.dist-info").mkdir()
    (installed / "vllm-0.25.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.25.1\n"
    )
    for environ in ({}, {"VLLM_PLUGINS": "other,normquant"}):
        assert value("vLLM plugin", [], environ).endswith("(vLLM is 0.25.1; 0.26 to 0.33 are supported)")


def test_caches_are_where_the_variables_say(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environ = {"TRITON_CACHE_DIR": str(tmp_path), "VLLM_CACHE_ROOT": f"{tmp_path}/no", "XDG_CACHE_HOME": "/else"}
    assert value("cache of Triton", [], environ) == f"{tmp_path} ()"
    assert value("cache of vLLM", [], environ) == f"{tmp_path}/no (not there yet)"
    assert value("cache of vLLM", [], {"XDG_CACHE_HOME": "/else"}) == "/else/vllm (not there yet)"
    inductor = {"TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/file"}
    assert value("cache of Inductor", [], inductor) == f"{tmp_path}/file (cannot be written)"


def test_inductor_s_own_default_is_the_one_shown() -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert value("cache of Inductor", [], {}).split(" ")[0] == default_cache_dir()


def test_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'g++ 14.2'\necho more\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert value("C++ compiler", [], {}) == f"{compiler} (g++ 14.2)"
    assert value("C++ compiler", [], {"CXX": "icpx"}).startswith("CXX is 'icpx', which is not there")
    compiler.unlink()
    assert value("C++ compiler", [], {}).startswith("none found; apt install g++, or set CXX")


def test_a_user_without_a_home_a_name_and_packages(tmp_path: Path) -> None:
    """`python -S` as a user that no database knows: what is missing is said, and nothing fails."""
    code = (
        "import os, sys, pwd\n"
        "def no(*given): raise KeyError('no such user')\n"
        "pwd.getpwuid = no\n"
        "from normquant.cli import main\n"
        "sys.exit(main(['env', '--json', '--full']))\n"
    )
    kept = {"PYTHONPATH": str(SRC), "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=120, env=kept)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["decides"]["cache of Triton"]["value"] == "none: this user has no home directory"
    assert report["decides"]["cache of Inductor"]["value"].endswith(f"torchinductor_{os.getuid()}")
    assert report["collect_env"] == "torch cannot be imported"
    assert report["decides"]["vLLM plugin"]["meaning"] == "there is no vLLM to load it"
