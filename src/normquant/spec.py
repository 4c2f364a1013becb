"""What a block-quantized activation is: number format, scale encoding, memory layout and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, get_args

import torch
from torch.utils import _pytree as pytree

ScaleEncoding = Literal["fp32", "ue8m0", "ue8m0_packed"]
Layout = Literal["row", "col", "col_tma"]
Rounding = Literal["none", "inner", "once", "twice"]
Divide = Literal["scale", "reciprocal", "amax", "fast_amax", "factor", "fast_factor"]
Nan = Literal["propagate", "ignore"]
ScaleBy = Literal["scalar", "divide", "multiply"]
Sum = Literal["fp32", "rounded"]
Rope = Literal["interleaved", "half", "interleaved_to_half"]

FP8_MAX = 448.0  # the largest finite float8_e4m3fn
GROUPS = (32, 64, 128)
MAX_POWER = 2.0**127  # the largest power of two in fp32: exponent 254, and 255 is what inf and NaN have
AMAX_SHIFT = 2.0**-10  # keeps the reciprocal of the largest amax a normal number
TMA_ALIGN = 4  # rows: 16 bytes of fp32 or int32, what a TMA descriptor asks of a column stride
MIN_SCALE = 2.0**-64  # below it 1/scale and the residual of the division could leave the normal fp32 numbers
ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantSpec:
    """How an activation of shape [M, K] is quantized in groups of `group` neighbours of a row.

    The defaults are a 1x128 block quantization of `F.rms_norm`'s output with fp32 scales. All arithmetic is fp32.

    dtype: the fp8 dtype of the data; torch.float8_e4m3fn.
    group: values per scale, 128, 64 or 32; K must be a multiple of it.
    scale: how a scale is stored. "fp32"; "ue8m0", an fp32 power of two, 2**ceil(log2(s)); "ue8m0_packed", the biased
        exponents of four neighbouring groups in one int32, little-endian, zero where K/group is not a multiple of 4.
    layout: "row" [M, G] contiguous; "col" column-major with column stride M; "col_tma" column-major with a column
        stride of M rounded up to 4 rows, the pad zeroed. "ue8m0_packed" needs "col_tma".
    rounding: where the norm is rounded to the activation dtype before it is quantized, with n = x * rstd:
        "none" n * w; "inner" round(n) * w; "once" round(n * w); "twice" round(round(n) * w).
    sum: what the norm reads after a residual add: "fp32" the unrounded sum, "rounded" the sum as it is stored.
    floor: lower bound of a group's amax. scale_floor: lower bound of the scale. One of them must be positive.
    scale_by: how amax becomes a scale: "scalar" as torch divides by a Python scalar (a product with the fp32 reciprocal
        on CUDA, a division on CPU), "divide" amax / 448 correctly rounded, "multiply" amax * fp32(1/448).
    divide: how a value y becomes data: "scale" y / s, "reciprocal" y * (1/s), "amax" y * (448 * (1/amax)), "fast_amax"
        the same on CPU and with the GPU's approximate reciprocal on CUDA, as code built with fast math computes it,
        "factor" y * (448 / amax), the quotient correctly rounded.
        "fast_factor" makes scale and data by a rule of its own: y * f with f = 448 * (1 / amax), scale 1 / f; f is 1
        for a group of zeros, a NaN is left out of amax; on CUDA as fast math computes it, denormals flushed to zero.
    nan: "propagate": a NaN makes its group NaN, the scale and all of the data; "ignore": it is left out of amax, and is
        the only NaN in the group's data. A stored power of two is never NaN, which kernels that read UE8M0 may trap on:
        with "propagate" it is 2**127 for a group with a NaN or an inf, with "ignore" inf for a group with an inf.
    few_rows: activations of fewer rows than this are quantized by the rule "fast_factor", as FlashInfer's linear kernel
        does, and all others as the other fields say: one graph for any number of rows. `at(m)` gives the rule for m.

    Raises ValueError for a combination that is not one of these.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    group: int = 128
    scale: ScaleEncoding = "fp32"
    layout: Layout = "row"
    rounding: Rounding = "once"
    sum: Sum = "fp32"
    floor: float = 1e-10
    scale_floor: float = 0.0
    scale_by: ScaleBy = "scalar"
    divide: Divide = "scale"
    nan: Nan = "propagate"
    few_rows: int = 0
    _encoded: ClassVar[str]  # set for each instance, and no field: specs are compared, printed and copied without it

    def __post_init__(self) -> None:
        if self.dtype != torch.float8_e4m3fn:
            raise ValueError(f"dtype is {self.dtype}; torch.float8_e4m3fn is accepted")
        one_of("group", self.group, GROUPS)
        one_of("scale", self.scale, get_args(ScaleEncoding))
        one_of("layout", self.layout, get_args(Layout))
        one_of("rounding", self.rounding, get_args(Rounding))
        one_of("sum", self.sum, get_args(Sum))
        one_of("scale_by", self.scale_by, get_args(ScaleBy))
        one_of("divide", self.divide, get_args(Divide))
        one_of("nan", self.nan, get_args(Nan))
        if self.scale == "ue8m0_packed" and self.layout != "col_tma":
            raise ValueError(f"scale='ue8m0_packed' has layout={self.layout!r}; only 'col_tma' is accepted")
        if self.divide in ("amax", "fast_amax", "factor") and (self.is_ue8m0 or self.scale_floor):
            raise ValueError(
                f"divide={self.divide!r} ignores the stored scale, so it is accepted only for fp32 scales without "
                f"scale_floor"
            )
        if self.few_rows < 0 or (self.few_rows and (self.scale == "ue8m0_packed" or self.divide == "fast_factor")):
            raise ValueError(
                f"few_rows is {self.few_rows} with scale={self.scale!r} and divide={self.divide!r}; it must not be "
                f"negative, and needs scales in fp32 and another rule for many rows"
            )
        if self.divide == "fast_factor":
            if self.is_ue8m0 or self.floor or self.scale_floor or self.nan != "propagate":
                raise ValueError("divide='fast_factor' has no floors and no choice of nan, and its scales are 'fp32'")
        floors = self.floor, self.scale_floor
        smallest = max(self.floor / FP8_MAX, self.scale_floor)
        floored = self.divide == "fast_factor" or smallest >= MIN_SCALE
        if not (all(0 <= f < math.inf for f in floors) and floored):
            raise ValueError(
                f"floor is {self.floor} and scale_floor {self.scale_floor}; both must be finite and not negative, and "
                f"the smallest scale, max(floor / 448, scale_floor), at least 2**-64"
            )
        # Made here and not in encode(): a compiler that traces encode() may hold the floats as symbols.
        object.__setattr__(self, "_encoded", ",".join(_short(getattr(self, f.name)) for f in fields(self)))

    def __hash__(self) -> int:
        return hash(self._encoded)  # a string keeps its hash: specs are keys of caches in every launch

    @property
    def is_ue8m0(self) -> bool:
        """Whether every scale is a power of two."""
        return self.scale != "fp32"

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of the stored scale tensor."""
        return torch.int32 if self.scale == "ue8m0_packed" else torch.float32

    @property
    def scales_per_element(self) -> int:
        """Scales that one element of the stored tensor holds."""
        return 4 if self.scale == "ue8m0_packed" else 1

    def scale_shape(self, m, k):
        """Shape of the stored scale of an [m, k] activation; m and k may be symbolic."""
        return (m, (k // self.group + self.scales_per_element - 1) // self.scales_per_element)

    def scale_stride(self, m, k):
        """Stride, in elements, of the stored scale of an [m, k] activation; m and k may be symbolic."""
        if self.layout == "row":
            return (self.scale_shape(m, k)[1], 1)
        return (1, torch.sym_max(1, self.scale_rows(m)))  # as torch strides an empty tensor

    def scale_rows(self, m):
        """Rows of memory behind one column of scales: m, or m rounded up for TMA."""
        return (m + TMA_ALIGN - 1) // TMA_ALIGN * TMA_ALIGN if self.layout == "col_tma" else m

    def bytes(self, m: int, k: int) -> int:
        """Bytes written for the data and the scale of an [m, k] activation, TMA padding included."""
        return m * k * self.dtype.itemsize + self.scale_rows(m) * self.scale_shape(m, k)[1] * self.scale_dtype.itemsize

    def at(self, m: int) -> QuantSpec:
        """The spec of an activation of m rows, where `few_rows` plays no part any more."""
        return _at_few_rows(self) if m < self.few_rows else _at_many_rows(self) if self.few_rows else self

    def encode(self) -> str:
        """The spec as one short string, the form in which a compiled graph carries it."""
        return self._encoded

    @staticmethod
    @cache
    def decode(text: str) -> QuantSpec:
        """The spec whose `encode()` is `text`; raises ValueError for any other text."""
        names, parts = fields(QuantSpec), text.split(",")
        if len(parts) != len(names):
            raise ValueError(f"{text!r} has {len(parts)} fields; an encoded QuantSpec has {len(names)}")
        defaults = (f.default for f in names)
        return QuantSpec(**{f.name: _parse(part, d) for f, part, d in zip(names, parts, defaults, strict=True)})

    def replace(self, **changes: Any) -> QuantSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def __str__(self) -> str:
        """As one would write it: only what differs from the default."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        return f"QuantSpec({', '.join(f'{name}={value!r}' for name, value in values)})"


@cache
def _at_few_rows(spec: QuantSpec) -> QuantSpec:
    rule: dict[str, Any] = {"scale_by": "divide", "divide": "fast_factor", "nan": "propagate"}
    return replace(spec, few_rows=0, scale="fp32", floor=0.0, scale_floor=0.0, **rule)


@cache
def _at_many_rows(spec: QuantSpec) -> QuantSpec:
    return replace(spec, few_rows=0)


@dataclass(frozen=True)
class QuantizedActivation:
    """A block-quantized activation.

    data: [..., K] float8_e4m3fn.
    scale: [..., K/group] float32, or [..., ceil(K/group/4)] int32 when packed, strided as `spec.layout` says.
    spec: how both were made.
    """

    data: torch.Tensor
    scale: torch.Tensor
    spec: QuantSpec

    @property
    def shape(self) -> torch.Size:
        """Shape of the activation."""
        return self.data.shape

    def scales(self) -> torch.Tensor:
        """The scales as fp32, [..., K/group], unpacked where they are packed: an exponent of 255 as inf."""
        if self.spec.scale != "ue8m0_packed":
            return self.scale
        groups = self.data.shape[-1] // self.spec.group
        shifts = torch.arange(0, 32, 8, device=self.scale.device, dtype=torch.int32)
        exponents = (self.scale.unsqueeze(-1) >> shifts) & 0xFF  # [..., G/4, 4] int32
        return (exponents.flatten(-2)[..., :groups] << 23).view(torch.float32)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """data * scale, [..., K], computed in fp32 and rounded once to `dtype`."""
        grouped = self.data.float().unflatten(-1, (-1, self.spec.group))  # [..., G, group]
        return (grouped * self.scales().unsqueeze(-1)).flatten(-2).to(dtype)


def _flatten(q: QuantizedActivation) -> tuple[list[torch.Tensor], str]:
    return [q.data, q.scale], q.spec.encode()  # as text, which an exported program can store


def _unflatten(tensors: Iterable[torch.Tensor], spec: str) -> QuantizedActivation:
    data, scale = tensors
    return QuantizedActivation(data, scale, QuantSpec.decode(spec))


def _flatten_with_keys(q: QuantizedActivation) -> tuple[list[tuple[Any, torch.Tensor]], str]:
    tensors, spec = _flatten(q)
    return list(zip((pytree.GetAttrKey("data"), pytree.GetAttrKey("scale")), tensors, strict=True)), spec


# torch.export takes it in and gives it out
pytree.register_pytree_node(
    QuantizedActivation,
    _flatten,
    _unflatten,
    serialized_type_name="normquant.QuantizedActivation",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals(
    [QuantizedActivation, QuantSpec]
)  # exported programs hold an example of each input


def empty_scale(m: int, k: int, spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """An uninitialized scale tensor for an [m, k] activation, whose storage holds the TMA padding too."""
    rows, columns = spec.scale_rows(m), spec.scale_shape(m, k)[1]
    if spec.layout == "row":
        return torch.empty((m, columns), dtype=spec.scale_dtype, device=device)
    scale = torch.empty((columns, rows), dtype=spec.scale_dtype, device=device)
    return scale.as_strided((m, columns), (1, max(1, rows)))  # as torch strides an empty tensor


def one_of(name: str, value: object, accepted: tuple) -> None:
    """Raise a ValueError unless value is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def _short(value: object) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


def _parse(text: str, like: Any) -> Any:
    if isinstance(like, torch.dtype):
        return getattr(torch, text, text)
    return type(like)(text)
