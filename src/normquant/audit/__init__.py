"""What a compiler really generated: kernels, DRAM bytes, and which of them are waste. Needs no GPU.

The package can be called: `nq.audit(fn, inputs)` is `normquant.audit.audit(fn, inputs)`, which compiles a function for
a target. `audit_path` reads generated code from disk. Importing the package imports neither torch nor triton.
"""

import inspect
import sys
import types
from typing import Any

from normquant.audit.reports import audit, audit_path
from normquant.audit.result import AuditReport

__all__ = ["AuditReport", "audit", "audit_path"]


class _CallablePackage(types.ModuleType):
    """This package, which would otherwise hide the function of the same name, or be hidden by it."""

    def __call__(self, *args: Any, **kwargs: Any) -> AuditReport:
        return audit(*args, **kwargs)


_CallablePackage.__call__.__doc__ = audit.__doc__
__signature__ = inspect.signature(audit)
sys.modules[__name__].__class__ = _CallablePackage
