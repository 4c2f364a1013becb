"""Which kernels a rewritten graph asks to be warmed up."""

import torch
from shared.products import factors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from normquant import QuantSpec
from normquant.compile.graph_warmup import kernels, warm_graph
from normquant.linear import PAIRS
from normquant.ops import OPS, Examples

SPEC = QuantSpec(layout="col_tma")
FP32 = torch.float32
EXAMPLES = Examples(
    4, 1536, "cpu", weight_dtype=FP32, weight_offset=1.0, latent=(256, 32), rope="half", limit=7.0, head_dim=256
)


def graph_of(*ops) -> Graph:
    """A graph with one call of each op on its example inputs, and a call of something else."""
    graph, mode = Graph(), FakeTensorMode()

    def argument(value):
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder("x")
        node.meta["val"] = mode.from_tensor(value)
        return node

    for op in ops:
        graph.call_function(op.overload, (*map(argument, op.example(EXAMPLES).values()), SPEC.encode()))
    graph.call_function(torch.ops.aten.relu.default, (argument(torch.empty(4, 4)),))
    return graph


def test_each_op_says_its_width_and_spec():
    choosing = [op for op in OPS.values() if op.configs]
    found = list(kernels(graph_of(*OPS.values())))
    assert 0 < len(choosing) < len(OPS)
    assert [(f["op"], f["k"]) for f in found] == [(op.name, 1536) for op in choosing]
    for op, settings in zip(choosing, found, strict=True):
        names = op.argument_names
        expected = {"op": op.name, "k": 1536, "spec": SPEC, "dtype": torch.bfloat16, "device": torch.device("cpu")}
        if "weight" in names:
            expected |= {"weight_dtype": FP32}
        if "weight_offset" in names:
            expected |= {"weight_offset": 1.0}
        if "z" in names:
            expected |= {"head_dim": 256}
        if "limit" in names:
            expected |= {"limit": 7.0}
        if "kv_weight" in names:
            expected |= {"weight_dtype": FP32, "latent": (256, 32), "rope": "half"}
        assert settings == expected


def test_a_pair_says_its_product_too():
    pair, mode = PAIRS["silu_mul_quant"], FakeTensorMode()
    given = [mode.from_tensor(t) for t in factors(4, 768, 512)]
    graph = Graph()
    nodes = [graph.placeholder("x") for _ in given]
    for node, tensor in zip(nodes, given, strict=True):
        node.meta["val"] = tensor
    graph.call_function(pair.overload, (*nodes, torch.bfloat16, "auto", "", 7.0, SPEC.encode()))
    own = {"op": "silu_mul_quant", "k": 384, "spec": SPEC, "dtype": torch.bfloat16, "device": torch.device("cpu")}
    own |= {"limit": 7.0}
    assert list(kernels(graph)) == [own | {"product": (512, 768)}, own]


def test_an_epsilon_that_is_a_tensor_changes_nothing():
    op = next(op for op in OPS.values() if op.eps_overload)
    graph = graph_of(op)
    (node,) = (node for node in graph.nodes if node.target is op.overload)
    expected = list(kernels(graph))
    node.target = getattr(torch.ops.normquant, op.name).tensor
    node.args = tuple(graph.placeholder("eps") if isinstance(a, float) and a != 1.0 else a for a in node.args)
    assert list(kernels(graph)) == expected


def test_nothing_is_launched_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warm_graph(graph_of(*OPS.values())) == 0
