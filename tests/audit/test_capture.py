"""A live compile for a GPU that is not there, and that it leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.clean_graphs import BF16, empty

from normquant.audit import audit, targets
from normquant.audit.capture import device_guard as deviceguard
from normquant.audit.capture.live_compile import capture
from normquant.audit.program import Extern, Kernel


def rows_of_ones() -> tuple[torch.Tensor, ...]:
    return (empty(64, 512),)


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


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


def test_code_is_generated_for_the_target() -> None:
    for name, capability in (("h100", "cc=90"), ("h200", "cc=90"), ("b200", "cc=100")):
        report = audit(double, rows_of_ones, target=name)
        assert capability in report.source and report.target.name == name
        (kernel,) = report.kernels
        assert isinstance(kernel, Kernel) and kernel.kind == "pointwise"
        assert f"def {kernel.name}(" in report.source


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


def test_an_error_of_the_function_is_shown_as_it_is() -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x + empty(3)

    with pytest.raises(Exception, match=r"broadcast|size"):
        audit(wrong, rows_of_ones)


def test_a_module_keeps_its_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.BatchNorm1d(32)).eval()
    held = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    report = audit(model, (torch.randn(4, 32),))
    assert report.externs == {"aten.mm": 1} or report.externs == {"aten.addmm": 1}
    after = model.state_dict(keep_vars=True)
    assert {name: id(tensor) for name, tensor in after.items()} == {name: key for name, (key, _) in held.items()}
    assert all(torch.equal(after[name], value) for name, (_, value) in held.items())
    assert model(torch.randn(4, 32)).shape == (4, 32)


def test_a_module_may_be_built_among_the_inputs() -> None:
    def build() -> tuple[Any, ...]:
        with torch.device("cuda"):
            return torch.nn.Linear(512, 256, dtype=BF16), empty(64, 512)

    report = audit(lambda linear, x: linear(x).relu(), build)
    assert [type(launch) for launch in report.launches] == [Extern, Kernel]


def test_every_graph_of_a_broken_function_is_seen() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return y.sum(-1)

    captured = capture(broken, rows_of_ones)
    assert len(captured) == 2
    assert [len(one.scheduled.kernels) for one in captured] == [1, 1]


def test_symbolic_sizes_are_kept() -> None:
    report = audit(double, (torch.empty(64, 512, dtype=BF16),), dynamic=True)
    (program,) = report.programs
    assert set(program.sizes.values()) >= {64}
    (kernel,) = program.kernels
    assert kernel.bytes_read == kernel.bytes_written == 64 * 512 * 2


def test_the_user_s_lines_are_known() -> None:
    (kernel,) = audit(double, rows_of_ones).kernels
    assert any(origin.file == __file__ and "x * 2" in origin.code for origin in kernel.origins)


def test_unknown_names_are_refused_with_what_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"unknown target 'a100'; accepted are h100, h200, b200, here"):
        audit(double, rows_of_ones, target="a100")
    with pytest.raises(ValueError, match="not an Inductor option: no_such_option"):
        audit(double, rows_of_ones, options={"no-such-option": 1})
    with pytest.raises(RuntimeError, match="no graph"):
        audit(lambda x: x, rows_of_ones)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_here_without_a_gpu_says_so() -> None:
    with pytest.raises(targets.Unavailable, match=r"target 'here' needs a CUDA GPU.*h100, h200, b200"):
        audit(double, rows_of_ones, target="here")


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch needs no compiled guard")
def test_the_guard_is_compiled_once_and_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(deviceguard.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(targets.Unavailable, match=r"needs a C\+\+ compiler once"):
        deviceguard.ensure.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = deviceguard.cache_dir() / f"noop-cuda-guard-{torch.__version__}.so"
    deviceguard._compile(library)
    assert [path.name for path in library.parent.iterdir()] == [library.name], "nothing but the library is left"


def test_importing_the_package_imports_no_compiler() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"  # the package itself, without normquant/__init__'s torch
        "import importlib.util as u, pathlib, normquant\n"
        "from normquant.audit import audit\n"
        "assert not {'triton', 'torch._inductor'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch chooses the attention kernel")
def test_attention_that_cannot_be_chosen_here_is_noted() -> None:
    def heads() -> tuple[torch.Tensor, ...]:
        return (empty(2, 8, 64, 64),) * 3

    (program,) = audit(torch.nn.functional.scaled_dot_product_attention, heads).programs
    assert any("scaled_dot_product_attention is written out" in note for note in program.notes)
    assert audit(double, rows_of_ones).programs[0].notes == ()
