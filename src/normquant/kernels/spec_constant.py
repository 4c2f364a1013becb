"""A QuantSpec as a compile-time constant of a kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

from normquant.spec import QuantSpec


class Constant(str):
    """A QuantSpec as the compile-time constant of a kernel: its text, which has the spec's fields.

    Triton's hooks, such as serving engines set to watch for compiles, write a kernel's constants as JSON.
    """

    spec: QuantSpec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)


@cache
def constant(spec: QuantSpec) -> Constant:
    """The constant that stands for a spec."""
    text = Constant(spec.encode())
    text.spec = spec
    return text
