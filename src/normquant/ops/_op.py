"""An op: its registration with torch, and what the rest of the package needs to know about it.

Every op is functional, has a fixed number of outputs and takes its QuantSpec as the string `spec.encode()`, so that it
can stand in a compiled graph. On CUDA it runs a Triton kernel, on CPU the reference; the fake implementation gives the
same shapes, strides and dtypes. Ops take x as [M, K], and no two of them share memory. None has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import torch

from normquant.kernels import capability
from normquant.ops._examples import HEAD_DIM, LATENT, Examples
from normquant.ops._gradients import refuse_gradients
from normquant.spec import QuantSpec, Rope

if TYPE_CHECKING:
    from normquant.kernels.configs import Config
    from normquant.kernels.launch import Launch, Plan

LIBRARY = torch.library.Library("normquant", "DEF")
DEFAULT = QuantSpec()
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
WIDTHS = (7168, 1536, 512, 2048, 4096, 5120, 8192)  # hidden, q_lora and kv_lora of DeepSeek-V3/R1; Qwen3 and Llama
LAUNCH_LIMIT = 4096  # cached launches, some 3 KB each; a model has about ten for each number of rows

Impl = Callable[..., Any]
Traffic = tuple[int, int]  # bytes read, bytes written
Launcher = Callable[..., list[torch.Tensor]]  # tensors -> outputs; a Launch, or several steps


@dataclass(frozen=True)
class Op:
    """An op of `torch.ops.normquant`.

    name: as torch knows it. stem: of the op that it is a variant of, or its own name.
    schema: arguments and outputs; the last argument is the spec. The functions below get it decoded.
    check: raises ValueError for inputs that are not accepted. fake, reference: the outputs. plan: that of the kernel's
        launch, with a launch config as `config=`, None for the one of the table.
    traffic(m, k, spec): bytes that must move through DRAM whatever computes the op: every input read once, every output
        written once, activations and weights of 2 bytes a value. Keywords give sizes that have a default there.
    example: arguments by name, the spec left out. sizes: from arguments, what `warmup` needs to know beside dtype, spec
        and device.
    configs: its name in the tables of launch configs; "" where one config does for all.
    choices: fields of a launch config that its kernel reads beside num_warps, split, rows and release.
    widths: K that are benchmarked. eps_overload: whether there is an overload with epsilon as a tensor.
    """

    name: str
    schema: str
    check: Impl
    fake: Impl
    reference: Impl
    plan: Callable[..., Plan]
    traffic: Callable[..., Traffic]
    example: Callable[[Examples], dict[str, Any]]
    sizes: Callable[..., dict[str, Any]]
    configs: str
    stem: str = ""
    choices: tuple[str, ...] = ()
    widths: tuple[int, ...] = WIDTHS
    eps_overload: bool = False

    @cached_property
    def overload(self) -> torch._ops.OpOverload:
        """What torch calls."""
        return getattr(torch.ops.normquant, self.name).default

    @property
    def argument_names(self) -> tuple[str, ...]:
        """Names of the arguments, the spec left out."""
        return tuple(argument.name for argument in self.overload._schema.arguments[:-1])

    def launch(self, *args: Any) -> Launch:
        """A launch for arguments like these, the spec encoded."""
        return checked(self, self.launcher)(*args)

    def launcher(self, *args: Any, config: Config | None = None) -> Launch:
        """The same for checked arguments, the spec decoded; x may be `PartialRows`."""
        from normquant.kernels.launch import Launch  # Triton is imported where something is launched

        return Launch(self.plan(*args, config=config))

    def run(self, *args: Any, config: Config | None = None) -> tuple[torch.Tensor | None, ...]:
        """The outputs of the kernel on checked arguments, the spec decoded, launched with a config; None as planned."""
        from normquant.kernels.launch import launch

        return launch(self.plan(*args, config=config), *(arg for arg in args if isinstance(arg, torch.Tensor)))

    def warmup_settings(self, *args: Any) -> dict[str, Any]:
        """Arguments of `warmup` for arguments of the op, the spec encoded."""
        x, spec = args[0], QuantSpec.decode(args[-1])
        return {"op": self.name, "spec": spec, "dtype": x.dtype, "device": x.device, **self.sizes(*args[:-1])}


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Define an op in torch, and add it to `OPS`."""
    op = replace(op, stem=op.stem or op.name)
    define(op.name, op.schema, checked(op, op.fake), checked(op, op.reference), cached(op.name, op.launch))
    if op.eps_overload:
        _register_tensor_eps(op)
    OPS[op.name] = op
    return op


def define(name: str, schema: str, fake: Impl, cpu: Impl, cuda: Impl) -> None:
    """Define an op without a gradient in torch; its implementations take the spec encoded."""
    LIBRARY.define(name + schema, tags=TAGS)
    torch.library.register_fake(f"normquant::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    call_directly(getattr(torch.ops.normquant, name).default, cuda)
    without_gradient(name)


DIRECT: list[torch._ops.OpOverload] = []  # each has its implementation for CUDA as `launch`


def call_directly(overload: torch._ops.OpOverload, cuda: Impl) -> None:
    """Have code that knows its tensors are on CUDA call the implementation, as generated code does
    (`compile/direct_calls.py`)."""
    overload.launch = cuda  # type: ignore[attr-defined]
    DIRECT.append(overload)


def launch_of(overload: torch._ops.OpOverload) -> Impl:
    """What to call on tensors on CUDA: an implementation that `call_directly` was told, else the overload itself."""
    return getattr(overload, "launch", overload)


def call_beside(x: torch.Tensor, overload: torch._ops.OpOverload) -> Impl:
    """What to call on tensors that are where x is: on CUDA the implementation, without torch's dispatcher."""
    return launch_of(overload) if x.is_cuda else overload


def without_gradient(name: str) -> None:
    """Have autograd leave an op alone: a kernel for it would be one more Python frame in every launch.

    The implementations call `refuse_gradients` instead; the fake one while Dynamo infers what requires grad.
    """
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


class Checked(Protocol):
    """An op that knows what it accepts, the spec decoded."""

    @property
    def name(self) -> str: ...

    @property
    def check(self) -> Impl: ...


def checked(op: Checked, run: Impl) -> Impl:
    """`run` for arguments of an op, which are checked first and whose spec it gets decoded."""

    def call(*args: Any) -> Any:
        refuse_gradients(op.name, args)
        args = (*args[:-1], QuantSpec.decode(args[-1]))
        op.check(*args)
        return run(*args)

    return call


def _register_tensor_eps(op: Op) -> None:
    """The overload `tensor` of a norm, with epsilon as a tensor: torch.compile(dynamic=True) turns the Python floats of
    a module into inputs of the graph, 0-dim float64 tensors on the CPU. Reading one there waits for no GPU."""
    default = op.overload
    at = [argument.name for argument in default._schema.arguments].index("eps")

    def fake(*args: Any) -> Any:
        return default(*args[:at], 1.0, *args[at + 1 :])

    def run(*args: Any) -> Any:
        return default(*args[:at], float(args[at]), *args[at + 1 :])

    LIBRARY.define(f"{op.name}.tensor{op.schema.replace('float eps', 'Tensor eps')}", tags=TAGS)
    LIBRARY.impl(f"{op.name}.tensor", run, "CompositeExplicitAutograd")
    without_gradient(f"{op.name}.tensor")
    torch.library.register_fake(f"normquant::{op.name}.tensor", fake, lib=LIBRARY)


_launches: dict[tuple, Launcher] = {}


def cached(name: str, make: Callable[..., Launcher]) -> Callable[..., Any]:
    """The function that launches on the arguments of op `name`; `make` is asked for a launch once for each key.

    Launches are cached by the shape, stride, dtype, device and 16-byte alignment of tensors and the value of all else.
    Returns the op's outputs, those that are None left out: a tuple, or a single tensor.
    """

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            refuse_gradients(name, args)
        tensors: list[torch.Tensor] = []
        parts: list[Any] = [name]
        for arg in args:
            if isinstance(arg, torch.Tensor):
                tensors.append(arg)
                parts += arg.shape, arg.stride(), arg.dtype, arg.get_device(), arg.data_ptr() % 16 == 0
            else:
                parts.append(arg)
        key = tuple(parts)
        launch = _launches.get(key)
        if launch is None:
            launch = make(*args)
            if len(_launches) >= LAUNCH_LIMIT:
                _launches.clear()
            _launches[key] = launch
        outputs = launch(*tensors)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return call


def warmup(
    op: str,
    k: int,
    spec: QuantSpec = DEFAULT,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    latent: tuple[int, int] = LATENT,
    rope: Rope = "interleaved",
    limit: float | None = None,
    head_dim: int = HEAD_DIM,
    device: torch.device | str = "cuda",
) -> int:
    """Launch once every kernel that an op may choose for rows of k values, and return how many there are.

    A kernel is compiled for an op, K, spec, dtypes and launch config. The config depends on the number of rows, so
    without a warm-up the first batch of each range of sizes waits for a compile, about a second, or for a load from
    Triton's cache on disk, some milliseconds. Rows may then be any number and any aligned distance apart.

    op: a name in `torch.ops.normquant`, such as "add_rms_norm_quant" or "add_rms_norm_quant_with_norm".
    k: values of a row that are quantized; of the latents those of q_a, `latent` being the other two widths.
    weight_dtype: of the norm's weight, `dtype` unless given. limit: of `silu_mul_quant`. head_dim: of
    `gated_norm_quant`. Raises ValueError for an unknown op, or on a CPU.
    """
    from normquant.kernels import configs

    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; warmup launches kernels on one")
    found = capability.target(device).capability
    if found is None:
        raise ValueError(f"there is nothing to compile for {device}; warmup needs a CUDA device")
    if op not in OPS or not OPS[op].configs:
        raise ValueError(f"op is {op!r}; accepted: the ops of torch.ops.normquant, such as 'add_rms_norm_quant'")
    examples = Examples(
        2, k, device, dtype, weight_dtype or dtype, weight_offset, latent, rope, limit=limit, head_dim=head_dim
    )
    args = OPS[op].example(examples).values()
    specs = {spec.at(0), spec.at(spec.few_rows)}  # the rules for few rows and for many
    choices = list(product(specs, configs.configs(OPS[op].configs, k, found)))
    for rule, config in choices:
        OPS[op].run(*args, rule, config=config)
    return len(choices)
