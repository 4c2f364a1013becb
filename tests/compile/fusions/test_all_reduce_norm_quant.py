"""Which all-reduces are taken, which stay and why, and what is left of the graph. Values: distributed/test_compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from shared import traced_graphs, vllm_fused_stand_ins, vllm_ops
from shared.failing_steps import Steps
from shared.fake_group import fake_group
from torch.fx import Graph, Node

import normquant as nq
from normquant import QuantSpec, inductor_options
from normquant.compile import FusionReport, driver
from normquant.compile.fusions.all_reduce_norm_quant import AllReduceNormQuant
from normquant.compile.fusions.vllm_linear import QuantizedInputs
from normquant.compile.policy import Facts, Rules
from normquant.distributed import close_workspace, open_at_first_call, open_workspace
from normquant.distributed.group_facts import GroupFacts
from normquant.ops import _group_calls
from normquant.vllm.tensor_parallel import LEFT, NormQuantBesideVllm

stand_ins = vllm_fused_stand_ins  # imported for the operations that it defines
BF, K, M = torch.bfloat16, 256, 4
NORM, NEXT = (torch.nn.RMSNorm(K, dtype=BF) for _ in range(2))
WEIGHT = torch.randn(K, K, generator=torch.Generator().manual_seed(0)).to(BF) / 16
X, RESIDUAL = (torch.randn(M, K, generator=torch.Generator().manual_seed(i)).to(BF) for i in (1, 2))


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[dist.ProcessGroup]:
    with fake_group() as made:
        yield made


def product(x: torch.Tensor) -> torch.Tensor:
    return x @ WEIGHT.t()


def group_quant(y: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    made = nq.group_quant(y, **settings)
    return made.data, made.scale


def summed(x: torch.Tensor, op: str = "sum") -> torch.Tensor:
    return funcol.all_reduce(product(x), op, dist.group.WORLD)


def rewritten(
    fn: Callable[..., Any], *args: torch.Tensor, policy: Any = "always", fusions: Any = driver.ALL_REDUCE_FUSIONS
) -> tuple[FusionReport, Graph]:
    """What the pass makes of the graph of a function."""
    gm, _ = traced_graphs.traced(fn, *(args or (X, RESIDUAL)))
    rules = policy if isinstance(policy, Rules) else Rules(policy)
    report = driver.run(gm.graph, rules, strict=True, fusions=fusions)
    gm.graph.lint()
    return report, gm.graph


def calls(graph: Graph, *names: str) -> list[Node]:
    wanted = names or ("normquant", "_c10d_functional", "vllm")
    return [n for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace in wanted]


def called(graph: Graph, *names: str) -> list[str]:
    return [node.target._opname for node in calls(graph, *names)]


def quantized(x, residual):
    h = summed(x) + residual
    return *group_quant(NORM(h)), h


def quantized_without_residual(x, residual):
    h = summed(x)
    return *group_quant(NORM(h)), h + residual


def routed(x, residual):
    y = NORM(residual + summed(x))
    return *group_quant(y), y


def lone(x, residual):
    h = summed(x) + residual
    return NORM(h), h


def lone_without_residual(x, residual):
    return NORM(summed(x))


def in_place(x, residual):
    y = product(x)
    dist.all_reduce(y)
    return *group_quant(NORM(y + residual)), y.shape[0]


def several_dimensions(x, residual):
    h = summed(x.view(2, 2, K)) + residual.view(2, 2, K)
    return group_quant(NORM(h))[0], h


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (quantized, "all_reduce_add_rms_norm_quant"),
        (quantized_without_residual, "all_reduce_rms_norm_quant"),
        (routed, "all_reduce_add_rms_norm_quant_with_norm"),
        (lone, "all_reduce_add_rms_norm"),
        (lone_without_residual, "all_reduce_rms_norm"),
        (in_place, "all_reduce_add_rms_norm_quant"),
        (several_dimensions, "all_reduce_add_rms_norm_quant"),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_site_is_one_op_and_nothing_of_it_is_left(fn: Any, op: str, dynamic: bool) -> None:
    x, residual = X.clone(), RESIDUAL.clone()
    if dynamic and fn is not several_dimensions:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(residual, 0)
    report, graph = rewritten(fn, x, residual)
    (site,) = report.sites
    assert site.fused and site.op == op and report.others == (), report
    assert called(graph) == [op]


PASS = "post_grad_custom_pre_pass"


def test_without_the_option_the_collective_stays() -> None:
    report, graph = rewritten(quantized, fusions=driver.FUSIONS)
    assert [site.op for site in report.sites] == ["add_rms_norm_quant"] and report.others == ()
    assert called(graph) == ["all_reduce", "wait_tensor", "add_rms_norm_quant"]
    assert inductor_options()[PASS] != inductor_options(all_reduce=True)[PASS]
    assert inductor_options(all_reduce=True)[PASS] == inductor_options(all_reduce=True)[PASS]


def averaged(x, residual):
    return NORM(summed(x, "avg") + residual)


def read_before(x, residual):
    total = summed(x)
    return NORM(total + residual), total * 2


def twice_added(x, residual):
    total = summed(x)
    return NORM(total + residual), total + residual * 2


def in_float32(x, residual):
    return NORM((funcol.all_reduce(product(x).float(), "sum", dist.group.WORLD)).to(BF) + residual)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (averaged, "its operation is 'avg'"),
        (read_before, "also read by aten.mul"),
        (twice_added, "also read by aten.add"),
    ],
)
def test_what_cannot_be_taken_stays_with_the_reason(fn: Any, reason: str) -> None:
    report, graph = rewritten(fn)
    (site,) = report.others
    assert reason in site.reason and site.reason.startswith("the all-reduce in front of it stays"), site
    assert called(graph, "_c10d_functional") == ["all_reduce", "wait_tensor"] and not called(graph, "normquant")


def test_a_sum_in_another_dtype_is_no_site() -> None:
    report, graph = rewritten(in_float32)
    assert called(graph) == ["all_reduce", "wait_tensor"] and not report.sites


def test_the_rest_is_fused_where_the_all_reduce_stays() -> None:
    report, graph = rewritten(quantized, policy=Rules("always", {"nothing": "never"}), fusions=off("told so"))
    assert [site.op for site in report.sites] == ["add_rms_norm_quant"]
    assert report.others[0].reason == "the all-reduce in front of it stays: told so"
    assert called(graph) == ["all_reduce", "wait_tensor", "add_rms_norm_quant"]


def off(reason: str) -> tuple[Any, ...]:
    return AllReduceNormQuant(off=reason), *driver.FUSIONS


def test_a_group_without_a_workspace_is_left(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    with_one = AllReduceNormQuant().identity()
    close_workspace(group)
    try:
        assert AllReduceNormQuant().identity() != with_one  # a compile cache must not serve the other graph
        report, graph = rewritten(quantized)
        assert "has no workspace; call normquant.distributed.open_workspace" in report.others[0].reason
        assert "all_reduce" in called(graph)
        monkeypatch.setattr(_group_calls, "at_first_call", None)
        monkeypatch.setattr("normquant.distributed.first_call._rows", None)
        open_at_first_call(64)
        assert rewritten(quantized)[0].sites[0].op == "all_reduce_add_rms_norm_quant"
    finally:
        open_workspace(group, K)


def test_a_subgroup_has_a_workspace_of_its_own(group: dist.ProcessGroup) -> None:
    other = dist.new_group([0, 1])

    def fn(x, residual):
        return NORM(funcol.all_reduce(product(x), "sum", other) + residual)

    report, _ = rewritten(fn)
    assert f"group {other.group_name!r} has no workspace" in report.others[0].reason


def test_coalesced_tensors_are_taken_one_by_one() -> None:
    def fn(x, residual):
        a, b, c = funcol.all_reduce_coalesced([product(x), product(2 * x), product(3 * x)], "sum", dist.group.WORLD)
        return NORM(a + residual), b, NEXT(c + residual)

    report, graph = rewritten(fn)
    assert [site.op for site in report.sites] == ["all_reduce_add_rms_norm"] * 2
    (left,) = [node for node in calls(graph) if node.target._opname == "all_reduce_coalesced"]
    assert len(left.args[0]) == 1 and called(graph).count("wait_tensor") == 1


def chained(x, residual):
    h = summed(x) + residual
    for norm in (NORM, NEXT):
        data, _ = group_quant(norm(h))
        h = h + summed(data.to(BF))
    return NORM(h)


def test_a_residual_that_only_these_ops_read_stays_with_its_owners() -> None:
    _, graph = rewritten(chained)
    assert [node.args[-3] for node in calls(graph, "normquant")] == [True, True, True]


def test_a_step_that_fails_leaves_every_site_whole() -> None:
    gm, _ = traced_graphs.traced(chained, X, RESIDUAL)
    dry = Steps()
    with dry.watched():
        driver.run(traced_graphs.copied(gm).graph, Rules("always"), True, driver.ALL_REDUCE_FUSIONS)
    assert len(dry.taken) > 30
    for number in range(len(dry.taken)):
        copy, steps = traced_graphs.copied(gm), Steps(number, after=bool(number % 2))
        with steps.watched():
            report = driver.run(copy.graph, Rules("always"), False, driver.ALL_REDUCE_FUSIONS)
        copy.graph.lint()
        assert steps.failed and f"step {number}" in str(report)
        made = [name for name in called(copy.graph) if name.startswith("all_reduce")]
        assert len(made) == 3 and called(copy.graph).count("wait_tensor") == made.count("all_reduce")


def test_a_residual_that_something_else_reads_is_sent_to_all() -> None:
    def fn(x, residual):
        h = summed(x) + residual
        h = h + summed(group_quant(NORM(h))[0].to(BF))
        again = h + summed(group_quant(NEXT(h))[0].to(BF))
        return NORM(again), h

    _, graph = rewritten(fn)
    assert [node.args[-3] for node in calls(graph, "normquant")] == [False, False, True]


def test_a_norm_and_its_equal_are_one() -> None:
    def fn(x, residual):
        h = summed(x) + residual
        return *group_quant(NORM(h)), NORM(h)

    report, graph = rewritten(fn)
    assert called(graph) == ["all_reduce_add_rms_norm_quant_with_norm"] and len(report.sites) == 1


def test_two_quantizations_of_one_norm_leave_the_second_to_itself() -> None:
    def fn(x, residual):
        y = NORM(summed(x) + residual)
        return *group_quant(y), *group_quant(y, spec=QuantSpec(group=64))

    _, graph = rewritten(fn)
    assert called(graph) == ["all_reduce_add_rms_norm_quant_with_norm", "group_quant"]


@pytest.mark.parametrize(("policy", "reason"), [("auto", "no measurements on cpu"), ("never", "policy never")])
def test_a_policy_that_leaves_it_says_so(policy: str, reason: str) -> None:
    report, graph = rewritten(quantized, policy=policy)
    assert reason in report.others[0].reason and "all_reduce" in called(graph)


H100 = (9, 0)


@pytest.mark.parametrize(
    ("ranks", "capability", "k", "m", "reason"),
    [
        (4, H100, 7168, None, "measured: faster"),
        (8, H100, 7168, 64, "measured: faster"),
        (8, H100, 7168, 1024, "not known to be faster above 256 rows on 8 ranks"),
        (8, H100, 7168, None, "the number of rows is not known"),
        (3, H100, 7168, 4, "not measured on 3 ranks"),
        (4, (10, 0), 7168, 4, "not those that were measured"),
        (4, None, 7168, 4, "not those that were measured"),
        (2, H100, 2048, None, "measured: faster"),
        (4, H100, 5120, 2048, "measured: faster"),
        (4, H100, 6144, 4, "measured on 4 ranks for K = 2048, 4096, 5120, 7168, 8192 only, and this is 6144"),
        (8, H100, 4096, 4, "measured on 8 ranks for K = 7168 only, and this is 4096"),
    ],
)
def test_auto_goes_by_what_was_measured(ranks: int, capability: Any, k: int, m: Any, reason: str) -> None:
    facts = Facts(torch.device("cuda"), "all_reduce_rms_norm", m, k, False, group=GroupFacts("0", ranks, capability))
    decision = Rules("auto").decide("x", facts)
    assert reason in decision.reason and (decision.strategy == "fused") == reason.startswith("measured: ")
    apart = Facts(torch.device("cuda"), "x", m, k, False, group=GroupFacts("0", ranks, capability, "no peer access"))
    assert "no peer access" in Rules("auto").decide("x", apart).reason


def test_what_dtensors_are_traced_to_is_found(group: dist.ProcessGroup) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (torch.nn.Linear(K, K, bias=False, dtype=BF) for _ in range(2))
            self.norm = torch.nn.RMSNorm(K, dtype=BF)

        def forward(self, x):
            h = x + self.down(torch.relu(self.up(x)))
            return *group_quant(self.norm(h)), h

    block = Block()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    open_workspace(mesh.get_group(), K)
    report, graph = rewritten(block, X)
    assert [site.op for site in report.sites] == ["all_reduce_add_rms_norm_quant"]
    assert [site.name for site in report.sites] == ["norm"] and called(graph) == [report.sites[0].op]


torch.library.define("vllm::all_reduce", "(Tensor tensor, str group_name) -> Tensor")
torch.library.register_fake("vllm::all_reduce", lambda tensor, group_name: torch.empty_like(tensor))
torch.library.impl("vllm::all_reduce", "CPU")(lambda tensor, group_name: tensor.clone())


def vllm_layer(x, residual, quantize=vllm_ops.per_token_group_fp8_quant):
    y, h = torch.ops.vllm_ir.fused_add_rms_norm(
        torch.ops.vllm.all_reduce(product(x), group_name="tp:0"), residual, NORM.weight, 1e-6
    )
    return *quantize(y), y, h


def vllm_first_layer(x, residual):
    h = torch.ops.vllm.all_reduce(product(x), "tp:0")
    return *vllm_ops.per_token_group_fp8_quant(torch.ops.vllm_ir.rms_norm(h, NORM.weight, 1e-6)), h


def vllm_fusions(**settings: Any) -> tuple[Any, ...]:
    return AllReduceNormQuant({"tp:0": "0"}.__getitem__, **settings), *driver.VLLM_FUSIONS


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (vllm_layer, "all_reduce_add_rms_norm_quant_with_norm"),
        (vllm_first_layer, "all_reduce_rms_norm_quant"),
    ],
)
def test_vllms_words_are_known(fn: Any, op: str) -> None:
    report, graph = rewritten(fn, fusions=vllm_fusions())
    (site,) = report.sites
    assert site.op == op and site.fused
    assert called(graph) == [op] and calls(graph)[0].args[-2] == "0"  # torch's name of the group


def test_vllms_sites_stay_without_a_switch() -> None:
    report, graph = rewritten(vllm_layer, fusions=vllm_fusions(off="not measured in vLLM here"))
    assert [site.op for site in report.sites] == ["add_rms_norm_quant_with_norm"]
    assert "not measured in vLLM here" in report.others[0].reason
    assert called(graph) == ["all_reduce", "add_rms_norm_quant_with_norm"]


def test_a_linear_kernel_that_quantizes_inside_gets_what_the_op_quantizes() -> None:
    weight, scale = torch.zeros(K, K).to(torch.float8_e4m3fn), torch.ones(K // 128, K // 128)

    def fn(x, residual):
        total = torch.ops.vllm.all_reduce(product(x), "tp:0")
        y, h = torch.ops.vllm_ir.fused_add_rms_norm(total, residual, NORM.weight, 1e-6)
        return torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm(y, weight, scale, 128, True), h

    report, graph = rewritten(fn, fusions=(QuantizedInputs(), *vllm_fusions()))
    (site,) = report.sites
    assert site.op == "all_reduce_add_rms_norm_quant" and QuantSpec.decode(site.spec).few_rows == 32
    assert called(graph) == [site.op] and called(graph, "normquant_vllm") == ["block_fp8_linear"]


@pytest.mark.parametrize("products", ["always", "auto"])
def test_a_row_parallel_product_of_vllm_is_paired_where_that_is_asked_for(products: Any) -> None:
    weight, scale = torch.zeros(K, K).to(torch.float8_e4m3fn), torch.ones(K // 128, K // 128)

    def fn(x, residual):
        part = torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm(x, weight, scale, 128, True)
        total = torch.ops.vllm.all_reduce(part, "tp:0")
        y, h = torch.ops.vllm_ir.fused_add_rms_norm(total, residual, NORM.weight, 1e-6)
        return *vllm_ops.per_token_group_fp8_quant(y), h

    rules = Rules("always", products=products)
    _, graph = rewritten(fn, policy=rules, fusions=(QuantizedInputs(), *vllm_fusions()))
    _, *found = calls(graph, "normquant", "normquant_vllm")  # without the quantization of x
    reader = "all_reduce_add_rms_norm_quant"
    apart, paired = ["block_fp8_linear", reader], [f"block_fp8_linear_{reader}"]
    assert [node.target._opname for node in found] == (apart if products == "auto" else paired)
    assert products == "auto" or found[0].args[5:7] == ("always", "normquant_vllm::block_fp8_linear 32 1")


def test_a_norm_that_vllm_fuses_with_its_all_reduce_is_left_to_it() -> None:
    for fuses_later in (True, False):
        fusions = (AllReduceNormQuant(off="x"), NormQuantBesideVllm(partial(bool, fuses_later)))
        report, graph = rewritten(vllm_layer, fusions=fusions)
        assert [site.reason == LEFT for site in report.sites] == [fuses_later]
        assert bool(called(graph, "normquant")) is not fuses_later


torch.library.define(
    "vllm::flashinfer_trtllm_fused_allreduce_norm", "(Tensor(a!) allreduce_in, Tensor(b!) residual, Tensor w) -> ()"
)
torch.library.register_fake("vllm::flashinfer_trtllm_fused_allreduce_norm", lambda *args: None)
torch.library.impl("vllm::flashinfer_trtllm_fused_allreduce_norm", "CPU")(lambda *args: None)


def test_what_flashinfer_has_fused_is_told() -> None:
    def fn(x, residual):
        y, h = product(x), residual.clone()
        torch.ops.vllm.flashinfer_trtllm_fused_allreduce_norm(y, h, NORM.weight)
        return y, h

    report, _ = rewritten(fn, fusions=vllm_fusions(off="not measured in vLLM here"))
    assert [site.reason for site in report.others] == [
        "FlashInfer has its all-reduce and norm: not measured in vLLM here"
    ]
