"""Opaque operators for the tests of rules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def operators() -> Iterator[None]:
    """Opaque operators: one that reads rows, one that writes in place, one whose name says that it is row-wise."""
    library = torch.library.Library("opaque_ops", "FRAGMENT")
    library.define("attend(Tensor x) -> Tensor")
    library.define("norm_(Tensor(a!) x) -> ()")
    library.define("group_quant(Tensor x) -> Tensor")
    torch.library.impl(library, "attend", "Meta")(torch.empty_like)
    torch.library.impl(library, "norm_", "Meta")(lambda x: None)
    torch.library.impl(library, "group_quant", "Meta")(lambda x: torch.empty_like(x, dtype=torch.float8_e4m3fn))
    yield
    library._destroy()
