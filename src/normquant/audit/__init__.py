"""What a compiler really generated: kernels, DRAM bytes, and what of it is waste. Needs no GPU.

`audit` compiles a function for a target; `audit_path` reads generated code from disk. Importing this package imports
neither torch nor triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normquant.audit.result import AuditReport

__all__ = ["audit"]


def audit(
    fn: Callable[..., Any],
    make_inputs: Callable[[], tuple[Any, ...]] | tuple[Any, ...],
    target: str = "h100",
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> AuditReport:
    """Compile `fn` for `target`, on any machine, and report what was generated and what of it is waste.

    Args:
        fn: a function or an `nn.Module`; compiled without gradients, never run on data.
        make_inputs: called with no arguments where every tensor is fake and takes no memory; builds the inputs (modules
            among them, too) with device="cuda". Or a tuple of tensors on any device, of which only the form is used.
        target: "h100", "h200", "b200", or "here" for this machine's GPU.
        options: Inductor options, as for `torch.compile(options=...)`.
        dynamic: as for `torch.compile`.

    Raises:
        ValueError: an unknown target or option.
        RuntimeError: target "here" without a GPU; no triton; no C++ compiler where torch was built without CUDA.
        Whatever `make_inputs`, or the compile of `fn`, raises.

    For a target that is not this machine's GPU, Inductor's patterns for attention written out in PyTorch and for
    padding matrix products are left out, because it makes them on a GPU; the notes of `report.programs` say what else
    differs.

    Compiled functions of this process are compiled anew when they are next called: the compiler's state is reset.
    """
    from normquant.audit import on_disk
    from normquant.audit.capture.live_compile import capture
    from normquant.audit.source import wrapper_code

    captured = capture(fn, make_inputs, target, options, dynamic)
    modules = [wrapper_code.read_module(one.source, f"graph {index}") for index, one in enumerate(captured)]
    text = "\n".join(one.source for one in captured)
    return on_disk.reports(modules, text, target, scheduled=[one.scheduled for one in captured])[0]
