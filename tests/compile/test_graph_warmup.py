"""Which kernels a rewritten graph asks to be warmed up."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from normquant import QuantSpec
from normquant.compile.graph_warmup import kernels, warm_graph

SPEC = QuantSpec(layout="col_tma")
OPS = torch.ops.normquant


def graph_of(*calls) -> Graph:
    """A graph with one call of each op; tensors are given by shape, or shape and dtype."""
    graph = Graph()
    with FakeTensorMode():
        for op, *args in calls:
            nodes = []
            for arg in args:
                if isinstance(arg, torch.Size):
                    node = graph.placeholder("x")
                    node.meta["val"] = torch.empty(arg, dtype=torch.bfloat16)
                    nodes.append(node)
                else:
                    nodes.append(arg)
            graph.call_function(op.default, tuple(nodes))
    return graph


def shape(*sizes: int) -> torch.Size:
    return torch.Size(sizes)


def test_each_op_says_its_width_and_spec():
    spec = SPEC.encode()
    graph = graph_of(
        (OPS.rms_norm_quant, shape(4, 512), shape(512), 1e-6, 1.0, spec),
        (OPS.add_rms_norm_quant_with_norm, shape(4, 1024), shape(4, 1024), shape(1024), 1e-6, 0.0, spec),
        (OPS.group_quant, shape(4, 256), spec),
        (OPS.silu_mul_quant, shape(4, 2304 * 2), spec),
        (
            OPS.latent_norm_quant,
            shape(4, 2112),
            shape(1536),
            shape(512),
            shape(9, 32),
            shape(9, 32),
            None,
            1e-6,
            "interleaved",
            spec,
        ),
        (OPS.rope_last, shape(4, 3072), shape(9, 64), shape(9, 64), None, 16, 64, "interleaved", spec),
        (torch.ops.aten.relu, shape(4, 4)),
    )
    found = list(kernels(graph))
    assert [(f["op"], f["k"]) for f in found] == [
        ("rms_norm_quant", 512),
        ("add_rms_norm_quant_with_norm", 1024),
        ("group_quant", 256),
        ("silu_mul_quant", 2304),
        ("latent_norm_quant", 1536),
    ]
    assert all(f["spec"] == SPEC and f["dtype"] == torch.bfloat16 for f in found)
    assert found[0]["weight_offset"] == 1.0 and found[1]["weight_dtype"] == torch.bfloat16
    assert found[-1]["latent"] == (512, 64) and found[-1]["rope"] == "interleaved"


def test_nothing_is_launched_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warm_graph(graph_of((OPS.group_quant, shape(4, 256), SPEC.encode()))) == 0
