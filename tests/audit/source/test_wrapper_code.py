"""Reading generated modules; damaged and hostile text is refused with one line, and never executed.

The number of damaged inputs is set by NORMQUANT_FUZZ_INPUTS; 100,000 take two to three minutes on one core:

    NORMQUANT_FUZZ_INPUTS=100000 pytest tests/audit/source/test_wrapper_code.py
"""

from __future__ import annotations

import os
import random
import sys
import time
import warnings
from pathlib import Path

import pytest
from shared.damaged_code import mutated
from shared.generated_code import COPY, ON, SEEDS, bytes_moved, module, parsed, program

from normquant.audit import audit_path, reports
from normquant.audit.program import GeneratedCode
from normquant.audit.source import wrapper_code
from normquant.audit.source.code_files import Unusable
from normquant.audit.source.generated_module import NotGenerated
from normquant.report import audit_text
from normquant.report.page import html

ASSERTED = "assert_size_stride(arg0_1, (64, 64), (64, 1))"
INPUTS = int(os.environ.get("NORMQUANT_FUZZ_INPUTS", "1500"))
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(SEEDS.glob("*.py"))]


def test_assertions_about_tensors_launch_nothing() -> None:
    """As torch 2.14 writes them: several tensors in one call, and a result of an operator with its dtype."""
    grouped = "assert_size_stride_grouped((arg0_1, ), ((64, 64), ), ((64, 1), ), 'input')"
    result = "assert_tensor_metadata(arg0_1, (64, 64), (64, 1), torch.bfloat16, 'torch.ops.aten.topk.default')"
    for written in (grouped, result):
        assert bytes_moved(module(COPY).replace(ASSERTED, written)) == [("triton_poi_fused_0", 8192, 8192)]


def test_a_size_that_is_read_off_an_input() -> None:
    """As torch 2.13 writes a size that is no input of its own."""
    read = f"arg0_1_size = arg0_1.size()\n    s0 = arg0_1_size[0]\n    {ASSERTED.replace('(64, 64)', '(s0, 64)')}"
    text = module(COPY, "triton_poi_fused_0.run(arg0_1, buf0, 64*s0, stream=stream0)")
    text = text.replace(ASSERTED, read).replace("empty_strided_cuda((64,", "empty_strided_cuda((s0,")
    text = text.replace("    xnumel = 4096\n", "")
    text += "def get_args():\n    arg0_1 = rand_strided((64, 64), (64, 1), device='cuda:0', dtype=torch.bfloat16)\n"
    found = program(text)
    assert found.sizes == {"s0": 64} and bytes_moved(text) == [("triton_poi_fused_0", 8192, 8192)]
    assert [launch.bytes_read for launch in program(text, s0=128).launches] == [16384]


def test_memory_that_is_reused_is_another_tensor() -> None:
    calls = "\n    ".join(
        (
            "triton_poi_fused_0.run(arg0_1, buf0, 4096, stream=stream0)",
            "buf1 = buf0; del buf0  # reuse",
            "torch.ops.some.op.default(arg0_1, buf1)",
            "buf2 = buf1",
            "torch.ops.some.other.default(buf2)",
            "buf0 = buf2",
        )
    )
    first, op, other = program(module(COPY, calls)).launches
    assert [a.buffer for a in op.writes] == ["buf1"] and [a.buffer for a in op.reads] == ["arg0_1"]
    assert [a.buffer for a in other.reads] == ["buf2"] and not other.writes
    edges = [(e.producer, e.consumer) for e in program(module(COPY, calls)).edges]
    assert edges == [(None, first.position), (None, op.position), (op.position, other.position)]


# ---- what is refused
HOSTILE = {
    "empty": "",
    "not Python": "async_compile = (",
    "no call": "async_compile = 1\n",
    "deep parentheses": "async_compile = " + "(" * 10_000 + ")" * 10_000,
    "deep unary": "async_compile = " + "-" * 100_000 + "1",
    "null byte": "async_compile = 1\0",
    "endless recursion": "async_compile = 1\ndef f(args):\n    x = f([])\ndef call(args):\n    x = f([])\n",
    "exponential calls": "async_compile = 1\n"
    + "".join(f"def f{i}(args):\n" + f"    x = f{i + 1}([])\n" * 40 for i in range(14))
    + "def f14(args):\n    y = 1\ndef call(args):\n    x = f0([])\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_refused_with_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.py"
    path.write_bytes(HOSTILE[name].encode())
    began = time.perf_counter()
    with pytest.raises(Unusable) as caught:
        audit_path(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert time.perf_counter() - began < 20


def test_expressions_that_double_do_not_explode() -> None:
    doubling = "\n    ".join(f"n{i + 1} = n{i} + n{i}" for i in range(200))
    text = module(COPY, f"n0 = s0\n    {doubling}\n    buf9 = empty_strided_cuda((n200, 4), (4, 1), torch.bfloat16)")
    assert program(text).buffers["buf9"].bytes == 0  # not known, and found out soon
    squares = "\n".join(f"tmp{i + 1} = tmp{i} * tmp{i}" for i in range(200))
    (kernel,) = program(module(f"tmp0 = 999999\n{squares}\n{COPY.replace('tmp0', 'val')}")).kernels
    assert kernel.bytes_read == 4096 * 2


def test_nothing_in_the_text_is_executed(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    bomb = f"__import__('pathlib').Path({str(ran)!r}).touch()"
    text = module(f"{bomb}\n{COPY}", f"{bomb}\n    triton_poi_fused_0.run(arg0_1, buf0, 4096, stream=stream0)")
    path = tmp_path / "bomb.py"
    path.write_text(f"{text}\n{bomb}\nclass X:\n    {bomb}\n")
    before = set(sys.modules)
    (report,) = audit_path(path)
    assert [k.name for k in report.kernels] == ["triton_poi_fused_0"]
    assert not ran.exists() and set(sys.modules) - before == set()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    text = ON.read_text()
    end = text.index("return (buf44")
    cuts = [int(end * part) for part in (0.3, 0.6, 0.9)]  # in the first docstring, in a kernel, in call()
    for cut in [*cuts, text.rindex("\n", 0, cuts[-1]), end]:
        path = tmp_path / "cut.py"
        path.write_text(text[:cut])
        with pytest.raises(Unusable, match=r"cut\.py: (cannot be parsed as Python|no call\(\) function|.*cut short)"):
            audit_path(path)


def test_more_launches_than_any_program_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper_code, "_MOST_CALLS", 100)
    call = "triton_poi_fused_0.run(arg0_1, buf0, 4096, stream=stream0)"
    assert len(program(module(COPY, "\n    ".join([call] * 100))).launches) == 100
    with pytest.raises(NotGenerated, match="more than 100 launches"):
        parsed(module(COPY, "\n    ".join([call] * 101)))


# ---- damaged code


def audited(text: str) -> bool:
    """Whether the text was audited; False if it was refused. Anything else raises."""
    try:
        module = parsed(text)
    except NotGenerated as error:
        assert "\n" not in str(error) and str(error)
        return False
    (report,) = reports.audit_modules([module], "h100")
    assert all(launch.bytes_read >= 0 and launch.bytes_written >= 0 for launch in report.launches)
    return True


def test_seeds_are_audited() -> None:
    assert len(TEXTS) >= 8
    assert all(audited(text) for text in TEXTS)


@pytest.mark.parametrize("part", range(10))
def test_damaged_code(part: int) -> None:
    rng = random.Random(part)
    outcomes = {True: 0, False: 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarning: what Python thinks of damaged code is no news
        for number in range(INPUTS // 10):
            text = mutated(rng.choice(TEXTS), rng)
            try:
                outcomes[audited(text)] += 1
            except Exception as error:
                raise AssertionError(f"part {part}, input {number}: {error!r}") from error
    assert outcomes[True] and outcomes[False], "both outcomes happen"


def test_damaged_code_is_printed() -> None:
    rng = random.Random(0)
    printed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            text = mutated(rng.choice(TEXTS), rng)
            try:
                module = wrapper_code.read_module(GeneratedCode("<script>alert(1)</script>", text))
            except NotGenerated:
                continue
            data = [report.to_dict() for report in reports.audit_modules([module], "h100")]
            shown = html.Compared([[one] for one in data])
            assert "<script>alert" not in html.page(shown, "<script>alert(1)</script>")
            assert audit_text.render(data, "title")
            printed += 1
    assert printed
