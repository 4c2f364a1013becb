"""The compile pass: finds every RMSNorm -> FP8 quantization in a compiled model, fuses those that pay, and says why.

    model = torch.compile(model, options=normquant.inductor_options())
    print(normquant.explain())

Importing this package imports nothing of the compiler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normquant.compile.fusion_report import FusionReport, Site, clear, explain, last_report, reports

__all__ = ["FusionReport", "Site", "clear", "explain", "inductor_options", "last_report", "reports"]


def inductor_options(
    policy: str = "auto",
    strict: bool = False,
    *,
    sites: Mapping[str, str] | None = None,
    table: str | None = None,
    mode: str | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Options for `torch.compile(options=...)` that fuse RMSNorm and FP8 quantization.

    policy: what to do with a site that the kernels can do.
        "auto": what was measured to be the fastest on this GPU; stock on hardware that was not measured.
        "always": one fused kernel. "never": nothing, only report.
        "native": its quantization becomes aten operations, for Inductor to fuse with the norm; where Inductor can nest
        reductions (torch >= 2.13), that is switched on for the whole model.
        "opaque-norm": fused where the norm is one opaque operation that the compiler cannot fuse itself, else stock.
    strict: let an exception of the pass end the compile; else the graph compiles as it was and the report says why.
    sites: glob of a site's name, as the report shows it -> a policy, "fused" or "stock" for those sites.
    table: path of a JSON file of measurements, as `normquant.compile.measured` describes it, that "auto" goes by.
    mode: "reduce-overhead", "max-autotune", ...: its options as well; torch.compile takes a mode or options, not both.
    overrides: further Inductor options; a "." in a name is written "__".

    Raises ValueError for an unknown policy or a file that is no table, OSError for one that cannot be read.
    """
    from normquant.compile.driver import NormQuantPass
    from normquant.compile.policy import Rules

    rules = Rules(policy, dict(sites or {}), table)  # type: ignore[arg-type]  # Rules checks the word
    options: dict[str, Any] = _mode_options(mode) if mode is not None else {}
    options |= {"post_grad_custom_pre_pass": NormQuantPass(rules, strict)}
    if "native" in (policy, *rules.sites.values()) and _has_option("triton.nested_reduction"):
        options["triton.nested_reduction"] = True
    return options | {name.replace("__", "."): choice for name, choice in overrides.items()}


def _has_option(name: str) -> bool:
    """Whether this torch's Inductor has an option."""
    from torch._inductor import config

    return name in config.get_config_copy()


def _mode_options(mode: str) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    try:
        return dict(list_mode_options(mode) or {})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"mode is {mode!r}; {error}") from None
