"""Every rule: on a graph that has what it looks for, and on the nearest graph that has not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.clean_graphs import BF16, F32, empty, quantize, rms_norm

from normquant.audit import audit, rules
from normquant.audit.program import COPY_SAME, Access, Buffer, Copy, Extern, Kernel, Launch, Program, View
from normquant.audit.result import AuditReport
from normquant.audit.rules import RULE_IDS, RULES
from normquant.audit.targets import TARGETS

M, K = 64, 1024
DOCS = Path(__file__).parents[2] / "docs" / "rules"


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """Opaque operators: one that reads rows, one that writes in place, one whose name says that it is row-wise."""
    library = torch.library.Library("opaque_ops", "FRAGMENT")
    library.define("attend(Tensor x) -> Tensor")
    library.define("norm_(Tensor(a!) x) -> ()")
    library.define("group_quant(Tensor x) -> Tensor")
    torch.library.impl(library, "attend", "Meta")(torch.empty_like)
    torch.library.impl(library, "norm_", "Meta")(lambda x: None)
    torch.library.impl(library, "group_quant", "Meta")(lambda x: torch.empty_like(x, dtype=torch.float8_e4m3fn))
    yield
    library._destroy()


def attend(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.opaque_ops.attend(x)


def rows() -> tuple[torch.Tensor, ...]:
    return (empty(M, K),)


def found(report: AuditReport, rule: str) -> list[tuple[str, int]]:
    return [(finding.kernel, finding.bytes) for finding in report.findings if finding.rule == rule]


class Identity(torch._inductor.custom_graph_pass.CustomGraphPass):
    """A rewrite that leaves a needless copy in front of an opaque operator, as pattern passes do."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.opaque_ops.attend.default):
            source = node.args[0]
            with graph.inserting_before(node):
                copy = graph.call_function(torch.ops.prims.convert_element_type.default, (source, torch.float32))
                copy.meta["val"] = source.meta["val"].float()
                back = graph.call_function(torch.ops.prims.convert_element_type.default, (copy, BF16))
                back.meta["val"] = source.meta["val"]
            node.replace_input_with(source, back)

    def uuid(self) -> None:
        return None


def test_identity_is_found_after_a_rewrite_that_left_one() -> None:
    report = audit(attend, rows, options={"post_grad_custom_post_pass": Identity()})
    (kernel,) = report.kernels
    assert found(report, "identity") == [(kernel.name, 2 * M * K * 2)]
    assert found(report, "cast-round-trip") == [(kernel.name, 2 * M * K * 2)]
    (finding,) = [f for f in report.findings if f.rule == "identity"]
    assert "through bfloat16 -> float32 -> bfloat16" in finding.message
    assert report.wasted_bytes == 2 * M * K * 2, "a launch with two findings is wasted once"
    assert report.count("identity") == 1 and audit(attend, rows).count("identity") == 0


@pytest.mark.parametrize(
    "copy",
    [lambda x: attend(x * 2).clone(), lambda x: (attend(x), x.clone()), lambda x: x.copy_(attend(x))],
    ids=["a result of its own", "a copy that is returned", "an update of an input"],
)
def test_copies_that_the_program_asks_for_are_no_finding(copy: Any) -> None:
    report = audit(copy, rows)
    assert [f for f in report.findings if f.severity == "error"] == []


def test_layout_copy() -> None:
    report = audit(lambda x: attend(attend(x).t().contiguous()), rows)
    (kernel,) = report.kernels
    assert found(report, "layout-copy") == [(kernel.name, 2 * M * K * 2)]
    packed = audit(lambda x: attend(attend(x)[:, :256].contiguous()), rows)
    assert found(packed, "layout-copy") == [(packed.kernels[0].name, 2 * M * 256 * 2)]
    assert audit(lambda x: attend(attend(x).t().contiguous() * 2), rows).count("layout-copy") == 0


@pytest.mark.parametrize("moved", ["flip", "expand", "roll", "gather"])
def test_other_moves_are_no_layout_copy(moved: str) -> None:
    moves = {
        "flip": lambda x: x.flip(-1),
        "expand": lambda x: x[:, None].expand(-1, 4, -1).contiguous(),
        "roll": lambda x: x.roll(3, -1),
        "gather": lambda x: x[x[:, 0].long()],
    }
    report = audit(lambda x: attend(moves[moved](attend(x))), rows)
    assert report.kernels and report.count("layout-copy") == report.count("identity") == 0


def test_the_kernel_of_the_regression_bf16_to_fp32_to_bf16_with_a_permute() -> None:
    """vLLM #37832: a kernel that converts and permutes, between two opaque calls."""
    report = audit(lambda x: attend(attend(x).float().t().contiguous().to(BF16)), rows)
    (kernel,) = report.kernels
    assert found(report, "layout-copy") == found(report, "cast-round-trip") == [(kernel.name, 2 * M * K * 2)]


def test_a_rounding_is_no_identity_if_the_code_rounds() -> None:
    """Inductor drops fp32 -> bf16 -> fp32 unless it is told to keep it: the kernel that is left is a plain copy."""

    def round_to_bf16(x: torch.Tensor) -> torch.Tensor:
        return attend(attend(x).to(BF16).float())

    def inputs() -> tuple[torch.Tensor, ...]:
        return (empty(M, K, dtype=F32),)

    assert audit(round_to_bf16, inputs).count("identity") == 1
    kept = audit(round_to_bf16, inputs, options={"emulate_precision_casts": True})
    assert kept.kernels and kept.count("identity") == kept.count("cast-round-trip") == 0


def test_mutated_input_copy() -> None:
    def in_place(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        torch.ops.opaque_ops.norm_(y)
        return attend(y)

    report = audit(in_place, rows)
    (kernel,) = report.kernels
    assert found(report, "mutated-input-copy") == [(kernel.name, 2 * M * K * 2)]
    assert "opaque_ops.norm_" in report.findings[0].message and report.count("identity") == 0


def test_opaque_boundary() -> None:
    def quantized(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.ops.opaque_ops.group_quant(rms_norm(x, w))

    def inputs() -> tuple[torch.Tensor, ...]:
        return empty(M, K), empty(K)

    report = audit(quantized, inputs)
    assert found(report, "opaque-boundary") == [("opaque_ops.group_quant", 2 * M * K * 2)]
    kept = audit(lambda x, w: (torch.ops.opaque_ops.group_quant(y := rms_norm(x, w)), y), inputs)
    assert found(kept, "opaque-boundary") == [("opaque_ops.group_quant", M * K * 2)], "the norm is needed anyway"
    fused = audit(lambda x, w: quantize(rms_norm(x, w)), inputs)
    assert fused.count("opaque-boundary") == 0
    assert audit(lambda x, w: attend(rms_norm(x, w)), inputs).count("opaque-boundary") == 0, "not row-wise by its name"


def test_unfused_neighbours_say_why() -> None:
    def norm_then_quantize(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantize(rms_norm(x + r, w))

    report = audit(norm_then_quantize, lambda: (empty(M, 7168), empty(M, 7168), empty(7168)))
    (finding,) = [f for f in report.findings if f.rule == "unfused-neighbours"]
    assert "Inductor did not fuse them: numel/rnumel mismatch" in finding.message
    assert finding.bytes == 2 * M * 4  # the mean of the squares, there and back; both read the inputs: see reread
    assert audit(lambda x: x.float().sum(0), lambda: (empty(4096, 1024),)).count("unfused-neighbours") == 0


def test_reread() -> None:
    looped = audit(lambda x: x.softmax(-1), lambda: (empty(M, 5000),))
    assert found(looped, "reread") == [(looped.kernels[0].name, M * 5000 * 2)]
    assert looped.wasted_bytes == 0, "the second pass may be in the cache: a note"
    assert audit(lambda x: x.softmax(-1), rows).count("reread") == 0, "a row that fits is loaded once"


# ---- on programs made by hand


def buffer(name: str, dtype: str = "bfloat16", role: str = "intermediate") -> Buffer:
    size = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}[dtype]
    return Buffer(name, dtype, (str(M), str(K)), (str(K), "1"), M * K * size, role, name)


def program(*launches: Launch, outputs: tuple[str, ...] = ("out",), **dtypes: str) -> Program:
    names = {a.buffer for launch in launches for a in (*launch.reads, *launch.writes)}
    buffers = {n: buffer(n, dtypes.get(n, "bfloat16"), "input" if n.startswith("x") else "intermediate") for n in names}
    return Program(launches, buffers, outputs)


def kernel(position: int, reads: dict[str, int], writes: dict[str, int], **more: Any) -> Kernel:
    accesses = [tuple(Access(name, size) for name, size in side.items()) for side in (reads, writes)]
    return Kernel(position, f"triton_{position}", *accesses, rows="s0", **more)


def check(*programs: Program) -> dict[str, list[tuple[str, int]]]:
    by_rule: dict[str, list[tuple[str, int]]] = {}
    for finding in rules.check(programs, TARGETS["h100"]):
        by_rule.setdefault(finding.rule, []).append((finding.kernel, finding.bytes))
    return by_rule


def cast(position: int, source: str, target: str, dtypes: tuple[str, ...], sizes: tuple[int, int]) -> Kernel:
    copy = Copy(source, target, COPY_SAME, dtypes)
    return kernel(position, {source: sizes[0]}, {target: sizes[1]}, copies=(copy,), is_copy=True)


def test_cast_round_trip_across_two_kernels() -> None:
    n = M * K
    there = cast(0, "x", "wide", ("bfloat16", "float32"), (2 * n, 4 * n))
    back = cast(1, "wide", "out", ("float32", "bfloat16"), (4 * n, 2 * n))
    assert check(program(there, back, wide="float32"))["cast-round-trip"] == [("triton_1", 12 * n)]
    rounding = cast(0, "x", "narrow", ("float32", "bfloat16"), (4 * n, 2 * n))
    widening = cast(1, "narrow", "out", ("bfloat16", "float32"), (2 * n, 4 * n))
    assert "cast-round-trip" not in check(program(rounding, widening, x="float32", out="float32"))


def test_fp32_spill() -> None:
    n = M * K
    first = kernel(0, {"x": 2 * n}, {"wide": 4 * n})
    second = kernel(1, {"wide": 4 * n}, {"out": 2 * n})
    assert check(program(first, second, wide="float32"))["fp32-spill"] == [("triton_0", 4 * n)]
    assert "fp32-spill" not in check(program(first, second, wide="float32", outputs=("out", "wide"))), "it is a result"
    statistics = kernel(0, {"x": 2 * n}, {"mean": 4 * M})
    assert "fp32-spill" not in check(program(statistics, kernel(1, {"mean": 4 * M}, {"out": 2 * n}), mean="float32"))


def test_reread_by_neighbours_but_not_across_an_opaque_call() -> None:
    n = M * K
    first, second = kernel(0, {"x": 2 * n}, {"a": 2 * n}), kernel(1, {"x": 2 * n}, {"out": 2 * n})
    assert check(program(first, second))["reread"] == [("triton_1", 2 * n)]
    gemm = Extern(1, "aten.mm", (Access("a", 2 * n),), (Access("b", 2 * n),))
    add = kernel(2, {"x": 2 * n, "b": 2 * n}, {"out": 2 * n})
    assert "reread" not in check(program(first, gemm, add)), "the second needs what the call makes of the first"


def call(position: int, name: str, *arguments: str, view: View | None = None) -> Extern:
    views = {1: view} if view else {}
    return Extern(position, name, (Access("x", 8),), (Access("out", 8),), arguments=arguments, views=views)


ROUNDED = ("x", "q", "s", "128", "1e-10", "-448.0", "448.0", "True", "True", "True")
PLAIN = (*ROUNDED[:7], "False", "True", "True")


def test_dropped_ue8m0_within_and_beside_a_program() -> None:
    rounds, drops = (call(i, "_C.per_token_group_fp8_quant", *a) for i, a in enumerate((ROUNDED, PLAIN)))
    fused = call(0, "_C.rms_norm_per_block_quant", "q", "x", "w", "s", "1e-06", "None", "None", "128", "True")
    assert check(program(rounds, drops))["dropped-ue8m0"] == [(drops.name, 0)]
    assert check(program(fused), program(rounds))["dropped-ue8m0"] == [(fused.name, 0)], "another part rounds"
    assert "dropped-ue8m0" not in check(program(fused, drops)), "nobody rounds"
    assert "dropped-ue8m0" not in check(program(rounds, call(1, "normquant.rms_norm_quant", "x", "'ue8m0'")))
    assert "dropped-ue8m0" not in check(program(rounds, call(1, "normquant.rope_last", "x", "'fp32'"))), "no scales"


@pytest.mark.parametrize(
    ("shape", "stride", "finds"),
    [
        (("s0", "56"), ("1", "s0"), True),
        (("s0", "56"), ("1", "4*((s0 + 3)//4)"), False),
        (("s0", "56"), ("1", "(-4)*(s0 // (-4))"), False),
        (("s0", "56"), ("56", "1"), True),
        (("64", "56"), ("1", "64"), False),
        (("66", "56"), ("1", "66"), True),
        (("s0", "1"), ("1", "s0"), False),
    ],
)
def test_misaligned_scales(shape: tuple[str, ...], stride: tuple[str, ...], finds: bool) -> None:
    gemm = call(0, "vllm.fp8_gemm_nt_op", "q", "s", view=View("x", shape, stride))
    assert ("misaligned-scales" in check(program(gemm))) is finds


# ---- all rules


def test_every_rule_has_a_page_that_names_it_and_an_id_of_its_own() -> None:
    assert len(set(RULE_IDS)) == len(RULES) == 10
    pages = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    assert set(pages) == {*RULE_IDS, "README"}
    for rule in RULES:
        page = pages[rule.id]
        assert page.startswith(f"# {rule.id}\n") and rule.severity in page
        assert "## What to do" in page and "## When it is fine" in page
        assert f"({rule.id}.md)" in pages["README"]


def test_times_follow_bytes_and_launches() -> None:
    n = M * K
    there = cast(0, "x", "wide", ("bfloat16", "float32"), (2 * n, 4 * n))
    back = cast(1, "wide", "out", ("float32", "bfloat16"), (4 * n, 2 * n))
    target = TARGETS["h100"]
    (finding,) = [f for f in rules.check([program(there, back, wide="float32")], target) if f.rule == "cast-round-trip"]
    assert finding.est_us == pytest.approx(2 * target.launch_us + 12 * n / (target.dram_gbps * 1e3))
    assert finding.share == pytest.approx(1.0)
