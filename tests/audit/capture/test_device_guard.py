"""The device guard of a torch without CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from normquant.audit import targets
from normquant.audit.capture import device_guard


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch needs no compiled guard")
def test_the_guard_is_compiled_once_and_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device_guard.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(targets.Unavailable, match=r"needs a C\+\+ compiler once"):
        device_guard.ensure.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = device_guard.cache_dir() / f"noop-cuda-guard-{torch.__version__}.so"
    device_guard._compile(library)
    assert [path.name for path in library.parent.iterdir()] == [library.name], "nothing but the library is left"
