"""The graph that a compile pass rewrites, kept as it was before and after, to be run on real tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Interpreter, Node

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


@dataclass(frozen=True)
class Recorded:
    """A function compiled as far as its graph pass. recordings: of its graphs, in the order in which they ran.

    before, after: what the function returned, each graph run eagerly as it was before the pass, and as it was after.
    """

    recordings: list[Recording]
    before: Any
    after: Any

    @property
    def only(self) -> Recording:
        """The recording of the only graph. Raises RuntimeError where there are others."""
        if len(self.recordings) != 1:
            raise RuntimeError(f"the function compiled to {len(self.recordings)} graphs; 1 is expected")
        return self.recordings[0]


def record(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    options: Mapping[str, Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Recorded:
    """Compile `fn` for its arguments as far as the graph pass in `options`, and run it; nothing is generated.

    The compiler's state in this process is reset. Raises whatever the compile raises.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    recorder = _Backend(options[PASS])
    patches = {**options, "fx_graph_cache": False, "fx_graph_remote_cache": False}
    torch._dynamo.reset()
    try:
        with torch.no_grad(), config.patch(patches), functorch_config.patch(enable_autograd_cache=False):
            compiled = torch.compile(fn, backend=recorder, dynamic=dynamic)
            before = compiled(*args, **(kwargs or {}))
            recorder.fused = True
            after = compiled(*args, **(kwargs or {}))
    finally:
        torch._dynamo.reset()
    return Recorded(recorder.recordings, before, after)


class _Backend:
    """A `torch.compile` backend that goes through Inductor up to the graph pass, and then runs the graph eagerly.

    fused: whether graphs run as they are after the pass; else as before it, and then they are recorded.
    """

    def __init__(self, inner: Callable[[Graph], Any]) -> None:
        self.inner = inner
        self.fused = False
        self.recordings: list[Recording] = []

    def __call__(self, gm: GraphModule, inputs: list[Any], **_: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs, inner_compile=self._inner_compile)  # type: ignore[arg-type]

    def _inner_compile(self, gm: GraphModule, inputs: Any, **kwargs: Any) -> Callable[[list[Any]], Any]:
        before, after = _around_the_pass(self.inner, gm, inputs, **kwargs)

        def run(given: list[Any]) -> Any:
            if not self.fused:
                self.recordings.append(Recording(before, after, tuple(given)))
            return Interpreter(after if self.fused else before).run(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _around_the_pass(inner: Any, gm: GraphModule, inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
    """The graph before and after a pass, which Inductor's own passes come before."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    recorder = Recorder(inner, leave=True)
    try:
        with config.patch({PASS: recorder}):
            compile_fx_inner(gm, inputs, **kwargs)
    except Exception:  # Inductor wraps ours in its own
        if recorder.after is None:
            raise
    if recorder.before is None or recorder.after is None:
        raise RuntimeError("Inductor compiled a graph without calling its custom pass")
    return recorder.before, recorder.after


def _copy(graph: Graph) -> GraphModule:
    return GraphModule(graph.owning_module or torch.nn.Module(), copy.deepcopy(graph))


def nodes_by_name(module: GraphModule) -> dict[str, Node]:
    """Every node of the module's graph."""
    return {node.name: node for node in module.graph.nodes}


def nodes_read(node: Node) -> list[Node]:
    """The nodes that `node` reads, in order, with repetitions."""
    found: list[Node] = []
    torch.fx.map_arg((node.args, node.kwargs), found.append)
    return found


def evaluate(module: GraphModule, names: Iterable[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The named values, computed from the known ones and nothing more than they need."""
    nodes = nodes_by_name(module)
    interpreter = Interpreter(module, garbage_collect_values=False)
    interpreter.env = {nodes[name]: value for name, value in known.items() if name in nodes}
    needed, pending = set(), [nodes[name] for name in names]
    while pending:
        node = pending.pop()
        if node not in needed and node not in interpreter.env:
            needed.add(node)
            pending.extend(nodes_read(node))
    for node in module.graph.nodes:
        if node in needed:
            interpreter.env[node] = interpreter.run_node(node)
    return {name: interpreter.env[nodes[name]] for name in names}


def evaluate_all(module: GraphModule, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Every value of the graph, by name."""
    interpreter = Interpreter(module, garbage_collect_values=False)
    interpreter.run(*inputs)
    return {node.name: value for node, value in interpreter.env.items()}
