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

PASS = "post_grad_custom_pre_pass"
POST_GRAD = "use_post_grad_passes"


def inductor_options(
    policy: str = "auto",
    strict: bool = False,
    *,
    sites: Mapping[str, str] | None = None,
    table: str | None = None,
    products: str = "auto",
    mode: str | None = None,
    all_reduce: bool = False,
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
    products: whether a block-FP8 product and the kernel that reads it become one op, which may split the product over
        K: "auto", where that was measured to be the fastest; "always"; "never". It changes last bits.
    mode: "reduce-overhead", "max-autotune", ...: its options as well; torch.compile takes a mode or options, not both.
    all_reduce: fuse an all-reduce in front of a norm, too, on groups that have a workspace (`normquant.distributed`).
        It adds the parts of the ranks in rank order, where NCCL has an order of its own: other bits than without.
    overrides: further Inductor options; a "." in a name is written "__". A `post_grad_custom_pre_pass`, given here or
        set in torch._inductor.config, runs too, after this one.

    Raises ValueError for an unknown policy, a file that is no table, or options under which Inductor never runs the
    pass (`use_post_grad_passes=False`, which mode "lite" sets); OSError for a table that cannot be read.
    """
    from normquant.compile.driver import ALL_REDUCE_FUSIONS, FUSIONS, NormQuantPass
    from normquant.compile.policy import Rules

    rules = Rules(policy, dict(sites or {}), table, products)  # type: ignore[arg-type]  # Rules checks the word
    options: dict[str, Any] = _mode_options(mode) if mode is not None else {}
    if "native" in (policy, *rules.sites.values()) and _has_option("triton.nested_reduction"):
        options["triton.nested_reduction"] = True
    options |= {name.replace("__", ".").replace("-", "_"): choice for name, choice in overrides.items()}
    _check_that_passes_run(options, mode)
    ours = NormQuantPass(rules, strict, ALL_REDUCE_FUSIONS if all_reduce else FUSIONS)
    return options | {PASS: _in_order(ours, options)}


def _has_option(name: str) -> bool:
    """Whether this torch's Inductor has an option."""
    from torch._inductor import config

    return name in config.get_config_copy()


def _check_that_passes_run(options: Mapping[str, Any], mode: str | None) -> None:
    from torch._inductor import config

    if not options.get(POST_GRAD, getattr(config, POST_GRAD, True)):
        where = f"mode {mode!r} sets" if mode == "lite" else "the options or torch._inductor.config set"
        raise ValueError(f"{where} {POST_GRAD}=False: Inductor would never run the pass; {POST_GRAD}=True lets it run")


def _in_order(ours: Any, options: Mapping[str, Any]) -> Any:
    """Our pass, then those that the options or the config have in its place: one, a list of them, or None."""
    from torch._inductor import config

    from normquant.compile.driver import NormQuantPass
    from normquant.compile.pass_sequence import PassSequence

    given = options.get(PASS, getattr(config, PASS))
    given = given if isinstance(given, (list, tuple)) else [given]
    others = tuple(one for one in given if one is not None and not isinstance(one, NormQuantPass))
    return PassSequence((ours, *others)) if others else ours


def _mode_options(mode: str) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    try:
        return dict(list_mode_options(mode) or {})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"mode is {mode!r}; {error}") from None
