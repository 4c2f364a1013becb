"""Reading generated code: what it says, and what is refused."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normquant.audit import on_disk
from normquant.audit.on_disk import audit_path
from normquant.audit.program import Program
from normquant.audit.source import code_files, evaluate, kernel_code, sizes, wrapper_code
from normquant.audit.source.code_files import Unusable
from normquant.audit.source.generated_module import NotGenerated
from normquant.audit.source.index_reach import Bound, Digit, distinct

FIXTURES = Path(__file__).parent / "fixtures"
SEEDS = FIXTURES / "seeds"
ON = FIXTURES / "fuse_norm_quant_on_layer.py"

KERNEL = """
@triton_heuristics.pointwise(
    size_hints={'x': 4096},
    triton_meta={'signature': {'in_ptr0': '*bf16', 'out_ptr0': '*bf16', 'xnumel': 'i32', 'XBLOCK': 'constexpr'}},
    inductor_meta={'mutated_arg_names': []},
)
@triton.jit
def triton_poi_fused_0(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    xnumel = 4096
    xindex = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:]
    xmask = xindex < xnumel
    x0 = xindex % 64
    x1 = xindex // 64
    BODY
"""


def module(body: str, call: str = "triton_poi_fused_0.run(arg0_1, buf0, 4096, stream=stream0)") -> str:
    """A generated module with one kernel."""
    kernel = KERNEL.replace("BODY", "\n    ".join(body.strip().splitlines()))
    return f"""# AOT ID: ['0_inference']
async_compile = AsyncCompile()
triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', '''{kernel}''', device_str='cuda')
def call(args):
    arg0_1, = args
    args.clear()
    assert_size_stride(arg0_1, (64, 64), (64, 1))
    buf0 = empty_strided_cuda((64, 64), (64, 1), torch.bfloat16)
    {call}
    return (buf0, )
"""


def program(text: str) -> Program:
    return evaluate.build(wrapper_code.read_module(text, "test"))


COPY = "tmp0 = tl.load(in_ptr0 + (x0 + 64*x1), xmask)\ntl.store(out_ptr0 + (xindex), tmp0, xmask)"


# ---- sizes and indices


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_expressions_are_evaluated(rows: int, by: int) -> None:
    for text, expected in (
        ("s0*7168", rows * 7168), ("(-4)*(s0 // (-4))", -4 * (rows // -4)), ("s0**2", rows**2),
        (f"s0 // {by} + s0 % {by}", rows // by + rows % by), ("max(1, s0)", max(1, rows)),
        ("(s0 + 3)//4*4", (rows + 3) // 4 * 4),
    ):  # fmt: skip
        assert sizes.evaluate(ast.parse(text, mode="eval").body, {"s0": rows}) == expected


@pytest.mark.parametrize(
    "text", ["s1", "1/0", "9**9**9", "10**9*10**9*10**9", "f(1)", "'a'", "True", "1 << 999", "[1]"]
)
def test_what_is_no_size_has_no_value(text: str) -> None:
    with pytest.raises(sizes.UnknownSize):
        sizes.evaluate(ast.parse(text, mode="eval").body, {})


@given(st.data())
def test_distinct_counts_what_a_loop_would(data: st.DataObject) -> None:
    """Against counting: every value of the loop, the digits that it has there, and how many combinations differ."""
    radices = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    edges = [1]
    for radix in radices:
        edges.append(edges[-1] * radix)
    low = st.integers(0, len(edges) - 2)
    pairs = data.draw(
        st.lists(low.flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, len(edges) - 1))), max_size=3)
    )
    digits = [Digit("x", edges[a], edges[b]) for a, b in pairs]
    seen = {tuple(n // d.low % (d.high // d.low) for d in digits) for n in range(edges[-1])}
    assert distinct(digits) == len(seen)


def test_bounds_limit_what_counts() -> None:
    x = Digit("x", 1, 64)
    assert distinct([x, Digit("x", 64, 4096)], [Bound(x, 0, 32)]) == 32 * 64
    assert distinct([Digit("x", 64, 4096)], [Bound(x, 0, 32)]) == 64, "a bound on what is not in the index"
    assert distinct([x], [Bound(x, 16, 80)]) == 48


# ---- kernels


STORE = "tl.store(out_ptr0 + (xindex), tmp0, xmask)"
MOVES = {
    "the same place": (COPY, "same"),
    "the same place, written otherwise": (
        "tmp0 = tl.load(in_ptr0 + (xindex), xmask)\ntl.store(out_ptr0 + (x0 + 64*x1), tmp0, xmask)",
        "same",
    ),
    "a transpose": (f"tmp0 = tl.load(in_ptr0 + (x1 + 64*x0), xmask)\n{STORE}", "layout"),
    "a broadcast": (f"tmp0 = tl.load(in_ptr0 + (x0), xmask)\n{STORE}", None),
    "a flip": (f"tmp0 = tl.load(in_ptr0 + (63 + (-1)*x0 + 64*x1), xmask)\n{STORE}", None),
    "overlapping windows": (f"tmp0 = tl.load(in_ptr0 + (x0 + x1), xmask)\n{STORE}", None),
    "a roll": (f"tmp0 = tl.load(in_ptr0 + (((x0 + 3) % 64) + 64*x1), xmask)\n{STORE}", None),
    "arithmetic": (f"tmp1 = tl.load(in_ptr0 + (xindex), xmask)\ntmp0 = tmp1 * 2\n{STORE}", None),
    "a part": (f"tmp0 = tl.load(in_ptr0 + (xindex), (x0 < 32) & xmask, other=0.0)\n{STORE}", None),
    "an addition in memory": (COPY.replace("tl.store", "tl.atomic_add"), None),
}


@pytest.mark.parametrize("name", MOVES)
def test_copies_are_told_from_work(name: str) -> None:
    body, kind = MOVES[name]
    (kernel,) = program(module(body)).kernels
    assert [copy.kind for copy in kernel.copies] == ([kind] if kind else [])


def test_loads_under_a_condition_count_what_it_lets_through() -> None:
    (kernel,) = program(
        module("tmp0 = tl.load(in_ptr0 + (xindex), (x0 < 32) & xmask, other=0.0)\ntmp1 = tmp0 + 1")
    ).kernels
    assert kernel.bytes_read == 64 * 32 * 2


def test_passes_over_a_row_are_counted() -> None:
    loop = "for r0_offset in tl.range(0, r0_numel, R0_BLOCK):\n    tmp0 = tl.load(in_ptr0 + (xindex), xmask)\n"
    (kernel,) = program(module(loop + loop + "tl.store(out_ptr0 + (xindex), tmp0, xmask)")).kernels
    assert [(access.bytes, access.loads) for access in kernel.reads] == [(4096 * 2, 2)]


def bytes_moved(text: str) -> list[tuple[str, int, int]]:
    return [(launch.name, launch.bytes_read, launch.bytes_written) for launch in program(text).launches]


ASSERTED = "assert_size_stride(arg0_1, (64, 64), (64, 1))"


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
    larger = evaluate.build(wrapper_code.read_module(text, "test"), {"s0": 128})
    assert [launch.bytes_read for launch in larger.launches] == [16384]


SHARED_BODY = """
@triton_heuristics.foreach(
    num_warps=8,
    triton_meta={'signature': {'in_ptr0': '*bf16', 'in_ptr1': '*bf16', 'out_ptr0': '*bf16', 'out_ptr1': '*bf16'}},
    inductor_meta={'mutated_arg_names': []},
)
@triton.jit
def triton_for_fused_0(in_ptr0, in_ptr1, out_ptr0, out_ptr1):
    pid = tl.program_id(0)
    XBLOCK: tl.constexpr = 1024
    num_xblocks_0 = tl.cdiv(64, XBLOCK)
    num_xblocks_1 = num_xblocks_0 + tl.cdiv(128, XBLOCK)
    if pid < num_xblocks_0:
        pid_offset = pid
        xnumel = 64
        foreach_arg0 = in_ptr0
        foreach_arg1 = out_ptr0
    elif pid < num_xblocks_1:
        pid_offset = pid - num_xblocks_0
        xnumel = 128
        foreach_arg0 = in_ptr1
        foreach_arg1 = out_ptr1
    else:
        pid_offset = 0
        xnumel = 0
        foreach_arg0 = in_ptr0
        foreach_arg1 = out_ptr0
    xoffset = pid_offset * XBLOCK
    xindex = xoffset + tl.arange(0, XBLOCK)[:]
    xmask = xindex < xnumel
    x0 = xindex
    tmp0 = tl.load(foreach_arg0 + (x0), xmask).to(tl.float32)
    tl.store(foreach_arg1 + (x0), tmp0 * 2, xmask)
"""


def test_kernels_of_a_foreach_that_share_one_body() -> None:
    """As torch 2.14 writes them."""
    uses = kernel_code.read_uses(kernel_code.read_kernel(SHARED_BODY), {})
    assert [(site.pointer, distinct(site.index.digits, site.bounds)) for site in uses.loads] == [
        ("in_ptr0", 64), ("in_ptr1", 128),
    ]  # fmt: skip
    assert [(s.site.pointer, distinct(s.site.index.digits, s.site.bounds)) for s in uses.stores] == [
        ("out_ptr0", 64), ("out_ptr1", 128),
    ]  # fmt: skip


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


@pytest.mark.parametrize(("data", "reason"), [(b"\x7fELF\0\0", "binary"), (b"\xff\xfeasync_compile", "not UTF-8")])
def test_binary_files_are_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_bytes(data)
    with pytest.raises(Unusable, match=reason):
        audit_path(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    text = ON.read_text()
    end = text.index("return (buf44")
    cuts = [int(end * part) for part in (0.3, 0.6, 0.9)]  # in the first docstring, in a kernel, in call()
    for cut in [*cuts, text.rindex("\n", 0, cuts[-1]), end]:
        path = tmp_path / "cut.py"
        path.write_text(text[:cut])
        with pytest.raises(Unusable, match=r"cut\.py: (cannot be parsed as Python|no call\(\) function|.*cut short)"):
            audit_path(path)


def test_an_unknown_size_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="no size called s1 in the code; its symbolic sizes are s72"):
        audit_path(ON, sizes={"s1": 4})
    with pytest.raises(ValueError, match="it has no symbolic sizes"):
        audit_path(SEEDS / "conv.py", sizes={"s1": 4})


def test_sizes_may_be_given_by_name() -> None:
    assert audit_path(ON, sizes={"s72": 5})[0].programs[0].sizes == {"s72": 5}


# ---- where code is found


def test_a_directory_with_unreadable_files_reports_them_and_audits_the_rest(tmp_path: Path) -> None:
    for folder in ("ab", "cd", "ef"):
        (tmp_path / folder).mkdir()
    (tmp_path / "ab" / "good.py").write_text(ON.read_text())
    (tmp_path / "ab" / "other.py").write_text("print('not generated')\n")
    (tmp_path / "ab" / "kernel.cubin").write_bytes(b"\0\1\2")
    (tmp_path / "cd" / "cut.py").write_text(ON.read_text()[:30_000])
    (tmp_path / "cd" / "binary.py").write_bytes(b"\0async_compile")
    (tmp_path / "ef" / "looped.py").symlink_to(tmp_path / "ef" / "looped.py")
    (report,) = audit_path(tmp_path, rows=(64,))
    assert len(report.programs) == 1 and report.programs[0].name.endswith("good.py")
    skipped = {Path(name).name: reason for name, reason in report.skipped}
    assert set(skipped) == {"cut.py", "binary.py", "looped.py"}
    assert "binary" in skipped["binary.py"]


def test_a_folder_without_generated_code_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "artifact.bin").write_bytes(b"\x80\x04pickle")
    with pytest.raises(Unusable, match="TORCH_LOGS=output_code"):
        audit_path(tmp_path)
    with pytest.raises(Unusable, match="no such file or directory"):
        audit_path(tmp_path / "nowhere")


@pytest.mark.parametrize("prefixed", [True, False], ids=["every line prefixed", "first line prefixed"])
def test_a_log_of_output_code(tmp_path: Path, prefixed: bool) -> None:
    prefix = "V0610 10:11:12.123000 4242 torch/_inductor/graph.py:2104] [0/0] [__output_code] "
    lines = ["I0610 10:11:11.000000 4242 torch/other.py:1] something else"]
    for name in ("conv.py", "user.py"):
        code = ["Output code: ", *(SEEDS / name).read_text().splitlines()]
        lines += [prefix + line if prefixed or index == 0 else line for index, line in enumerate(code)]
        lines.append(prefix + "Output code written to: /tmp/x.py")
    path = tmp_path / "run.log"
    path.write_text("\n".join(lines))
    (report,) = audit_path(path)
    assert len(report.programs) == 2 and not report.skipped
    direct = [audit_path(SEEDS / name)[0].bytes for name in ("conv.py", "user.py")]
    assert [p.bytes for p in report.programs] == direct
    path.write_text(lines[0] + "\n" + prefix)
    with pytest.raises(Unusable, match="log without generated code"):
        code_files.find(path)


def test_several_programs_are_one_report() -> None:
    (report,) = audit_path(SEEDS)
    assert len(report.programs) == len(list(SEEDS.glob("*.py")))
    assert report.bytes == sum(p.bytes for p in report.programs)


# ---- size


def test_ten_megabytes_in_under_ten_seconds_and_a_gigabyte(tmp_path: Path) -> None:
    """As many layers as fill 10 MB, with every kernel's text its own, as a compile cache has them."""
    layer, total = ON.read_text(), 0
    for number in range(10_000):
        text = layer.replace("_fused_", f"_fused_layer{number}_")
        (tmp_path / f"layer{number}.py").write_text(text)
        total += len(text)
        if total >= 10_000_000:
            break
    began = time.perf_counter()
    (report,) = audit_path(tmp_path, rows=(64,))
    spent = time.perf_counter() - began
    assert len(report.programs) == number + 1 and spent < 10, f"{spent:.1f} s"


def test_one_file_of_ten_megabytes(tmp_path: Path) -> None:
    kernels, calls = [], []
    kernel = KERNEL.replace("BODY", "\n    ".join(COPY.splitlines()) + "\n    # " + "x" * 1400)
    for number in range(5_000):
        name = f"triton_poi_fused_{number}"
        text = kernel.replace("triton_poi_fused_0", name)
        kernels.append(f"{name} = async_compile.triton('{name}', '''{text}''', device_str='cuda')\n")
        calls.append(f"    {name}.run(arg0_1, buf0, 4096, stream=stream0)\n")
    head, tail = module(COPY).split("def call(args):")
    body = tail.replace("    triton_poi_fused_0.run(arg0_1, buf0, 4096, stream=stream0)\n", "".join(calls))
    path = tmp_path / "large.py"
    path.write_text(head + "".join(kernels) + "def call(args):" + body)
    assert path.stat().st_size > 10_000_000
    code = (
        "import json, sys, time\nfrom normquant.audit.on_disk import audit_path\nbegan = time.perf_counter()\n"
        "(report,) = audit_path(sys.argv[1])\nspent = time.perf_counter() - began\n"
        # not ru_maxrss: a child's begins at what its parent, the test run, has used
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(json.dumps([len(report.kernels), spent, int(peak)]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    kernels_read, spent, peak_kib = json.loads(done.stdout)
    assert kernels_read == 5_000 and spent < 10 and peak_kib < 1 << 20, (spent, peak_kib)


def test_more_launches_than_any_program_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper_code, "_MOST_CALLS", 100)
    call = "triton_poi_fused_0.run(arg0_1, buf0, 4096, stream=stream0)"
    assert len(program(module(COPY, "\n    ".join([call] * 100))).launches) == 100
    with pytest.raises(NotGenerated, match="more than 100 launches"):
        wrapper_code.read_module(module(COPY, "\n    ".join([call] * 101)), "too many")


def test_reports_are_plain_data() -> None:
    (report,) = audit_path(ON, rows=(64,))
    data = json.loads(report.to_json())
    assert set(data) >= {"kernels", "extern", "findings", "bytes", "wasted_bytes"}
    assert set(data["kernels"][0]) >= {"name", "kind", "file", "bytes_read", "bytes_written", "reads", "writes"}
    assert set(data["findings"][0]) >= {"rule", "kernel", "bytes", "est_us", "message", "fix"}
    assert {"name": "_C.rms_norm_per_block_quant", "count": 3} in data["extern"]
    assert on_disk.reports([wrapper_code.read_module(ON.read_text(), "x")], "", "h100", (64,))[0].bytes == data["bytes"]
