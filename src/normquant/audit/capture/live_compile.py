"""A live compile, stopped before the generated code would be compiled for the GPU.

Nothing runs on a GPU and no GPU memory is allocated: inputs are fake tensors, and where the target is not this
machine's GPU, `fake_gpu` stands in for it.
"""

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from normquant.audit import targets
from normquant.audit.capture import scheduler
from normquant.audit.capture.compiled_model import settings
from normquant.audit.capture.fake_build import all_on_gpu, as_arguments, fake_tensors, modules_of, on_gpu
from normquant.audit.capture.fake_gpu import fake_gpu
from normquant.audit.program import GeneratedCode, Program

# A cache hit would skip the code generation; a pool of compile workers would wait for a GPU.
_UNCACHED = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1}

_IS_CPU_BUILD = torch.version.cuda is None  # asked before a fake GPU changes the answer

Inputs = tuple[Any, ...] | list[Any] | Mapping[str, Any] | torch.Tensor  # a mapping is keyword arguments
MakeInputs = Callable[[], Inputs] | Inputs


# What torch says -> what it means here.
_EXPLAINED = (
    # From the engine of autograd, where nothing is recorded, and where it looks for the GPU that it was promised.
    (
        ("does not require grad", "Cannot access accelerator device"),
        "the function asks autograd for gradients (backward or torch.autograd.grad), and an audit compiles it "
        "without them: audit the forward alone, or code that a training run generated (TORCH_LOGS=output_code)",
    ),
    (
        ("found two different devices", "Expected all tensors to be on the same device"),
        "it mixes tensors of the CPU and of the GPU: an audit moves modules and inputs to the GPU, not tensors that "
        "a function holds otherwise; make those with device='cuda', which needs no GPU, or give them as inputs",
    ),
)


class _Generated(Exception):
    """Raised once the code is generated, to leave the compile before it needs a GPU."""


def capture(
    fn: Callable[..., Any],
    make_inputs: MakeInputs,
    target: str = "h100",
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> list[GeneratedCode]:
    """Compile `fn` for `target` and return what was generated, one entry per graph (graph breaks make several).

    Errors of the compile and of `make_inputs` are raised unchanged; a function that calls backward raises ValueError.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    _config_patches(options)  # an unknown name is told before the model is built
    captured: list[GeneratedCode] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeing(target))
        stack.enter_context(_no_warning_of_fp_fusion())
        stack.enter_context(torch.no_grad())
        stack.callback(torch._dynamo.reset)
        torch._dynamo.reset()
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        stack.enter_context(fake_tensors(FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)))
        args, kwargs = _arguments(make_inputs)
        for module in modules_of(fn):
            stack.enter_context(on_gpu(module))
        chosen_settings = settings((fn, *args), options, dynamic)
        stack.enter_context(config.patch({**_UNCACHED, **_config_patches(chosen_settings.options)}))
        stack.enter_context(_explained())
        backend = functools.partial(_backend, captured)
        torch.compile(fn, backend=backend, dynamic=chosen_settings.dynamic)(*args, **kwargs)
    if not captured:
        raise RuntimeError(
            "the compile produced no graph: nothing in the function is compiled (it may be empty or disabled)"
        )
    return captured


def seeing(target: str) -> contextlib.AbstractContextManager[None]:
    """Within: this process sees the target's GPU, whether it is there or not."""
    chosen = targets.resolve(target)
    return contextlib.nullcontext() if target == targets.HERE else fake_gpu(chosen)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Within: what torch raises for reasons of an audit becomes a ValueError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        text = next((text for signs, text in _EXPLAINED if any(sign in str(error) for sign in signs)), None)
        if text is None:
            raise
        raise ValueError(text) from error


@contextlib.contextmanager
def _no_warning_of_fp_fusion() -> Iterator[None]:
    """Triton 3.9 warns of its default where Inductor asks which fp8 types it has; generated kernels say it each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")
        yield


def _config_patches(options: Mapping[str, Any] | None) -> dict[str, Any]:
    from torch._inductor import config

    known = config.get_config_copy()
    patches = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    unknown = sorted(set(patches) - set(known))
    if unknown:
        raise ValueError(f"not an Inductor option: {', '.join(unknown)}; see torch.compile's list_options()")
    return patches


def _arguments(make_inputs: MakeInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, all fake: tensors that are given, rather than made, are moved to the GPU."""
    if callable(make_inputs):
        return as_arguments(make_inputs())
    args, kwargs = as_arguments(make_inputs)
    return all_on_gpu(args), all_on_gpu(kwargs)


def _backend(
    captured: list[GeneratedCode], graph_module: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any
) -> Any:
    from torch._inductor.compile_fx import compile_fx

    compile_inner = functools.partial(_inner_compile, captured, _notes(graph_module))
    return compile_fx(graph_module, example_inputs, inner_compile=compile_inner)


def _notes(graph_module: torch.fx.GraphModule) -> tuple[str, ...]:
    """How the code is known to differ from the code for a real GPU."""
    called = {node.target for node in graph_module.graph.nodes if node.op == "call_function"}
    if _IS_CPU_BUILD and torch.nn.functional.scaled_dot_product_attention in called:
        return (
            "scaled_dot_product_attention is written out as matrix products and a softmax: this torch was built "
            "without CUDA and cannot choose the attention kernel that the GPU would run",
        )
    return ()


def _inner_compile(
    captured: list[GeneratedCode], notes: tuple[str, ...], graph_module: Any, example_inputs: Any, **kwargs: Any
) -> Any:
    """Generate the code, keep it, and return the graph itself, to be run on fake tensors.

    Its results are the inputs of the code after a graph break, so that every graph of the function is seen.
    """
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    runnable = copy.copy(graph_module)
    runnable.graph = copy.deepcopy(graph_module.graph)
    recorder = _CompileRecorder()
    with recorder.listening(), mock.patch.object(GraphLowering, "compile_to_module", recorder.generate):
        try:
            compile_fx_inner(graph_module, example_inputs, **kwargs)
        except Exception as error:
            if not _ended_on_purpose(error):
                raise
    if recorder.scheduled is not None:  # None: no code is generated for a graph without any computation
        scheduled = dataclasses.replace(recorder.scheduled, notes=notes)
        captured.append(GeneratedCode(f"graph {len(captured)}", recorder.source, scheduled))

    def run(inputs: list[Any]) -> Any:
        return runnable(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _ended_on_purpose(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _Generated):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__
    return False


class _CompileRecorder:
    """Records one compile: the kernel of each scheduler node, why pairs were not fused, and the code."""

    def __init__(self) -> None:
        self.kernel_names: dict[str, str] = {}
        self.reasons: list[tuple[str, str, str]] = []
        self.source = ""
        self.scheduled: Program | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        from torch._inductor.codegen.triton import TritonScheduling
        from torch._inductor.scheduler import WhyNoFuse

        define, why = TritonScheduling.define_kernel, WhyNoFuse.__call__

        def define_and_record(scheduling: Any, source: str, schedule: Any, *args: Any) -> str:
            name = define(scheduling, source, schedule, *args)
            for node in schedule:
                members = node.get_nodes() if hasattr(node, "get_nodes") else ()
                self.kernel_names.update({member.get_name(): name for member in members})
            return name

        def why_and_record(reason: Any, text: str, *args: Any) -> None:
            why(reason, text, *args)
            self.reasons.append((reason.name1, reason.name2, " ".join((text % args if args else text).split())))

        with mock.patch.object(TritonScheduling, "define_kernel", define_and_record):
            with mock.patch.object(WhyNoFuse, "__call__", why_and_record):
                yield

    @property
    def generate(self) -> Callable[[Any], Any]:
        """What replaces `GraphLowering.compile_to_module`."""

        def compile_to_module(graph: Any) -> Any:
            wrapper, _ = graph.codegen()
            self.source = wrapper.value if hasattr(wrapper, "value") else str(wrapper)
            self.scheduled = scheduler.read_program(graph, self.kernel_names, self.reasons)
            raise _Generated

        return compile_to_module
