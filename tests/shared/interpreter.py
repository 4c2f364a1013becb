"""Triton's interpreter on CPU, repaired so that it rounds as the hardware does.

The stock interpreter rounds some casts to fp8 and bf16 wrongly, rounds the product inside `fma`, and has NaN for the
maximum of a number and NaN. Here casts and exp go through torch, an fma is computed in float64, where the product of
two fp32 is exact, a dot likewise and rounded once, and a maximum or minimum is the number, unless the kernel asks for
NaN. A condition that is spread over a tensor stays one: Triton 3.9 makes it a number, and refuses it as a mask. Half of
the stock interpreter's time is saved, too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from normquant.kernels.configs import Config
from normquant.ops import OPS
from normquant.spec import QuantSpec

TORCH_DTYPE = {
    "fp8e4nv": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
INTEGER = {
    8: (np.uint8, torch.uint8),
    16: (np.int16, torch.int16),
    32: (np.int32, torch.int32),
    64: (np.int64, torch.int64),
}


def _convert_float(stock):
    def convert(values, source, target, rounding):
        from_dtype, to_dtype = TORCH_DTYPE.get(source.name), TORCH_DTYPE.get(target.name)
        if from_dtype is None or to_dtype is None:
            return stock(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(INTEGER[source.primitive_bitwidth][0])
        x = torch.from_numpy(bits.copy()).view(from_dtype)
        if to_dtype is torch.float8_e4m3fn:  # cvt.rn.satfinite: saturates, NaN stays NaN
            x = torch.where(x.float().isnan(), x.float(), x.float().clamp(-448, 448))
        out = x.to(to_dtype).view(INTEGER[target.primitive_bitwidth][1]).numpy()
        return out.view(getattr(np, f"uint{target.primitive_bitwidth}")).reshape(values.shape)

    return convert


def _fma(self, x, y, z):
    from triton.runtime.interpreter import TensorHandle

    wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(wide.astype(np.float32), z.dtype.scalar)


def _exp(self, x):
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(torch.from_numpy(np.ascontiguousarray(x.data)).exp().numpy(), x.dtype.scalar)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    from triton.runtime.interpreter import TensorHandle

    a, b = (_values(x) for x in (a, b))
    return TensorHandle((a @ b).float().numpy() + d.data, d.dtype.scalar)


def _values(x):
    # float64: sums of 128 products of fp8 are exact in it, in any order
    bits = torch.from_numpy(np.ascontiguousarray(x.data).view(INTEGER[x.dtype.primitive_bitwidth][0]).copy())
    return bits.view(TORCH_DTYPE[x.dtype.scalar.name]).double()


def _number(of):
    return lambda self, x, y: self.binary_op(x, y, of)


def _generic_reduce(stock):
    # The stock loop visits every element in Python; numpy's max propagates NaN as our combiner does.
    def reduce(self, values):
        if self.combine_fn.fn.__name__ == "max_or_nan":
            return self.min_max(values, np.max)
        return stock(self, values)

    return reduce


def _splat(stock):
    def splat(self, type, value):
        spread = stock(self, type, value)
        spread.data = spread.data.astype(value.data.dtype)
        return spread

    return splat


def _patch_lang(stock):
    # The language is made to interpret once a launch for all functions that name the same of its modules. The stock
    # interpreter does it again in every call of a function from a kernel, which is half of all its time.
    done = set()

    def patch(fn):
        modules = _language_modules(fn)
        if modules in done:
            return _NOTHING_TO_RESTORE
        outermost, scope = not done, stock(fn)
        done.add(modules)
        if outermost:  # of the kernel, and the others are called within it
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        return scope

    return patch


_NOTHING_TO_RESTORE = SimpleNamespace(restore=lambda: None)


@cache
def _language_modules(fn: Callable) -> frozenset[str]:
    import triton.language as tl

    return frozenset(lang.__name__ for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values()))


@contextlib.contextmanager
def repaired():
    """A context in which interpreted kernels round as compiled ones do."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    with (
        mock.patch.object(interpreter, "_patch_lang", _patch_lang(interpreter._patch_lang)),
        mock.patch.object(interpreter, "_convert_float", _convert_float(interpreter._convert_float)),
        mock.patch.object(builder, "create_fma", _fma),
        mock.patch.object(builder, "create_exp", _exp),
        mock.patch.object(builder, "create_dot", _dot),
        mock.patch.object(builder, "create_maxnumf", _number(np.fmax)),
        mock.patch.object(builder, "create_minnumf", _number(np.fmin)),
        mock.patch.object(builder, "create_splat", _splat(builder.create_splat)),
        mock.patch.object(
            interpreter.ReduceOps, "generic_reduce", _generic_reduce(interpreter.ReduceOps.generic_reduce)
        ),
        np.errstate(all="ignore"),
    ):
        yield


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # its tiles are small: threads would wait for one another


def _call(kernel: str, args: tuple, kwargs: dict):
    # Runs in a worker, where Triton was never imported without its interpreter.
    launch = getattr(importlib.import_module(f"normquant.kernels.{kernel}"), kernel)
    with repaired():
        return launch(*args, **kwargs)


def _call_function(function: Callable, args: tuple):
    with repaired():
        return function(*args)


def _call_op(spec: QuantSpec, op: str, args: tuple, config: Config | None):
    with repaired():
        return OPS[op].run(*args, spec, config=config)


@cache
def _worker() -> ProcessPoolExecutor:
    # Triton reads TRITON_INTERPRET when it is imported, so interpreted kernels need a process of their own.
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)


def call(function: Callable, *args):
    """What a function of a test module gives in a process whose Triton interprets, repaired."""
    return _worker().submit(_call_function, function, args).result()


def run(kernel: str, *args, **kwargs):
    """What `normquant.kernels.<kernel>` gives for CPU tensors, in the repaired interpreter."""
    return _worker().submit(_call, kernel, args, kwargs).result()


def run_op(spec: QuantSpec, op: str, *args, config: Config | None = None):
    """What the kernel of an op gives for the op's arguments, the spec left out, in the repaired interpreter."""
    return _worker().submit(_call_op, spec, op, args, config).result()
