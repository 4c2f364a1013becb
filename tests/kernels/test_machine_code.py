"""What the kernels become on Hopper and Blackwell: wide accesses, no spills, one read, and PDL in its place."""

import json
import re
from collections import Counter
from itertools import product
from unittest import mock

import pytest
import torch
import triton
from shared.machine_code import SM_90, SM_100, Code, compiling, machine_code

from normquant import QuantSpec, specs
from normquant.kernels import (
    gated_norm_quant,
    group_quant,
    latent_norm_quant,
    rms_norm_quant,
    rope_last,
    silu_mul_quant,
)
from normquant.kernels.capability import LaunchTarget
from normquant.kernels.configs import RELEASES, Config, _table, configs
from normquant.kernels.launch import kernel_spec
from normquant.ops import OPS, Examples, Op

CAPABILITIES = (SM_90, SM_100)
CONFIGS = [Config(warps, split) for warps, split in product((4, 8, 16, 32), (1, 4))]
NAMED = [name for name in vars(specs) if name.isupper()]


def empty(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(m, k, dtype=dtype)


def norm(x, config, *, residual=None, spec=specs.HF, normed=False, weight_dtype=torch.bfloat16, eps=1e-6):
    weight = torch.empty(x.shape[1], dtype=weight_dtype)
    return rms_norm_quant.rms_norm_quant(x, residual, weight, eps, spec, 0.0, normed, config)


def add_norm(x, config, **kwargs):
    return norm(x, config, residual=torch.empty_like(x), **kwargs)


def quant(x, config, *, spec=specs.HF):
    return group_quant.group_quant(x, spec, config)


def silu(x, config, *, spec=specs.HF, return_product=False):
    return silu_mul_quant.silu_mul_quant(torch.cat((x, x), dim=1), spec, config, return_product=return_product)


def gated(x, config, *, spec=specs.HF, d=128, eps=1e-6):
    weight = torch.empty(d, dtype=x.dtype)
    return gated_norm_quant.gated_norm_quant(x, torch.empty_like(x), weight, eps, spec, config)


# A new kernel needs a line in each of these three.
LAUNCHES = {
    "norm": norm,
    "add_norm": add_norm,
    "add_norm_normed": lambda x, config: add_norm(x, config, normed=True),
    "quant": quant,
    "silu": silu,
    "silu_stored": lambda x, config, **kwargs: silu(x, config, return_product=True, **kwargs),
    "gated": gated,
}

# name -> tiles of 16-bit values that a program loads and stores: (whole row, its own part of it). With a split row a
# program reads the whole row for the sum of squares and its own part again; without, they are the same tile.
LOADS = {
    "norm": lambda whole, own: [whole, own] if whole == own else [whole, own, own],
    "add_norm": lambda whole, own: [whole, whole, own] if whole == own else [whole, whole, own, own, own],
    "add_norm_normed": lambda whole, own: LOADS["add_norm"](whole, own),
    "quant": lambda whole, own: [own],
    "silu": lambda whole, own: [own, own],
    "silu_stored": lambda whole, own: [own, own],
    "gated": lambda whole, own: [own, own, own],  # the weight comes out of the L1 for all heads but one
}
# 16-bit tiles, beside the fp8 data
STORES = {"norm": 0, "add_norm": 1, "add_norm_normed": 2, "quant": 0, "silu": 0, "silu_stored": 1, "gated": 0}


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def tiles(k: int, split: int) -> tuple[int, int]:
    """Values of a row, and of a program's part of it, in blocks of a power of two of groups."""
    groups = k // 128
    return 128 * power_of_two(groups), 128 * power_of_two(-(-groups // split))


def accesses(tile: int, bits: int, threads: int, exist: int | None = None) -> Counter:
    """How a tile is moved: each thread takes its share in the widest pieces that exist, 128 bits.

    `exist`: values of the tile that are in the row at all; no piece is needed that only has values past its end.
    """
    width = min(128, max(1, tile // threads) * bits)
    at_once = threads * width // bits
    return Counter({width: max(1, -(-(tile if exist is None else exist) // at_once))})


def scales(own: int, threads: int) -> Counter:
    """How the scales of `own` values are stored: a thread has pieces of up to 16, and stores a scale for each."""
    width = min(16, max(1, own // threads))
    return Counter({32: max(1, own // (threads * width))})


def assert_moved(widths: list[int], least: Counter, most: Counter) -> None:
    """Accesses of the widths in `most`, no more than those and no fewer than `least`."""
    got = Counter(widths)
    assert got.keys() == most.keys() and least <= got <= most, f"{got} is not between {least} and {most}"


def compiled(name: str, k: int, config: Config, capability) -> Code:
    return machine_code(lambda: LAUNCHES[name](empty(4, k), config), capability)


def assert_clean(code: Code) -> None:
    """No local memory of any kind, and a launch that fits the register file."""
    assert_fits(code)
    assert not code.places("LDL") and not code.places("STL")


def assert_fits(code: Code) -> None:
    """As assert_clean, by what the assembler counts; its code is not looked at."""
    assert (code.stack, code.local) == (0, 0)
    assert code.registers * code.threads <= 65536, f"{code.registers} registers in each of {code.threads} threads"


def assert_pdl_in_place(code: Code, early: bool = False) -> None:
    """Wait before the first load, release before the first store, in PTX and in SASS; early: before the wait, too."""
    for text, wait, load, release, store in (
        (code.sass, "ACQBULK", "LDG.", "PREEXIT", "STG."),
        (code.ptx.splitlines(), "griddepcontrol.wait", "ld.global", "griddepcontrol.launch_dependents", "st.global"),
    ):
        waits, loads, releases, stores = (
            [i for i, line in enumerate(text) if what in line] for what in (wait, load, release, store)
        )
        assert len(waits) == len(releases) == 1
        assert waits[0] < loads[0] and stores
        # The compiler may move a release up, never a load above the wait: what it may not do is delay the release.
        assert releases[0] < stores[0], f"dependents are released after the first store: {text[releases[0]]}"
        assert releases[0] < waits[0] if early else releases[0] > waits[0]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("choice", CONFIGS, ids=lambda c: f"warps{c.num_warps}-split{c.split}")
@pytest.mark.parametrize("k", [1536, 7168])
@pytest.mark.parametrize("name", ["add_norm_normed", "quant"])
def test_every_access_is_wide_and_nothing_is_read_twice(name, k, choice, capability):
    code = compiled(name, k, choice, capability)
    assert_clean(code)
    assert_pdl_in_place(code)
    whole, own = tiles(k, choice.split)
    loads, stores = LOADS[name](whole, own), STORES[name]
    least, most = (
        sum((accesses(tile, 16, code.threads, exist and min(exist, tile)) for tile in loads), Counter())
        for exist in (k, None)
    )
    assert_moved(code.widths("LDG"), least, most)
    least, most = (
        sum((accesses(own, bits, code.threads, exist) for bits in (*[16] * stores, 8)), scales(own, code.threads))
        for exist in (min(k, own), None)
    )
    assert_moved(code.widths("STG"), least, most)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("warps", "split", "own"), [(4, 8, 8), (2, 8, 8), (8, 4, 16), (16, 2, 32)])
@pytest.mark.parametrize("name", ["norm", "add_norm_normed"])
def test_a_program_of_a_cluster_reads_its_own_part(name, warps, split, own, capability):
    code = compiled(name, 7168, Config(warps, split, cluster=True), capability)
    assert_clean(code)
    assert_pdl_in_place(code)
    assert set(code.widths("LDG")) == {128}
    assert sum(code.widths("LDG")) * code.threads == 16 * own * 128 * len(LOADS[name](1, 1))
    values = Counter(code.widths("STG")) - scales(own * 128, code.threads)
    assert sum(values.elements()) * code.threads == (16 * STORES[name] + 8) * own * 128


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("split", "programs"), [(2, 2), (4, 4), (8, 7)])
def test_programs_of_a_cluster_exchange_their_sums(split, programs, capability):
    code = compiled("add_norm", 7168, Config(8, split, cluster=True), capability)
    opened, waited, arrived, sent, full = (
        code.places(what) for what in ("UCGABAR_ARV", "ACQBULK", "UCGABAR_WAIT", "STAS", "SYNCS.PHASECHK")
    )
    assert len(opened) == len(arrived) == len(sent) == 1, "one exchange"
    loaded = code.places("LDG")[-1]
    # The mailbox is opened while the kernel before is running, and the others are waited for when all loads are out.
    assert opened[0] < waited[0] < loaded < arrived[0] < sent[0] < full[0]
    assert f"expect_tx.shared::cta.b64 _, [mailbox + 32], {4 * programs};" in code.ptx


@pytest.mark.parametrize("name", ["quant", "silu", "silu_stored", "gated"])
@pytest.mark.parametrize("spec", [specs.VLLM, specs.DEEPGEMM_UE8M0], ids=lambda spec: spec.scale)
def test_groups_are_quantized_without_a_barrier(name, spec):
    code = machine_code(lambda: LAUNCHES[name](empty(4, 7168), Config(8, 4), spec=spec), SM_90)
    assert not code.places("BAR"), "a group and its scale stay where they are"


@pytest.mark.parametrize("d", [64, 128, 256, 512])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_heads_of_a_gated_norm_stay_in_their_warps(capability, d):
    code = machine_code(lambda: gated(empty(4, 4096), Config(8), d=d), capability)
    assert_clean(code)
    assert_pdl_in_place(code)
    assert not code.places("BAR") and not code.places("LDS") and not code.places("STS")
    assert Counter(code.widths("LDG")) == Counter({128: 6})  # 16 values a thread of x, of z and of the weight


@pytest.mark.parametrize("d", [16, 512, 1024])
def test_other_heads_of_a_gated_norm_do_not_spill(d):
    for choice in (Config(4), Config(8), Config(32)):
        assert_clean(machine_code(lambda choice=choice: gated(empty(4, 8192), choice, d=d), SM_90))


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("name", ["norm", "add_norm_normed", "quant", "silu", "gated"])
def test_several_rows_for_a_program(name, rows):
    code = compiled(name, 512, Config(rows // 2, rows=rows), SM_90)
    assert_clean(code)
    assert_pdl_in_place(code)
    assert set(code.widths("LDG")) == {128}
    widths = Counter(code.widths("STG"))
    assert widths.keys() <= {32, 64, 128} and widths[32] == scales(rows * 512, code.threads)[32]


@pytest.mark.parametrize("k", [5120, 7168])
def test_a_weight_that_is_read_late_leaves_registers(k):
    early, late = (compiled("add_norm", k, Config(8, late_weight=late), SM_90) for late in (False, True))
    assert_clean(late)
    assert_pdl_in_place(late)
    assert Counter(late.widths("LDG")) == Counter(early.widths("LDG"))
    assert late.registers <= 64 < early.registers  # four programs of 256 threads, and not three


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_the_next_kernel_is_released_when_the_config_says(name, release):
    code = compiled(name, 7168, Config(8, release=release), SM_90)
    assert_clean(code)
    assert_pdl_in_place(code, early=release == "start")
    lines = code.ptx.splitlines()
    at = {what: next(i for i, line in enumerate(lines) if what in line) for what in ("launch_dependents", "ld.global")}
    assert (at["launch_dependents"] > at["ld.global"]) == (release == "loaded")


@pytest.mark.parametrize(("k", "tiles"), [(1536, 2), (5120, 2), (7168, 3)])
@pytest.mark.parametrize("name", ["norm", "add_norm_normed"])
def test_several_tiles_leave_no_idle_lanes(name, k, tiles):
    one, several = (compiled(name, k, Config(4, tiles=n), SM_90) for n in (1, tiles))
    assert_clean(several)
    assert_pdl_in_place(several)
    assert several.registers < one.registers
    assert min(several.widths("LDG")) >= 64
    # 12 = 8 + 4, 40 = 32 + 8, 56 = 32 + 16 + 8 groups: nothing is read past the row
    assert sum(several.widths("LDG")) * several.threads == 16 * k * len(LOADS[name](1, 1))


def test_the_l2_is_asked_to_keep_the_sum():
    plain, kept = (compiled("add_norm", 7168, Config(8, keep_sum=keep), SM_90) for keep in (False, True))
    assert_clean(kept)
    assert_pdl_in_place(kept)
    assert Counter(kept.widths("STG")) == Counter(plain.widths("STG"))
    assert "evict_last" not in plain.ptx and "ld.global.L1::evict_last" not in kept.ptx
    assert 0 < kept.ptx.count("st.global.L1::evict_last.L2::cache_hint") < kept.ptx.count("st.global")


@pytest.mark.parametrize(("name", "read"), [("norm", 1), ("add_norm", 2)])
def test_what_is_read_once_leaves_the_l2_first(name, read):
    plain, hinted = (compiled(name, 7168, Config(8, evict_first=hint), SM_90) for hint in (False, True))
    assert_clean(hinted)
    assert_pdl_in_place(hinted)
    assert Counter(hinted.widths("LDG")) == Counter(plain.widths("LDG"))
    loads = hinted.ptx.count("ld.global.L1::evict_first.L2::cache_hint")
    assert "evict_first" not in plain.ptx and loads >= read
    assert loads < hinted.ptx.count("ld.global"), "the weight stays"


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["norm", "add_norm"])
def test_a_prefetch_stands_before_the_wait_and_reads_nothing(name, weight_dtype):
    plain, prefetching = (
        machine_code(lambda c=c: LAUNCHES[name](empty(4, 7168), c, weight_dtype=weight_dtype), SM_90)
        for c in (Config(8), Config(8, prefetch=True))
    )
    assert_clean(prefetching)
    assert_pdl_in_place(prefetching)
    hints = prefetching.places("CCTL")
    assert hints and hints[-1] < prefetching.places("ACQBULK")[0] and not plain.places("CCTL")
    assert Counter(prefetching.widths("LDG")) == Counter(plain.widths("LDG"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["norm", "add_norm", "silu", "silu_stored", "gated"])
def test_what_is_not_asked_for_is_not_moved(name, capability):
    code = compiled(name, 7168, Config(8), capability)
    assert_clean(code)
    assert_pdl_in_place(code)
    whole, own = tiles(7168, 1)
    assert sum(code.widths("LDG")) * code.threads == 16 * sum(LOADS[name](whole, own))
    values = Counter(code.widths("STG")) - scales(own, code.threads)
    assert sum(values.elements()) * code.threads == (16 * STORES[name] + 8) * own


def launch_example(op: Op, k: int, config: Config) -> None:
    args = op.example(Examples(4, k, "cpu", rope="interleaved_to_half"))
    spec = QuantSpec(layout="col_tma") if "positions" in args else specs.HF
    op.run(*args.values(), spec, config=config)


@pytest.mark.parametrize(
    ("op", "k"),
    [(op, int(k)) for op in OPS.values() if op.configs for k in _table(SM_90).get(op.configs, op.widths)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_no_config_of_the_table_spills(op, k):
    for choice in configs(op.configs, k, SM_90):
        assert_fits(machine_code(lambda choice=choice: launch_example(op, k, choice), SM_90))


@pytest.mark.parametrize("name", NAMED)
def test_every_named_spec_is_clean(name):
    spec = getattr(specs, name)
    capability = SM_100 if spec.scale == "ue8m0_packed" else SM_90
    for run in (add_norm, quant, silu, gated):
        code = machine_code(lambda run=run: run(empty(4, 7168), Config(8), spec=spec), capability)
        assert_clean(code)
        assert_pdl_in_place(code)
        assert set(code.widths("LDG")) == {128}


def quantizing(spec: QuantSpec) -> Code:
    return machine_code(lambda: quant(empty(4, 7168), Config(8, 4), spec=spec), SM_90)


def instructions(code: Code) -> int:
    return len(code.sass) - len(code.places("NOP"))  # which fill up the end


def test_a_correctly_rounded_quotient_takes_one_approximate_reciprocal():
    # IEEE division is a call for what is not in the usual range, and a dozen instructions for what is
    factor, reciprocal = quantizing(specs.TILE_KERNELS), quantizing(specs.TILE_KERNELS.replace(divide="reciprocal"))
    for code in (factor, reciprocal):
        assert "div." not in code.ptx and not code.places("CALL") and not code.places("BSSY")
        assert len(code.places("MUFU")) == 1
    assert 0 < instructions(factor) - instructions(reciprocal) <= 12  # once for a group


def test_leaving_out_nan_costs_nothing():
    ignore, propagate = (quantizing(specs.VLLM_UE8M0.replace(nan=nan)) for nan in ("ignore", "propagate"))
    assert "max.NaN.f32" in propagate.ptx and "max.NaN.f32" not in ignore.ptx
    assert instructions(ignore) <= instructions(propagate)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32])
def test_other_weights_are_read_wide(weight_dtype):
    launch = lambda: norm(empty(4, 7168), Config(8), weight_dtype=weight_dtype)  # noqa: E731
    code = machine_code(launch, SM_90)
    assert_clean(code)
    assert set(code.widths("LDG")) == {128}
    assert sum(code.widths("LDG")) * code.threads == 8192 * (16 + 8 * weight_dtype.itemsize)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["add_norm", "quant", "silu", "gated"])
def test_no_multiply_add_of_the_compilers_choice(name, capability):
    # "mul.rn" and "add.rn" are what ptxas must not contract; without the suffix it may.
    free = re.compile(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32")
    code = compiled(name, 7168, Config(8), capability)
    assert code.options.enable_fp_fusion is False
    assert not free.search(code.ptx) and "mul.rn.f32" in code.ptx
    stock = LaunchTarget.options
    with mock.patch.object(
        LaunchTarget, "options", lambda self, config: stock(self, config) | {"enable_fp_fusion": True}
    ):
        assert free.search(compiled(name, 7168, Config(8), capability).ptx)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_limit_is_three_operations_a_value(capability):
    launch = lambda limit: silu_mul_quant.silu_mul_quant(empty(4, 2 * 2304), specs.HF, Config(4), limit)  # noqa: E731
    plain, limited = (machine_code(lambda at=at: launch(at), capability) for at in (None, 10.0))
    assert_clean(limited)
    assert_pdl_in_place(limited)
    for opcode in ("LDG", "STG"):
        assert Counter(limited.widths(opcode)) == Counter(plain.widths(opcode))
    values = tiles(2304, 1)[0] // limited.threads  # of gate, and as many of up
    assert limited.ptx.count("min.NaN.f32") == 2 * values and "min.NaN.f32" not in plain.ptx
    assert instructions(limited) - instructions(plain) == 3 * values


def test_no_pdl_before_hopper():
    code = compiled("add_norm", 7168, Config(8, prefetch=True), (8, 9))
    assert not code.places("CCTL")  # without the wait there is nothing to stand before
    assert_clean(code)
    assert "griddepcontrol" not in code.ptx
    assert not code.options.launch_pdl
    assert set(code.widths("LDG")) == {128}


def latent(x, config, *, eps=1e-6, angles=64):
    q_weight, kv_weight = torch.empty(1536, dtype=x.dtype), torch.empty(512, dtype=x.dtype)
    cos = torch.empty(x.shape[0], angles, dtype=x.dtype)[:, :32]
    positions = torch.empty(x.shape[0], dtype=torch.int64)
    spec, rope = QuantSpec(layout="col_tma"), "interleaved_to_half"
    latent_norm_quant.latent_norm_quant(x, q_weight, kv_weight, cos, cos, positions, eps, rope, spec, True, config)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("choice", [Config(4, 4), Config(8, 1), Config(16, 2)], ids=str)
def test_latent_norm_quant(choice, capability):
    x = empty(4, 1536 + 512 + 64)
    code = machine_code(lambda: latent(x, choice), capability)
    assert_clean(code)
    waits, loads = code.places("ACQBULK"), code.places("LDG")
    assert len(waits) == 1 and waits[0] < loads[0]
    assert code.places("PREEXIT")
    # k_pe is short, so are its angles, and its position is one number; everything else comes in the widest pieces
    whole, own = tiles(1536, choice.split)
    parts = [*([whole, own] if whole == own else [whole, own, own]), 512, 512]
    wide = sum((accesses(tile, 16, code.threads) for tile in parts), Counter())
    got = Counter(code.widths("LDG"))
    assert sum(((got - wide) + (wide - got)).values()) <= 4, f"{got} instead of {wide} and the four of k_pe"


def rope(x, *, heads=16, r=64, how="interleaved", angles=64):
    cos = torch.empty(x.shape[0], angles, dtype=x.dtype)[:, : r // 2]
    positions = torch.empty(x.shape[0], dtype=torch.int64)
    rope_last.rope_last(x, cos, cos, positions, heads, r, how, QuantSpec(rounding="twice"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("how", ["interleaved", "half", "interleaved_to_half"])
@pytest.mark.parametrize("heads", [16, 128])
def test_rope_last(heads, how, capability):
    code = machine_code(lambda: rope(empty(4, heads * 192), heads=heads, how=how), capability)
    assert_clean(code)
    assert_pdl_in_place(code)
    assert not code.places("LDS") and not code.places("STS")  # pairs are taken apart within a thread
    # 16 heads for a program: 128 values of each copied, halves of 32 turned; a position, and angles in one access each
    values, half = accesses(16 * 128, 16, code.threads), accesses(16 * 32, 16, code.threads)
    pairs = accesses(16 * 64, 16, code.threads)
    loads = (half + half if how == "half" else pairs) + half + half + Counter({64: 1})
    assert Counter(code.widths("LDG")) == values + loads
    assert Counter(code.widths("STG")) == values + (pairs if how == "interleaved" else half + half)


M_AND_WIDTH = ((1, 0), (2, 8), (16, 512), (17, 8192), (4096, 24))  # Triton tells 1, multiples of 16 and others apart


@pytest.mark.parametrize(
    ("k", "launch"),
    [
        (512, lambda x, i: norm(x, Config(4), eps=10.0**-i)),
        (512, lambda x, i: norm(x, Config(4), eps=10.0**-i, residual=x, normed=True)),
        (512, lambda x, i: quant(x, Config(4), spec=QuantSpec(layout="col_tma"))),
        (1024, lambda x, i: silu_mul_quant.silu_mul_quant(x, QuantSpec(layout="col_tma"), Config(4))),
        (1024, lambda x, i: gated(x, Config(4), eps=10.0**-i)),
        (2112, lambda x, i: latent(x, Config(4), eps=10.0**-i, angles=32 + 8 * i)),
        (768, lambda x, i: rope(x, heads=4, angles=32 + 8 * i)),
    ],
    ids=["norm", "add_norm", "quant", "silu", "gated", "latent", "rope"],
)
def test_one_binary_for_every_m_and_aligned_stride(k, launch):
    with compiling(SM_90) as kernels:
        for i, (m, gap) in enumerate(M_AND_WIDTH):
            launch(empty(m, k + gap)[:, :k], i)
    assert len(kernels) == len(M_AND_WIDTH)
    assert len(set(map(id, kernels))) == 1, "an M, a stride or an eps had a binary of its own"


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_hook_that_watches_compiles_can_read_the_constants(name):
    # vLLM sets one when it has started, and Triton then writes the constants of each compile as JSON.
    seen = []
    with (
        mock.patch.object(triton.knobs.runtime, "jit_post_compile_hook", lambda **kwargs: seen.append(kwargs)),
        compiling(SM_90),
    ):
        LAUNCHES[name](empty(4, 640), Config(4))  # a width that no other test compiles
    (compile_,) = (hook["compile"] for hook in seen)
    written = json.loads(compile_["specialization_data"])["constant_vals"]
    spec = kernel_spec(specs.HF)
    assert list(spec) in written
    assert str(tuple(spec)) in compile_["key"] or repr(spec) in compile_["key"]  # Triton versions differ


@pytest.mark.parametrize(
    "x", [empty(4, 7171)[:, :7168], empty(4, 7176)[:, 1:7169]], ids=["odd row stride", "misaligned start"]
)
def test_rows_that_are_not_aligned(x):
    code = machine_code(lambda: norm(x, Config(16)), SM_90)
    assert_clean(code)
    assert_pdl_in_place(code)
    # x comes value by value, what is ours still in 128 bits
    assert Counter(code.widths("LDG")) == Counter({16: 8192 // code.threads}) + accesses(8192, 16, code.threads)
    assert Counter(code.widths("STG")) == accesses(8192, 8, code.threads) + Counter({32: 1})


def test_the_checks_here_can_fail():
    # A launch with too few threads for its row spills; the checks must see it.
    code = machine_code(lambda: add_norm(empty(4, 16384), Config(4)), SM_90)
    assert code.places("LDL") and code.places("STL")
    for check in (assert_clean, assert_fits):
        with pytest.raises(AssertionError):
            check(code)
