"""A live compile for a GPU that is not there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.clean_graphs import BF16, empty, rows_of_ones

import normquant
from normquant.audit import audit, targets
from normquant.audit.capture.live_compile import capture
from normquant.audit.program import Extern, Kernel


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_code_is_generated_for_the_target() -> None:
    for name, capability in (("h100", "cc=90"), ("h200", "cc=90"), ("b200", "cc=100")):
        report = audit(double, rows_of_ones, target=name)
        assert capability in report.source and report.target.name == name
        (kernel,) = report.kernels
        assert isinstance(kernel, Kernel) and kernel.kind == "pointwise"
        assert f"def {kernel.name}(" in report.source


def test_an_error_of_the_function_is_shown_as_it_is() -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x + empty(3)

    with pytest.raises(Exception, match=r"broadcast|size"):
        audit(wrong, rows_of_ones)


def of_tensor(x: torch.Tensor) -> torch.Tensor | None:
    x = x.requires_grad_()
    (x * x).sum().backward()
    return x.grad


def of_function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((x * x).sum(), x)


def with_gradients_enabled(x: torch.Tensor) -> torch.Tensor | None:
    with torch.enable_grad():
        return of_tensor(x.detach())


@pytest.mark.parametrize("fn", [of_tensor, of_function, with_gradients_enabled])
def test_a_function_that_calls_backward_is_told_so(fn: Any) -> None:
    with pytest.raises(ValueError, match=r"asks autograd for gradients .*audit the forward alone"):
        audit(fn, (torch.randn(4, 64),))


def test_a_wrapper_in_cpp_is_named_for_what_it_is() -> None:
    with pytest.raises(ValueError, match=r"generated in C\+\+, by cpp_wrapper or AOTInductor"):
        audit(double, rows_of_ones, options={"cpp_wrapper": True})


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


def test_tritons_warning_about_its_own_default_is_left_out(recwarn: pytest.WarningsRecorder) -> None:
    """Triton 3.9 gives it where Inductor asks which types it has; every other warning is shown."""

    def build() -> tuple[torch.Tensor, ...]:
        for text in ("TRITON_DEFAULT_FP_FUSION is unset: defaulting to FP fusion ENABLED", "of the model"):
            warnings.warn(text, UserWarning, stacklevel=2)
        return rows_of_ones()

    audit(double, build)
    shown = [str(warning.message) for warning in recwarn]
    assert "of the model" in shown and not any("FP_FUSION" in text for text in shown)


def test_symbolic_sizes_are_kept() -> None:
    report = audit(double, (torch.empty(64, 512, dtype=BF16),), dynamic=True)
    (program,) = report.programs
    assert set(program.sizes.values()) >= {64}
    (kernel,) = program.kernels
    assert kernel.bytes_read == kernel.bytes_written == 64 * 512 * 2


def test_the_user_s_lines_are_known() -> None:
    (kernel,) = audit(double, rows_of_ones).kernels
    assert any(origin.file == __file__ and "x * 2" in origin.code for origin in kernel.origins)


class Block(torch.nn.Module):
    """A model's own module, made of torch's and this package's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(512, dtype=BF16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normquant.group_quant(self.norm(x)).data


def test_a_line_is_the_model_s_not_that_of_the_modules_that_it_calls() -> None:
    report = audit(Block(), (torch.empty(8, 512, dtype=BF16),))
    places = {(origin.file, origin.code) for launch in report.launches for origin in launch.origins}
    assert places == {(__file__, "return normquant.group_quant(self.norm(x)).data")}
    alone = audit(torch.nn.RMSNorm(512, dtype=BF16), (torch.empty(8, 512, dtype=BF16),))
    (origin,) = alone.kernels[0].origins
    assert origin.file.startswith(str(Path(torch.__file__).parent)), "no frame of a model: the innermost is shown"


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


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch chooses the attention kernel")
def test_attention_that_cannot_be_chosen_here_is_noted() -> None:
    def heads() -> tuple[torch.Tensor, ...]:
        return (empty(2, 8, 64, 64),) * 3

    (program,) = audit(torch.nn.functional.scaled_dot_product_attention, heads).programs
    assert any("scaled_dot_product_attention is written out" in note for note in program.notes)
    assert audit(double, rows_of_ones).programs[0].notes == ()
