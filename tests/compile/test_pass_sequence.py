"""Several passes in the place of one."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomInferenceAwareGraphPass
from torch.fx import Graph

from normquant.compile import inductor_options, pass_sequence
from normquant.compile.driver import NormQuantPass
from normquant.compile.pass_sequence import PassSequence
from normquant.compile.policy import Rules

OURS = NormQuantPass(Rules("always"))


class Plain(CustomGraphPass):
    def __init__(self, name: str) -> None:
        self.name, self.calls = name, []

    def __call__(self, graph: Graph) -> None:
        self.calls.append([str(node.target) for node in graph.nodes if node.op == "call_function"])

    def uuid(self) -> Any:
        return self.name


class InferenceAware(CustomInferenceAwareGraphPass):
    def __init__(self) -> None:
        self.calls: list[bool] = []

    def __call__(self, graph: Graph, is_inference: bool) -> None:
        self.calls.append(is_inference)

    def uuid(self) -> Any:
        return "aware"


def test_the_key_has_every_pass_in_order() -> None:
    a, b = Plain("a"), Plain("b")
    keys = [PassSequence(passes).uuid() for passes in ((OURS, a), (OURS, b), (OURS, a, b), (OURS, b, a), (a, OURS))]
    assert len(set(keys)) == len(keys)
    assert PassSequence((OURS, Graph.lint)).uuid() is None, "a function has no key: nothing may be cached"


def test_sequences_of_equal_passes_are_equal() -> None:
    a, again = Plain("a"), NormQuantPass(Rules("always"))
    assert PassSequence((OURS, a)) == PassSequence((again, a)) != PassSequence((a, again))
    assert hash(PassSequence((OURS, a))) == hash(PassSequence((again, a)))


@pytest.mark.parametrize("given", ["a pass", "a list", "the config"])
def test_both_run_in_a_compile_the_others_after_ours(given: str) -> None:
    from compile.test_inductor import ARGS, Block

    theirs, aware = Plain("theirs"), InferenceAware()
    passes = theirs if given == "a pass" else [theirs, aware]
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        if given == "the config":
            with torch._inductor.config.patch(post_grad_custom_pre_pass=passes):
                options = inductor_options("always", strict=True)
        else:
            options = inductor_options("always", strict=True, post_grad_custom_pre_pass=passes)
        torch.compile(Block().eval(), options=options)(*ARGS)
    (seen,) = theirs.calls
    assert "normquant.add_rms_norm_quant.default" in seen
    assert aware.calls == ([] if given == "a pass" else [True])


def test_torch_without_passes_that_know_of_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch 2.11 has no such class; the options must be made there, and a pass beside ours must run
    from torch._inductor import custom_graph_pass

    monkeypatch.delattr(custom_graph_pass, "CustomInferenceAwareGraphPass")
    spec = importlib.util.spec_from_file_location("older_pass_sequence", pass_sequence.__file__)
    assert spec is not None and spec.loader is not None
    older = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, older)
    spec.loader.exec_module(older)
    first, second = Plain("first"), Plain("second")
    older.PassSequence((first, second))(Graph())
    assert issubclass(older.PassSequence, CustomGraphPass) and len(first.calls) == len(second.calls) == 1
