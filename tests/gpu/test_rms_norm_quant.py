"""The norm kernels on a GPU: to the bit against the reference there, and counted against a graph of torch's own ops."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from shared.compare import assert_bitwise, pad_rows
from shared.inputs import activations, awkward, exact, weights

import normquant as nq
from normquant import QuantSpec, reference, specs
from normquant.kernels.configs import Config
from normquant.kernels.rms_norm_quant import rms_norm_quant
from normquant.spec import QuantizedActivation

KS = (512, 1536, 2048, 4096, 5120, 7168, 8192)
MS = ((1, 3, 8), (64,), (257,))
LAYOUTS = ("row", "col", "col_tma")
ROUNDINGS = ("none", "inner", "once", "twice")
EPS = 1e-6


def flat(outputs) -> list[torch.Tensor]:
    return [t for o in outputs for t in ([o.data, o.scale] if isinstance(o, QuantizedActivation) else [o])]


def check(x, residual, weight, spec, weight_offset=0.0):
    """The op with every output against the reference, both on the GPU."""
    x, weight = x.cuda(), weight.cuda()
    options = {"spec": spec, "weight_offset": weight_offset, "return_norm": True}
    if residual is None:
        got = flat(nq.rms_norm_quant(x, weight, EPS, **options))
        expected = reference.rms_norm_quant(x, weight, EPS, spec, weight_offset)
    else:
        residual = residual.cuda()
        got = flat(nq.add_rms_norm_quant(x, residual, weight, EPS, **options))
        expected = reference.add_rms_norm_quant(x, residual, weight, EPS, spec, weight_offset)
    assert_bitwise(got, expected)
    if spec.layout == "col_tma":
        assert not pad_rows(got[1], spec.scale_rows(len(x))).any()


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same rows, 2k + 16 apart, on the GPU (a copy to the GPU closes gaps)."""
    m, k = t.shape
    wide = torch.zeros(m, 2 * k + 16, dtype=t.dtype, device="cuda")
    wide[:, :k] = t.cuda()
    return wide[:, :k]


@pytest.mark.parametrize(("i", "ms", "k"), [(i, ms, k) for i, (ms, k) in enumerate(product(MS, KS))])
def test_every_size(i, ms, k):
    # The sizes times each other; the other choices cycle, so that each meets every K. Sizes that have one launch config
    # have one choice, too: what costs time here is compiling.
    dtype = (torch.bfloat16, torch.float16)[i % 2]
    for m in ms:
        x, residual = awkward(m, k, dtype), activations(m, k, dtype, seed=1) if (i // 2) % 2 else None
        x = strided(x) if i % 3 == 1 else x
        check(x, residual, weights(k, dtype), QuantSpec(layout=LAYOUTS[i % 3], rounding=ROUNDINGS[i % 4]))


@pytest.mark.parametrize(
    ("dtype", "with_residual", "layout"), list(product((torch.bfloat16, torch.float16), (False, True), LAYOUTS))
)
def test_every_form(dtype, with_residual, layout):
    for m, apart in product((9, 11, 16), (False, True)):  # one launch config; three, one and no rows of padding
        x, residual = awkward(m, 1536, dtype), awkward(m, 1536, dtype, seed=3)
        x, residual = (strided(x), strided(residual)) if apart else (x, residual)
        check(x, residual if with_residual else None, weights(1536, dtype), QuantSpec(layout=layout))


@pytest.mark.parametrize("name", [name for name in vars(specs) if name.isupper()])
def test_every_named_spec(name):
    spec = getattr(specs, name)
    check(awkward(9, 1536), activations(9, 1536, seed=1), weights(1536), spec)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("group", [64, 32])
def test_other_groups(group, scale):
    spec = QuantSpec(group=group, scale=scale, layout="col_tma")
    check(awkward(9, 2304), None, weights(2304), spec)  # 2304/128 = 18: not a multiple of the four that an int32 packs


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gemma_and_mixed_dtypes(weight_dtype):
    check(awkward(9, 1536), None, weights(1536, weight_dtype) - 1, QuantSpec(), weight_offset=1.0)


def test_no_rows():
    check(activations(0, 1536), activations(0, 1536), weights(1536), QuantSpec(layout="col_tma"))


def hugging_face(x, residual, weight):
    """transformers' add and norm, as its eager model runs them."""
    h = (residual + x).float()
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * n.to(x.dtype)


def torch_norm(x, residual, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def eager_quant(y):
    groups = y.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448.0
    data = (groups / scale.unsqueeze(-1)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return data.flatten(-2), scale


def ordinal(t: torch.Tensor) -> torch.Tensor:
    """fp8 or fp32 as integers in the order of the values: neighbours differ by one."""
    bits = t.view({1: torch.int8, 4: torch.int32}[t.element_size()]).long()
    sign = -(1 << (8 * t.element_size() - 1))
    return torch.where(bits < 0, sign - bits, bits)


@dataclass
class Counts:
    """What differs from the eager graph, over all sizes."""

    values: int = 0
    different: int = 0
    steps: int = 0  # the most, between two fp8 values
    groups: int = 0
    other_amax: int = 0  # groups whose largest normed value was rounded the other way
    ulps: int = 0  # the most, between two scales of groups with one amax

    def add(self, ours: tuple, theirs: tuple) -> None:
        (data, scale, y), (data_, scale_, y_) = ours, theirs
        apart = (ordinal(data) - ordinal(data_)).abs()
        amax, amax_ = (t.float().unflatten(-1, (-1, 128)).abs().amax(-1) for t in (y, y_))
        same = amax == amax_
        self.values += data.numel()
        self.different += int((apart > 0).sum())
        self.steps = max(self.steps, int(apart.max()))
        self.groups += same.numel()
        self.other_amax += int((~same).sum())
        self.ulps = max(self.ulps, int((ordinal(scale) - ordinal(scale_)).abs()[same].max()))


@pytest.mark.parametrize(
    ("eager", "spec"), [(hugging_face, specs.HF), (torch_norm, QuantSpec())], ids=["transformers", "F.rms_norm"]
)
def test_the_eager_graph(eager, spec):
    torch.manual_seed(0)
    counts = Counts()
    for k, m in product(KS, (64, 4096)):
        x, residual = (torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        weight = weights(k).cuda()
        y = eager(x, residual, weight)
        # one config: that the others agree is test_invariance's, and compiling is what costs time
        added = residual if eager is hugging_face else None
        data, scale, _, norm = rms_norm_quant(x, added, weight, EPS, spec, 0.0, True, Config(8))
        counts.add((data, scale, norm), (*eager_quant(y), y))
    print(counts)
    assert counts.values > 1e8 and counts.groups > 9e5
    assert counts.different <= 1e-5 * counts.values and counts.steps <= 1, counts
    assert counts.other_amax <= 1e-5 * counts.groups and counts.ulps <= 2, counts


@pytest.mark.parametrize("k", [1536, 7168])
def test_the_eager_graph_to_the_bit_where_the_sum_is_exact(k):
    x, weight = exact(64, k).cuda(), weights(k).cuda()
    y = hugging_face(x, torch.zeros_like(x), weight)
    q, norm = nq.rms_norm_quant(x, weight, EPS, spec=specs.HF, return_norm=True)
    assert_bitwise((q.data, q.scale, norm), (*eager_quant(y), y))
