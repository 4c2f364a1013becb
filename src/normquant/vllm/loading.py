"""A model that vLLM has just loaded: is it compiled, with normquant's pass in it, or is it not, and then what instead.

vLLM says that a model was made before its weights are there (`CompilationConfig.custom_op_log_check`, whose wrapper in
`plugin` calls `expect`), and then gets the weights ready with a function that the loaders hold by name. That function
is wrapped in them, for the model that is expected.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normquant.version import VERSION
from normquant.vllm.compiled_experts import CompiledExperts
from normquant.vllm.expert_products import ExpertProducts
from normquant.vllm.graph_records import NOT_COMPILED, GraphRecord, overwrite
from normquant.vllm.switches import Switches
from normquant.vllm.uncompiled import HandOver, watch

log = logging.getLogger("vllm.normquant")

LOADERS = "vllm.model_executor.model_loader"
READY = "process_weights_after_loading"
WRAPS = "_normquant_wraps"
COMPILED, BY_TORCH = 3, (1, 2)  # vLLM's modes: with its own passes, and by torch.compile alone
SAYS_SELF = "vLLM does not compile {model} ({why}), so that no graph is rewritten: {what}"
WHAT = (
    "norms and gated products hand their quantized form to the block-FP8 products that read them, as the first forward "
    "pass shows; kv latents, RoPE and quantizations of anything else stay as they are"
)


@dataclass
class _Expected:
    """The model that is being loaded: its config and switches."""

    config: Any
    switches: Switches


_expected: list[_Expected] = []


def expect(config: Any, switches: Switches) -> None:
    """Look at the model of this config as soon as its weights are ready. Idempotent."""
    _expected[:] = [_Expected(config, switches)]
    for name, module in list(sys.modules.items()):
        original = getattr(module, READY, None) if name.startswith(LOADERS) else None
        if original is not None and not hasattr(original, WRAPS):
            setattr(module, READY, _wrapped(original))


def _wrapped(original: Any) -> Any:
    def ready(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(model, *args, **kwargs)
        for expected in _expected[:]:
            _expected.clear()
            _look(model, expected)
        return result

    setattr(ready, WRAPS, original)
    return ready


def _look(model: nn.Module, expected: _Expected) -> None:
    """What becomes of a model. A failure leaves it as it is, with one warning."""
    switches, config = expected.switches, expected.config
    try:
        why = why_not_compiled(model, config)
        if why is None:
            CompiledExperts(model, switches, config.compilation_config.splitting_ops)
            ExpertProducts(model, switches)
            return
        by_torch = int(config.compilation_config.mode) in BY_TORCH
        what = "nothing is fused" if by_torch else WHAT
        log.warning("normquant %s: %s", VERSION, SAYS_SELF.format(model=_model_name(config), why=why, what=what))
        if not by_torch:
            ExpertProducts(model, switches)
            watch(model, switches, lambda hand_over: _report(hand_over, config, why))
    except Exception as error:
        if switches.strict:
            raise
        log.warning("normquant leaves the model as it is: %s: %s", type(error).__name__, error)


def why_not_compiled(model: nn.Module, config: Any) -> str | None:
    """Why no graph of a model goes through vLLM's compile passes; None where its graphs do."""
    mode = config.compilation_config.mode
    name = f"compilation mode {getattr(mode, 'name', mode)}"
    if int(mode) != COMPILED:
        if getattr(config.model_config, "enforce_eager", False):
            return f"{name}, by --enforce-eager"
        if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") == "1":
            return f"{name}, with breakable CUDA graphs"
        return name
    if all(getattr(module, "do_not_compile", True) for module in model.modules()):
        return "the model has no support for it"
    return None


def _report(hand_over: HandOver, config: Any, why: str) -> None:
    """Say what is handed over in a model, and write it where `normquant vllm-report` looks."""
    report = hand_over.report
    assert report is not None
    directory = _directory(config)
    where = f"; `normquant vllm-report {directory}` says which, and why not the others"
    counts = len(report.fused), len(report.sites)
    log.info("normquant: %d of %d norms and gated products hand over their quantized form%s", *counts, where)
    from vllm import __version__

    record = GraphRecord(VERSION, __version__, f"{NOT_COMPILED} ({why})", report.to_dict(), hand_over.kernels())
    try:
        overwrite(directory, record)
    except OSError as error:
        log.warning("normquant's report was not written: %s", error)


def _directory(config: Any) -> Path:
    """A folder for the model beside vLLM's compile caches, one for each rank."""
    import torch.distributed as dist
    from vllm import envs

    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    key = hashlib.sha256(config.compute_hash().encode()).hexdigest()[:10]
    return Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache" / f"not-compiled-{key}" / f"rank_{rank}"


def _model_name(config: Any) -> str:
    architectures = getattr(config.model_config, "architectures", None) or ()
    return f"{config.model_config.model} ({', '.join(architectures)})"
