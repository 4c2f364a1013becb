"""The named specs against the peers' own Python references, where a peer is installed or its sources are on the path.

A CPU is enough for these references, and for DeepGEMM's its one file: the package itself wants a GPU.
"""

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from shared.compare import bits
from shared.inputs import activations, awkward

from normquant import QuantizedActivation, QuantSpec, reference, specs

SHAPES = [(9, 1536), (64, 7168)]


def module_of(package: str, file: str) -> ModuleType:
    """A file of a package, executed without the package."""
    found = importlib.util.find_spec(package)
    places = [Path(folder, file) for folder in (found.submodule_search_locations or () if found else ())]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        pytest.skip(f"no {package}/{file} is installed or on PYTHONPATH")
    spec = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(m: int, k: int) -> list[torch.Tensor]:
    scaled = activations(m, k, torch.float32, seed=1) * torch.logspace(-6, 6, m).unsqueeze(1)
    return [activations(m, k), awkward(m, k), scaled.bfloat16()]


def without(groups: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Bits of fp8 data [M, K] with those of some groups [M, G] left out."""
    return bits(data).unflatten(1, (groups.shape[1], -1)).masked_fill(groups.unsqueeze(2), 0)


def check(x: torch.Tensor, spec: QuantSpec, data: torch.Tensor, scale: torch.Tensor) -> None:
    """Equal to the bit; the data where amax is a number, since a peer may have zeros beside a NaN."""
    ours = QuantizedActivation(*reference.group_quant(x, spec), spec)
    assert torch.equal(bits(ours.scales()), bits(scale))
    amax = x.float().unflatten(1, (-1, spec.group)).abs().amax(-1)  # [M, G]
    assert torch.equal(without(~amax.isfinite(), ours.data), without(~amax.isfinite(), data))
    assert ours.data.float().isnan()[x.isnan()].all()


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("group", [128, 32])
@pytest.mark.parametrize("name", ["DEEPGEMM", "DEEPGEMM_UE8M0", "DEEPGEMM_PACKED"])
def test_deepgemm(name, group, m, k):
    theirs = module_of("deep_gemm", "utils/math.py")
    spec = getattr(specs, name).replace(group=group)
    for x in inputs(m, k):
        data, scale = theirs.per_token_cast_to_fp8(x, use_ue8m0=spec.is_ue8m0, gran_k=group)
        check(x, spec, data, scale)
        if spec.scale == "ue8m0_packed":
            packed = theirs.per_token_cast_to_fp8(x, True, group, use_packed_ue8m0=True)[1]
            assert torch.equal(packed, reference.group_quant(x, spec)[1])


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("group", [128, 32])
def test_tile_kernels(group, m, k):
    reason = "TileKernels' references need tile_kernels and the tilelang that it imports"
    theirs = pytest.importorskip("tile_kernels.torch", reason=reason, exc_type=ImportError)
    ue8m0 = {"round_sf": True}
    packed = ue8m0 | {"use_packed_ue8m0": True, "use_tma_aligned_col_major_sf": True}
    for spec, options in (
        (specs.TILE_KERNELS, {}),
        (specs.TILE_KERNELS.replace(layout="col_tma"), {"use_tma_aligned_col_major_sf": True}),
        (specs.DEEPGEMM_UE8M0.replace(layout="row"), ue8m0),
        (specs.DEEPGEMM_PACKED, packed),
    ):
        spec = spec.replace(group=group)
        for x in inputs(m, k):
            x = x.nan_to_num(0.0, 0.0, 0.0) if spec.is_ue8m0 else x  # its powers of two of NaN are 0, no scale
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data, scale = theirs.cast(x, "e4m3", (1, group), **options)
            ours, stored = reference.group_quant(x, spec)
            assert (stored.shape, stored.stride(), stored.dtype) == (scale.shape, scale.stride(), scale.dtype)
            assert torch.equal(bits(stored), bits(scale)) and torch.equal(bits(ours), bits(data))
    gated = theirs.swiglu_forward(activations(m, 2 * k))
    data, scale = theirs.cast(gated, "e4m3", (1, group))
    ours, stored, _ = reference.silu_mul_quant(activations(m, 2 * k), specs.TILE_KERNELS.replace(group=group))
    assert torch.equal(bits(stored), bits(scale)) and torch.equal(bits(ours), bits(data))
