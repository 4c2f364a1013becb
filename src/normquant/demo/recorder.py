"""The graph that a compile pass rewrites, kept as it was before and after, to be run on real tensors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Node

PASS = "post_grad_custom_pre_pass"  # the Inductor option behind which the graph pass stands


@dataclass(frozen=True)
class Recording:
    """before, after: the graph around the pass, a node of both under one name. inputs: what it was called with."""

    before: GraphModule
    after: GraphModule
    inputs: tuple[Any, ...]


class _Recorded(Exception):
    """Ends a compile on purpose; it is not an error."""


class Recorder(CustomGraphPass):
    """Runs a pass, or none, and keeps the graph before and after it. leave: then end the compile with an exception."""

    def __init__(self, inner: Callable[[Graph], Any] | None = None, leave: bool = False) -> None:
        self.inner = inner
        self.leave = leave
        self.before: GraphModule | None = None
        self.after: GraphModule | None = None

    def __call__(self, graph: Graph) -> None:
        self.before = _copy(graph)
        if self.inner is not None:
            self.inner(graph)
        self.after = _copy(graph)
        if self.leave:
            raise _Recorded

    def uuid(self) -> None:
        """None: a compile that is recorded is never taken from a cache."""
        return None


def record(fn: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Recording:
    """Compile `fn` for `args` as far as the graph pass in `options`; nothing is generated, on any device.

    Raises RuntimeError where `fn` compiles to more than one graph, and whatever the compile raises.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    recordings: list[Recording] = []
    patches = {**options, "fx_graph_cache": False, "fx_graph_remote_cache": False}
    torch._dynamo.reset()
    try:
        with torch.no_grad(), config.patch(patches), functorch_config.patch(enable_autograd_cache=False):
            torch.compile(fn, backend=functools.partial(_backend, recordings, options[PASS]))(*args)
    finally:
        torch._dynamo.reset()
    if len(recordings) != 1:
        raise RuntimeError(f"the function compiled to {len(recordings)} graphs; 1 is expected")
    return recordings[0]


def module_of(node: Node) -> str:
    """Path of the module that a node comes from, "self_attn.q_a_layernorm"; "" for the outermost or an unknown one."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.partition(".")[2]


def norm_weights(graph: Graph) -> dict[str, str]:
    """Name of each input that is a norm's weight [K] -> the norm's module."""
    return {
        node.name: module_of(next(iter(node.users)))
        for node in graph.nodes
        if node.op == "placeholder" and node.users and getattr(node.meta.get("val"), "dim", lambda: 0)() == 1
    }


def _backend(recordings: list[Recording], inner: Any, graph_module: Any, example_inputs: Any, **kwargs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, example_inputs, inner_compile=functools.partial(_inner_compile, recordings, inner))


def _inner_compile(recordings: list[Recording], inner: Any, graph_module: Any, inputs: Any, **kwargs: Any) -> Any:
    """Go through Inductor's own passes up to the recorded one, and hand back the graph as it was before that."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    recorder = Recorder(inner, leave=True)
    try:
        with config.patch({PASS: recorder}):
            compile_fx_inner(graph_module, inputs, **kwargs)
    except Exception:  # Inductor wraps ours in its own
        if recorder.after is None:
            raise
    before, after = recorder.before, recorder.after
    if before is None or after is None:
        raise RuntimeError("Inductor compiled a graph without calling its custom pass")

    def run(given: list[Any]) -> Any:
        recordings.append(Recording(before, after, tuple(given)))
        return torch.fx.Interpreter(before).run(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _copy(graph: Graph) -> GraphModule:
    return GraphModule(graph.owning_module or torch.nn.Module(), copy.deepcopy(graph))


def nodes_by_name(module: GraphModule) -> dict[str, Node]:
    """Every node of the module's graph."""
    return {node.name: node for node in module.graph.nodes}


def arguments(node: Node) -> Iterator[Node]:
    """The nodes that `node` reads, in order, with repetitions."""
    found: list[Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return iter(found)
