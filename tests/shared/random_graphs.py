"""Random functions around a norm and its quantizations. A function is made from a seed; `parts` names its choices.

`fusable` is false when one of the choices is something that the kernels do not have, or that no fusion may change.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from shared.pass_harness import exact

import normquant as nq
from normquant.spec import QuantSpec

Tensor = torch.Tensor


@dataclass
class Sample:
    fn: Callable[..., Any]
    make_inputs: Callable[[], tuple[Tensor, ...]]
    parts: list[str] = field(default_factory=list)
    fusable: bool = True


class Chooser:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.parts: list[str] = []
        self.fusable = True

    def pick(self, what: str, good: list[str], bad: list[str] | None = None, chance: float = 0.08) -> str:
        """One of `good`, or rarely one of `bad`, which makes the sample unfusable."""
        if bad and self.random.random() < chance:
            self.fusable = False
            choice = self.random.choice(bad)
        else:
            choice = self.random.choice(good)
        self.parts.append(f"{what}={choice}")
        return choice


def sample(seed: int) -> Sample:
    c = Chooser(seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[c.pick("dtype", ["bf16", "bf16", "fp16"])]
    k = int(c.pick("k", ["128", "256", "384", "512"]))
    lead = {"m": (5,), "1": (1,), "bt": (2, 3), "b1t": (1, 4)}[c.pick("lead", ["m", "1", "bt", "b1t"])]
    source, make_x = _source(c, lead, k, dtype)
    add = _addition(c)
    norm, weight_dtype = _norm(c, k, dtype)
    takes_any = norm.__name__.endswith("fp32")
    count = c.random.choice([1, 1, 1, 2])
    quantize = [_quant(c, k, dtype, takes_any) for _ in range(count)]
    extra = _extra(c, takes_any)
    again = c.pick("again", ["no", "no", "quant", "extra"])
    mutate = c.pick("mutate", ["no"] * 6 + ["after", "input", "clone"])
    if "add=fp32 kept" in c.parts and ("extra=input" in c.parts or mutate == "after"):
        c.fusable = False  # the unrounded sum is read outside of the norm

    def fn(x: Tensor, r: Tensor, w: Tensor) -> Any:
        x = source(x)
        h, stored = add(x, r)
        if mutate == "clone":
            h = h.clone()
        y, insides = norm(h, w)
        outputs: list[Any] = []
        for q in quantize:
            outputs += q(y)
        if again == "quant":
            outputs += quantize[0](norm(h, w)[0])
        if stored is not None:
            outputs.append(stored)
        outputs += extra(norm(h, w)[0] if again == "extra" else y, h, insides)
        if mutate == "after":
            h.mul_(2.0)
            outputs.append(h * 1.5)
        if mutate == "input":
            r.copy_(r + 1.0)
        return tuple(outputs)

    def make_inputs() -> tuple[Tensor, ...]:
        r = exact(*lead, k, dtype=dtype, seed=seed + 1)
        w = exact(k, dtype=weight_dtype, seed=seed + 2) + 0.125
        return make_x(seed), r, w

    return Sample(fn, make_inputs, c.parts, c.fusable)


def _source(c: Chooser, lead: tuple[int, ...], k: int, dtype: torch.dtype) -> tuple[Callable, Callable]:
    kind = c.pick("source", ["input", "slice", "computed", "reshape"], ["transposed", "widened"], 0.04)
    if kind == "slice":
        return lambda x: x[..., k : 2 * k], lambda seed: exact(*lead, 3 * k, dtype=dtype, seed=seed)
    if kind == "computed":
        return lambda x: x * 2.0 - 0.25, lambda seed: exact(*lead, k, dtype=dtype, seed=seed)
    if kind == "reshape":
        return lambda x: x.reshape(*lead, k), lambda seed: exact(*lead, k // 128, 128, dtype=dtype, seed=seed)
    if kind == "transposed":
        return lambda x: x.transpose(0, -1), lambda seed: exact(k, *lead[1:], lead[0], dtype=dtype, seed=seed)
    if kind == "widened":
        return lambda x: x, lambda seed: exact(*lead, k, dtype=torch.float32, seed=seed)
    return lambda x: x, lambda seed: exact(*lead, k, dtype=dtype, seed=seed)


def _addition(c: Chooser) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    kind = c.pick("add", ["no", "no", "rounded", "rounded kept", "fp32 kept", "alpha", "row"], None)
    unread = c.random.random() < 0.3

    def add(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor | None]:
        if kind == "no":
            return x, None
        if kind == "fp32 kept":
            h = x.float() + r.float()
            return h, None if unread else h.to(r.dtype)
        if kind == "alpha":
            return torch.add(x, r, alpha=2), None
        if kind == "row":
            return x + r.reshape(-1, r.shape[-1])[0], None
        h = x + r
        return h, (h * 0.5 if kind == "rounded kept" else None)

    return add


def _norm(
    c: Chooser, k: int, dtype: torch.dtype
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, dict]], torch.dtype]:
    kind = c.pick(
        "norm",
        ["hf", "once", "torch", "gemma", "fp32", "inner", "groups"],
        ["bf16", "no weight", "weight first", "sqrt", "reciprocal", "mean of x", "row weight"],
    )
    square = c.pick("square", ["pow", "product"])
    mean = c.pick("mean", ["mean", "sum"])
    root = c.pick("root", ["rsqrt", "pow"])
    eps = c.random.choice([1e-6, 1e-5, 0.5])
    weight_dtype = dtype if c.pick("weight", ["same", "same", "fp32"]) == "same" else torch.float32

    def rstd_of(h: Tensor, dims: Any = -1) -> Tensor:
        sq = h.pow(2) if square == "pow" else h * h
        var = sq.mean(dims, keepdim=True) if mean == "mean" else sq.sum(dims, keepdim=True) / k
        return torch.rsqrt(var + eps) if root == "rsqrt" else torch.pow(var + eps, -0.5)

    def norm(x: Tensor, w: Tensor) -> tuple[Tensor, dict]:
        h = x.float()
        if kind == "torch":
            return F.rms_norm(x.to(dtype), (k,), w.to(dtype), eps), {}
        if kind == "bf16":
            return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(dtype) * w.to(dtype), {}
        if kind == "sqrt":
            return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(dtype) * w.to(dtype), {}
        if kind == "reciprocal":
            return (h * (1.0 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps))).to(dtype) * w.to(dtype), {}
        if kind == "mean of x":
            return (h * torch.rsqrt(h.mean(-1, keepdim=True).abs() + eps)).to(dtype) * w.to(dtype), {}
        if kind == "groups":
            g = h.unflatten(-1, (-1, 128))
            rstd = rstd_of(g, (-2, -1))
            return ((g * rstd).to(dtype) * w.to(dtype).view(-1, 128)).flatten(-2), {"rstd": rstd}
        rstd = rstd_of(h)
        n = h * rstd
        inside = {"rstd": rstd, "n": n}
        if kind == "hf":
            return w.to(dtype) * n.to(dtype), inside
        if kind == "once":
            return (n * w).to(dtype), inside
        if kind == "gemma":
            return (n * (1.0 + w.float())).to(dtype), inside
        if kind == "fp32":
            return n * w, inside
        if kind == "inner":
            return n.to(dtype) * w.float(), inside
        if kind == "no weight":
            return n.to(dtype), inside
        if kind == "row weight":
            return (n * w[0]).to(dtype), inside
        return (h * (rstd * w)).to(dtype), inside

    norm.__name__ = "norm_fp32" if kind in ("fp32", "inner") else "norm"
    return norm, weight_dtype


def _quant(c: Chooser, k: int, dtype: torch.dtype, takes_any: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if not takes_any and "source=transposed" not in c.parts and c.random.random() < 0.3:  # the op refuses such rows
        return _op_quant(c)
    group = int(c.pick("group", ["128", "128", "64", "32"], ["16"], 0.02))
    shape = c.pick("shape", ["rows", "groups", "expand", "repeat", "transposed", "unflatten"])
    by = c.pick("scale by", ["scalar", "tensor", "multiply"])
    floor = c.random.choice([1e-10, 1e-4])
    where = c.pick("floor", ["amax", "scale", "both"], ["add"], 0.02)
    encoding = c.pick("encoding", ["fp32", "fp32", "exp2", "pow"] if not takes_any else ["fp32"])
    divide = c.pick("divide", ["scale", "reciprocal", "amax"], ["true amax"], 0.02)
    if divide == "amax":
        where, encoding = "amax", "fp32"
    layout = c.pick("layout", ["row", "row", "col", "padded", "rows in pieces", "groups in pieces"])
    clamps = c.pick("clamp", ["clamp", "minmax", "no"], ["240"], 0.02)
    maximum = c.pick("maximum", ["amax", "max"])

    def amax_of(g: Tensor, keepdim: bool = False) -> Tensor:
        return g.abs().amax(-1, keepdim) if maximum == "amax" else g.abs().max(-1, keepdim).values

    def scale_of(amax: Tensor) -> tuple[Tensor, Tensor]:
        if where in ("amax", "both"):
            amax = amax.clamp(min=floor)
        if where == "add":
            amax = amax + floor
        s = amax / 448.0 if by == "scalar" else amax * (1.0 / 448.0)
        if by == "tensor":
            s = amax / torch.tensor(448.0)
        if where in ("scale", "both"):
            s = s.clamp(min=floor / 448.0)
        if encoding == "exp2":
            s = torch.exp2(torch.ceil(torch.log2(s)))
        if encoding == "pow":
            s = torch.pow(2.0, torch.ceil(torch.log2(s.abs())))
        return amax, s

    def fp8(v: Tensor) -> Tensor:
        if clamps == "clamp":
            v = v.clamp(-448.0, 448.0)
        if clamps == "minmax":
            v = torch.minimum(torch.maximum(v, torch.tensor(-448.0)), torch.tensor(448.0))
        if clamps == "240":
            v = v.clamp(-240.0, 240.0)
        return v.to(torch.float8_e4m3fn)

    def divided(v: Tensor, amax: Tensor, s: Tensor) -> Tensor:
        if divide == "reciprocal":
            return fp8(v * s.reciprocal())
        if divide == "true amax":
            return fp8(v * (torch.full((), 448.0) / amax))
        if divide == "amax":
            return fp8(v * (448.0 / amax))
        return fp8(v / s)

    def laid_out(s: Tensor) -> Tensor:
        if layout == "col":
            return s.t().contiguous().t()
        if layout == "padded":
            m = s.shape[0]
            return F.pad(s.t(), (0, -m % 4))[:, :m].t()
        if layout == "rows in pieces":
            return s.unflatten(0, (-1, 2 - s.shape[0] % 2)).transpose(0, 1).flatten(0, 1)
        if layout == "groups in pieces":
            return s.unflatten(1, (-1, 2 - s.shape[1] % 2)).transpose(1, 2).flatten(1)
        return s

    def quant(y: Tensor) -> tuple[Tensor, Tensor]:
        y2 = y.reshape(-1, k)
        m = y2.shape[0]
        f = y2.float()
        if shape == "groups":
            g = f.reshape(-1, group)
            amax, s = scale_of(amax_of(g, keepdim=True))
            return divided(g, amax, s).view(m, k), laid_out(s.view(m, k // group))
        g = f.unflatten(-1, (-1, group)) if shape == "unflatten" else f.reshape(m, k // group, group)
        if shape == "transposed":
            amax, s = scale_of(amax_of(g.transpose(0, 1)))  # [G, M]
            return divided(g, amax.t().unsqueeze(-1), s.t().unsqueeze(-1)).view(m, k), s.t()
        amax, s = scale_of(amax_of(g))  # [M, G]
        if shape == "expand":
            wide, amax_wide = (t.unsqueeze(-1).expand(m, k // group, group).reshape(m, k) for t in (s, amax))
            return divided(f, amax_wide, wide), laid_out(s)
        if shape == "repeat":
            wide, amax_wide = (t.repeat_interleave(group, -1) for t in (s, amax))
            return divided(f, amax_wide, wide), laid_out(s)
        data = divided(g, amax.unsqueeze(-1), s.unsqueeze(-1))
        return data.view(y.shape), laid_out(s)

    return quant


def _op_quant(c: Chooser) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    layout = c.pick("op layout", ["row", "col", "col_tma"])
    scale = c.pick("op scale", ["fp32", "ue8m0", "ue8m0_packed"])
    group = int(c.pick("op group", ["128", "64", "32"]))
    divide = c.pick("op divide", ["scale", "reciprocal"])
    layout = "col_tma" if scale == "ue8m0_packed" else layout
    spec = QuantSpec(group=group, layout=layout, scale=scale, divide=divide)  # type: ignore[arg-type]

    def quant(y: Tensor) -> tuple[Tensor, Tensor]:
        q = nq.group_quant(y, spec=spec)
        return q.data, q.scale

    return quant


def _extra(c: Chooser, takes_any: bool) -> Callable[[Tensor, Tensor, dict], list[Tensor]]:
    kind = c.pick("extra", ["no", "no", "no", "input"] + ([] if takes_any else ["norm", "router", "norm twice"]), None)
    inside = c.pick("inside", ["no"], ["rstd", "n"], 0.06)

    def extra(y: Tensor, h: Tensor, insides: dict) -> list[Tensor]:
        found = []
        if kind == "norm":
            found.append(y)
        if kind == "router":
            found.append(y.float() * 3.0)
        if kind == "norm twice":
            found += [y.reshape(-1, y.shape[-1]) + 1.0, y * 2.0]
        if kind == "input":
            found.append(h * 0.5)
        if inside in insides:
            found.append(insides[inside] + 1.0)
        return found

    return extra
