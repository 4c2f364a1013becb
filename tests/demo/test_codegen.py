"""Finding what is launched around a norm, on programs made by hand."""

from __future__ import annotations

import pytest

from normquant.audit.program import Access, Buffer, Extern, Kernel, Program, ProgramLaunch
from normquant.demo.codegen import find_norms, is_matrix_product
from normquant.demo.sections import describe

GEMM = "normquant.block_fp8_linear"


def access(*names: str) -> tuple[Access, ...]:
    return tuple(Access(name, 100) for name in names)


def kernel(position: int, reads: str, writes: str, *aten: str) -> Kernel:
    return Kernel(position, f"triton_{position}", access(*reads.split()), access(*writes.split()), aten=aten)


def extern(position: int, name: str, reads: str, writes: str) -> Extern:
    return Extern(position, name, access(*reads.split()), access(*writes.split()))


def program(*launches: ProgramLaunch) -> Program:
    names = {a.buffer for launch in launches for a in (*launch.reads, *launch.writes)}
    return Program(launches, {n: Buffer(n, "bfloat16", ("512",), ("1",), 100, "input", n) for n in names})


def test_a_norm_has_its_kernel_and_the_quantizations_behind_it() -> None:
    launches = (
        extern(0, GEMM, "x0 w0", "x"),
        kernel(1, "x weight", "y residual", "aten.rsqrt"),
        extern(2, "normquant.group_quant", "y", "q s"),
        extern(3, GEMM, "q s w1", "z"),
        kernel(4, "z residual", "out"),  # reads what the norm's kernel wrote, but leads to no matrix product
    )
    (norm,) = find_norms(program(*launches), {"weight": "input_layernorm"})
    assert (norm.name, norm.k, norm.bytes) == ("input_layernorm", 512, 4 * 100 + 3 * 100)
    assert norm.launches == launches[1:3]
    assert describe(norm.launches) == "norm, group_quant"


def test_a_copy_in_front_of_the_norm_belongs_to_it_and_one_behind_too() -> None:
    launches = (
        extern(0, GEMM, "x0 w0", "x"),
        kernel(1, "x", "copied"),
        extern(2, "normquant.rms_norm_quant", "copied weight", "q s"),
        kernel(3, "s", "s_copied"),
        extern(4, GEMM, "q s_copied w1", "z"),
    )
    (norm,) = find_norms(program(*launches), {"weight": "n"})
    assert norm.launches == launches[1:4]
    assert describe(norm.launches) == "2 x generated, rms_norm_quant"


def test_norms_do_not_mix() -> None:
    launches = (
        kernel(0, "x w_first", "y", "aten.rsqrt"),
        extern(1, "aten.mm", "y w0", "z"),
        kernel(2, "z w_second", "u", "aten.rsqrt"),
        extern(3, "aten.mm", "u w1", "v"),
    )
    first, second = find_norms(program(*launches), {"w_first": "first", "w_second": "second"})
    assert (first.launches, second.launches) == ((launches[0],), (launches[2],))


@pytest.mark.parametrize(
    ("name", "expected"),
    [(GEMM, True), ("aten.bmm", True), ("normquant.group_quant", False), ("normquant.rms_norm_quant", False)],
)
def test_matrix_products(name: str, expected: bool) -> None:
    assert is_matrix_product(extern(0, name, "x", "y")) is expected
