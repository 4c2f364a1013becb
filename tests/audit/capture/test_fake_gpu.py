"""A GPU that is not there leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared.clean_graphs import double, rows_of_ones

from normquant.audit import audit, targets
from normquant.audit.capture import fake_gpu


def state() -> dict[str, Any]:
    """All that is replaced during a capture."""
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._subclasses.fake_tensor as fake_tensor
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import WhyNoFuse

    owners: dict[str, Any] = {
        "cuda": torch.cuda, "interface": CudaInterface, "worker": CudaInterface.Worker, "version": torch.version,
        "fake_tensor": fake_tensor, "joint_graph": joint_graph, "folder": joint_graph.UniformValueConstantFolder,
        "scheduling": TritonScheduling, "graph": GraphLowering, "why": WhyNoFuse,
    }  # fmt: skip
    held = {f"{name}.{key}": value for name, owner in owners.items() for key, value in vars(owner).items()}
    held["driver"] = triton.runtime.driver._active
    held["config"] = str(sorted(config.get_config_copy().items(), key=str))
    held["functorch"] = functorch_config.enable_autograd_cache
    held["modes"] = torch._C._len_torch_dispatch_stack()
    held["grad"] = torch.is_grad_enabled()
    return held


def unchanged(before: dict[str, Any]) -> bool:
    after = state()
    differ = [
        k for k in before.keys() | after.keys() if before.get(k) is not after.get(k) and before.get(k) != after.get(k)
    ]
    return differ == []


def test_everything_is_put_back() -> None:
    audit(double, rows_of_ones)  # what is imported on first use is there before the comparison
    before = state()
    audit(double, rows_of_ones)
    assert unchanged(before)
    assert not torch.cuda.is_available() or torch.version.cuda is not None


@pytest.mark.parametrize("error", [ValueError("no inputs"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["inputs", "compile"])
def test_everything_is_put_back_after(error: BaseException, where: str) -> None:
    def fail(*args: Any) -> Any:
        raise error

    class Pass(torch._inductor.custom_graph_pass.CustomGraphPass):
        __call__ = fail

        def uuid(self) -> None:
            return None

    audit(double, rows_of_ones)
    before = state()
    with pytest.raises((type(error), torch._dynamo.exc.BackendCompilerFailed)):
        if where == "inputs":
            audit(double, fail)
        else:
            audit(double, rows_of_ones, options={"post_grad_custom_pre_pass": Pass()})
    assert unchanged(before)


def test_torch_compile_works_afterwards() -> None:
    audit(double, rows_of_ones)
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(torch.compile(double, backend="aot_eager")(x), x * 2)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch needs no compiled guard")
def test_the_guard_is_compiled_once_and_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fake_gpu.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(targets.Unavailable, match=r"needs a C\+\+ compiler once"):
        fake_gpu.ensure_device_guard.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = fake_gpu.guard_dir() / f"noop-cuda-guard-{torch.__version__}.so"
    fake_gpu._compile_guard(library)
    assert [path.name for path in library.parent.iterdir()] == [library.name], "nothing but the library is left"
