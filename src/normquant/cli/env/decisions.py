"""What decides on this machine: switches, kernels, tables, caches, compilers. Nothing here needs torch or a GPU."""

from __future__ import annotations

import getpass
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from normquant.cli.env.machine import Gpu
from normquant.cli.env.packages import PACKAGES, distribution_version, is_importable, one_line

PLUGINS = "vllm.general_plugins"  # the group of vLLM's entry points
# Variables that others read and that change what is compiled or run; shown where they are set.
VARIABLES: dict[str, str] = {
    "VLLM_PLUGINS": "the plugins that vLLM loads, all that are installed without it",
    "VLLM_USE_DEEP_GEMM": "0: vLLM uses no DeepGEMM",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0: vLLM uses no linear kernel of FlashInfer",
    "VLLM_BATCH_INVARIANT": "1: vLLM's linear is DeepGEMM for every number of rows",
    "TRITON_INTERPRET": "1: Triton's kernels run in its interpreter, on the CPU",
    "TORCH_COMPILE_DISABLE": "1: torch.compile compiles nothing",
    "TORCHDYNAMO_DISABLE": "1: torch.compile compiles nothing",
    "CUDA_VISIBLE_DEVICES": "the GPUs that are seen",
}
COMPILER_TIMEOUT_S = 20


@dataclass(frozen=True)
class Setting:
    """Something that decides: its name, its value here, and what that means."""

    name: str
    value: str
    meaning: str = ""


def settings(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[Setting, ...]:
    """All of them, in the order in which they are shown. Never raises."""
    capabilities = sorted({c for gpu in gpus if (c := _numbers(gpu.capability))})
    return (
        switch(environ),
        _plugin(environ),
        *(Setting(name, environ[name], meaning) for name, meaning in VARIABLES.items() if name in environ),
        *(Setting(f"linear in vLLM, {_sm(c)}", linear_kernel(c, environ)) for c in capabilities),
        *(setting for c in capabilities for setting in tables(c)),
        *caches(environ),
        _compiler(environ),
    )


def switch(environ: Mapping[str, str]) -> Setting:
    """NORMQUANT, which `normquant.vllm.switches` reads, in words."""
    value = environ.get("NORMQUANT", "")
    meanings = {
        "": "the vLLM plugin changes nothing, unless vLLM's additional_config asks for it",
        "0": "the vLLM plugin is off, whatever vLLM's additional_config says",
        "1": "the vLLM plugin is on",
    }
    meaning = meanings.get(value, "an error when vLLM starts: 1 or 0 is accepted")
    return Setting("NORMQUANT", value or "not set", meaning)


def _plugin(environ: Mapping[str, str]) -> Setting:
    """Whether vLLM finds the plugin, and whether it is a vLLM that the plugin knows."""
    name = "vLLM plugin"
    try:
        found = any(point.name == "normquant" for point in importlib.metadata.entry_points(group=PLUGINS))
    except Exception as error:  # a damaged dist-info
        return Setting(name, one_line(error))
    value = "registered" if found else "not registered: normquant is not installed, run from its sources"
    if "normquant" not in environ.get("VLLM_PLUGINS", "normquant").split(","):
        return Setting(name, value, "VLLM_PLUGINS leaves it out")
    version = distribution_version(PACKAGES["vllm"])
    if version is None:
        return Setting(name, value, "there is no vLLM to load it")
    try:
        from normquant.vllm.plugin import why_unsupported
    except Exception as error:  # it needs torch
        return Setting(name, value, f"whether it knows vLLM {version} cannot be said: {one_line(error)}")
    return Setting(name, value, why_unsupported(version) or f"it knows vLLM {version}")


def linear_kernel(capability: tuple[int, int], environ: Mapping[str, str]) -> str:
    """The block-FP8 linear that vLLM 0.26 to 0.33 takes on such a GPU, whose layouts and rules the plugin follows.

    In vLLM's order: FlashInfer's and DeepGEMM's on Hopper, DeepGEMM's on Hopper and Blackwell, Cutlass, Triton.
    """
    if not is_importable("vllm"):
        return "none: vLLM is not installed"
    with_deepgemm = capability[0] in (9, 10) and environ.get("VLLM_USE_DEEP_GEMM", "1") != "0" and _has_deepgemm()
    asked = environ.get("VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER", "1") != "0"
    if capability == (9, 0) and asked and is_importable("flashinfer"):
        return "FlashInfer below 32 rows, DeepGEMM from there on" if with_deepgemm else "FlashInfer"
    if with_deepgemm:
        return "DeepGEMM"
    return "Cutlass" if capability >= (9, 0) else "Triton"


def _has_deepgemm() -> bool:
    """As a package, or the one inside vLLM's."""
    spec = importlib.util.find_spec("vllm")
    inside = Path(spec.origin).parent / "third_party" / "deep_gemm" if spec and spec.origin else None
    return is_importable("deep_gemm") or bool(inside and inside.is_dir())


def tables(capability: tuple[int, int]) -> Iterator[Setting]:
    """The committed measurements that a GPU goes by: launch configs of the kernels, strategies of policy "auto"."""
    name = _sm(capability)
    file = f"{name.replace('_', '')}.json"
    if configs := _json("kernels", "config_tables", file):
        measured = f"measured for {sum(map(len, configs.values()))} widths of {len(configs)} ops, else a rule"
        yield Setting(f"launch configs, {name}", file, measured)
    elif capability < (8, 9):
        yield Setting(f"launch configs, {name}", "none", "the kernels need compute capability 8.9 or later")
    else:
        yield Setting(f"launch configs, {name}", "none: a rule chooses", "`normquant tune` measures them")
    if strategies := _json("compile", "tables", file):
        by = f"{len(strategies['entries'])} entries, measured with torch {strategies.get('torch', 'unknown')}"
        yield Setting(f"strategies, {name}", file, f"{by}: what policy auto goes by")
    else:
        hint = "policy auto leaves every site to the compiler; `normquant tune --strategies` measures them"
        yield Setting(f"strategies, {name}", "none", hint)


def caches(environ: Mapping[str, str]) -> Iterator[Setting]:
    """Where compiled code is kept."""
    home = _home()
    cache = environ.get("XDG_CACHE_HOME") or (home and f"{home}/.cache")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        user = str(os.getuid())
    inductor = environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{user}"
    triton = environ.get("TRITON_CACHE_DIR") or (home and f"{environ.get('TRITON_HOME') or home}/.triton/cache")
    vllm = environ.get("VLLM_CACHE_ROOT") or (cache and f"{cache}/vllm")
    for name, folder in (("Inductor", inductor), ("Triton", triton), ("vLLM", vllm)):
        yield Setting(f"cache of {name}", folder or "none: this user has no home directory", _state(folder))


def _state(folder: str | None) -> str:
    if not folder:
        return ""
    path = Path(folder)
    try:
        if not path.exists():
            return "not there yet"
        return "" if path.is_dir() and os.access(path, os.W_OK) else "cannot be written"
    except OSError as error:
        return one_line(error)


def _compiler(environ: Mapping[str, str]) -> Setting:
    """The C++ compiler that Inductor uses for a CPU, and an audit where torch has no CUDA."""
    name, asked = "C++ compiler", environ.get("CXX")
    path = shutil.which(asked) if asked else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if path is None:
        lacks = f"CXX is {asked!r}, which is not there" if asked else "none found; apt install g++, or set CXX"
        return Setting(name, lacks, "compiling for a CPU, and audits with a torch without CUDA, need one")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=COMPILER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
        return Setting(name, path, one_line(error))
    return Setting(name, path, next(iter(done.stdout.splitlines()), f"exit code {done.returncode}"))


def _home() -> str | None:
    try:
        return str(Path.home())
    except RuntimeError:
        return None


def _json(*parts: str) -> dict | None:
    file = files("normquant").joinpath(*parts)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _numbers(capability: str | None) -> tuple[int, int] | None:
    major, _, minor = (capability or "").partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
