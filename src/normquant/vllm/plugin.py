"""vLLM's entry point `vllm.general_plugins`: puts the compile pass into vLLM, when a switch asks for it.

vLLM loads it in each of its processes. Two methods of vLLM are wrapped here, and do more than before only where the
config asks for normquant:

- `VllmConfig.compute_hash`, which every path to a compiled graph calls first, from a cache or not. normquant's version
  and switches go into the hash, so that no graph compiled with other ones is loaded, and
  `PostGradPassManager.configure` is wrapped, which then inserts the pass.
- `CompilationConfig.custom_op_log_check`, which vLLM calls when it has made a model, compiled or not (`loading`).

Nothing here touches CUDA.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
from typing import Any

from normquant.version import VERSION
from normquant.vllm.switches import Switches, read_switches

log = logging.getLogger("vllm.normquant")  # below "vllm", so that vLLM's own handlers show it

MODEL_MADE = "custom_op_log_check"
MARK = "_normquant_wraps"  # on a wrapper of ours: the method of vLLM that it wraps
OLDEST, NEWEST = (0, 26), (0, 33)  # the versions of vLLM that the plugin was made for
_declined: set[str] = set()


def register() -> None:
    """Make vLLM look at normquant's switches. Idempotent; changes nothing where no switch is set.

    A vLLM that the plugin does not know is left as it is, with one warning where NORMQUANT=1 asked for more.
    Raises ValueError for a NORMQUANT that is neither 0 nor 1.
    """
    asked = read_switches(os.environ, None).enabled
    try:
        from vllm import __version__, config
    except ImportError as error:
        return _decline(f"vLLM cannot be imported: {error}", asked)
    reason = why_unsupported(__version__) or _lacks(config, "VllmConfig") or _lacks(config.VllmConfig, "compute_hash")
    if reason:
        return _decline(reason, asked)
    _wrap(config.VllmConfig, "compute_hash", _hash_with_switches)
    reason = _lacks(config, "CompilationConfig", "get_current_vllm_config") or _lacks(
        config.CompilationConfig, MODEL_MADE
    )
    if reason:
        return _decline(f"{reason}; this concerns models that it does not compile", asked)
    _wrap(config.CompilationConfig, MODEL_MADE, _model_made)


def _hash_with_switches(original: Any, config: Any, *args: Any, **kwargs: Any) -> str:
    """vLLM's hash of a config, with normquant's version and switches where the config switches normquant on."""
    stock = original(config, *args, **kwargs)
    switches = _switches(config)
    if not switches.enabled or not _install():
        return stock
    from normquant.vllm.compile_pass import pass_key

    if switches.all_reduce:
        from normquant.distributed import open_at_first_call

        open_at_first_call()  # graphs may come from a cache: then this is all that a process sees before it calls them
    key = pass_key(switches)
    return hashlib.sha256(f"{stock} {key}".encode()).hexdigest()[: len(stock)]


def _install() -> bool:
    """Wrap vLLM's pass manager, once. False, after one warning, where it is not the one that the plugin knows."""
    try:
        from vllm.compilation.passes import inductor_pass, pass_manager
    except ImportError as error:
        _decline(f"vLLM's compile passes cannot be imported: {error}", asked=True)
        return False
    reason = (
        _lacks(pass_manager, "PostGradPassManager")
        or _lacks(pass_manager.PostGradPassManager, "configure", "__call__", "uuid")
        or _lacks(inductor_pass, "InductorPass", "get_pass_context")
        or _lacks(inductor_pass.InductorPass, "is_applicable_for_range")
    )
    if reason:
        _decline(reason, asked=True)
        return False
    _wrap(pass_manager.PostGradPassManager, "configure", _configure_with_pass)
    return True


def _configure_with_pass(original: Any, manager: Any, config: Any) -> None:
    """vLLM's list of passes, and ours in it where the config switches normquant on."""
    original(manager, config)
    switches = _switches(config)
    if not switches.enabled:
        return
    if not isinstance(getattr(manager, "passes", None), list):
        return _decline("vLLM's PostGradPassManager has no list of passes", asked=True)
    from normquant.vllm.compile_pass import insert

    entry = insert(manager, switches, config)
    where = f"; `normquant vllm-report {entry.directory}` says what fused" if entry.directory else ""
    log.info("normquant %s fuses norm and quantization, policy %s%s", VERSION, switches.rules.policy, where)


def _model_made(original: Any, compilation: Any, *args: Any, **kwargs: Any) -> Any:
    """A model was made: have it looked at when its weights are there, where its config switches normquant on."""
    result = original(compilation, *args, **kwargs)
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    switches = _switches(config)
    if switches.enabled:
        from normquant.vllm.loading import expect

        expect(config, switches)
    return result


def _switches(config: Any) -> Switches:
    return read_switches(os.environ, getattr(config, "additional_config", None))


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    """Replace a method by `wrapper(original, *args)`; a second time changes nothing."""
    original = getattr(owner, name)
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, MARK, original)
    setattr(owner, name, wrapped)


def _lacks(owner: Any, *names: str) -> str | None:
    """What an object that the plugin touches is missing."""
    missing = [name for name in names if not hasattr(owner, name)]
    return f"{getattr(owner, '__name__', owner)} has no {', '.join(missing)}" if missing else None


def _decline(reason: str, asked: bool) -> None:
    """Say once why vLLM stays as it was; a warning only for those who asked."""
    if reason not in _declined:
        _declined.add(reason)
        log.log(logging.WARNING if asked else logging.DEBUG, "normquant %s leaves vLLM as it is: %s", VERSION, reason)


def why_unsupported(version: str) -> str | None:
    """Why a vLLM of this version is left alone, None where it is one that the plugin knows.

    version: as `vllm.__version__` says it: "0.32.0", "0.26.0+cu130", "0.33.1rc2.dev7+g0123456".
    """
    window = f"{_text(OLDEST)} to {_text(NEWEST)} are supported"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return f"vLLM's version {version!r} has no number; {window}"
    if not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return f"vLLM is {version}; {window}"
    return None


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
