"""Layout of a data-flow graph: launches as boxes in layers from top to bottom, edges as smooth lines.

A launch is one layer below the last of the launches that it reads from. An edge that spans layers bends around the
boxes in between: it has an invisible point in each. The order in a layer follows the neighbours' middle, swept down and
up a few times, which takes out most crossings.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

BOX_WIDTH, BOX_HEIGHT = 264, 58
LAYER_GAP, BOX_GAP, POINT_WIDTH = 64, 36, 26
MARGIN, LABEL_WIDTH = 28, 56
PORT_GAP = 34
_STIFF = 8  # weight of keeping a long edge straight, where keeping a box near its neighbours has weight 1
_SWEEPS = 8


@dataclass
class Point:
    """A box, or the point where an edge passes through a layer."""

    layer: int
    width: int
    launch: int | None = None
    x: float = 0.0  # of its centre
    above: list["Point"] = field(default_factory=list)
    below: list["Point"] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """An edge: through these points, with this many bytes of one buffer.

    `leaves` and `enters` are where, along the lower and upper side of its boxes, it starts and ends.
    """

    source: int
    target: int
    buffer: str
    bytes: int
    points: tuple[Point, ...]
    leaves: float = 0.0
    enters: float = 0.0


@dataclass(frozen=True)
class Layout:
    """The centres of boxes by launch, the edges, and the size of the drawing."""

    boxes: dict[int, tuple[float, float]]
    lines: tuple[Line, ...]
    width: float
    height: float


def layout(launches: Sequence[Mapping[str, Any]], edges: Sequence[Mapping[str, Any]]) -> Layout:
    """Place the launches and the edges between them; edges from outside the program are not drawn as lines."""
    inner = [e for e in _merged(edges) if e["from"] is not None and e["from"] != e["to"]]
    depth = _depths(len(launches), inner)
    boxes = [Point(depth[i], BOX_WIDTH, i) for i in range(len(launches))]
    layers: list[list[Point]] = [[] for _ in range(max(depth, default=0) + 1)]
    for box in boxes:
        layers[box.layer].append(box)
    lines = tuple(_line(edge, boxes, layers) for edge in inner)
    _order(layers)
    _spread(layers)
    left = min((p.x - p.width / 2 for layer in layers for p in layer), default=0.0)
    for layer in layers:
        for point in layer:
            point.x += MARGIN - left
    right = max((p.x + p.width / 2 for layer in layers for p in layer), default=BOX_WIDTH)
    places = {i: (box.x, top(box.layer) + BOX_HEIGHT / 2) for i, box in enumerate(boxes)}
    return Layout(places, _ports(lines), right + MARGIN + LABEL_WIDTH, top(len(layers) - 1) + BOX_HEIGHT + LAYER_GAP)


def _ports(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The lines with the places where they touch their boxes: side by side, in the order of their other ends."""
    leaves = _along([(n, line.points[0], line.points[1]) for n, line in enumerate(lines)])
    enters = _along([(n, line.points[-1], line.points[-2]) for n, line in enumerate(lines)])
    return tuple(replace(line, leaves=leaves[n], enters=enters[n]) for n, line in enumerate(lines))


def _along(ends: Sequence[tuple[int, Point, Point]]) -> dict[int, float]:
    """Line number -> where it meets the box; `ends` are (line number, box, next point of the line)."""
    by_box: dict[int, list[tuple[int, Point, Point]]] = {}
    for end in ends:
        by_box.setdefault(id(end[1]), []).append(end)
    found: dict[int, float] = {}
    for held in by_box.values():
        held.sort(key=lambda end: (end[2].x, end[0]))
        step = min(PORT_GAP, BOX_WIDTH * 0.6 / len(held))
        for place, (number, box, _) in enumerate(held):
            found[number] = box.x + (place - (len(held) - 1) / 2) * step
    return found


def top(layer: int) -> float:
    """The y of the upper edge of a layer's boxes."""
    return LAYER_GAP + layer * (BOX_HEIGHT + LAYER_GAP)


def _merged(edges: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One edge per pair of launches and buffer."""
    found: dict[tuple[Any, Any, str], dict[str, Any]] = {}
    for edge in edges:
        key = (edge["from"], edge["to"], edge["buffer"])
        if key in found:
            found[key]["bytes"] += edge["bytes"]
        else:
            found[key] = dict(edge)
    return list(found.values())


def _depths(count: int, edges: Sequence[Mapping[str, Any]]) -> list[int]:
    sources: dict[int, list[int]] = {}
    for edge in edges:
        sources.setdefault(edge["to"], []).append(edge["from"])
    depth = [0] * count
    for launch in range(count):  # in program order, so that producers come before their consumers
        depth[launch] = max((depth[s] + 1 for s in sources.get(launch, ()) if s < launch), default=0)
    return depth


def _line(edge: Mapping[str, Any], boxes: Sequence[Point], layers: Sequence[list[Point]]) -> Line:
    source, target = boxes[edge["from"]], boxes[edge["to"]]
    points = [source]
    for layer in range(source.layer + 1, target.layer):
        point = Point(layer, POINT_WIDTH)
        layers[layer].append(point)
        points.append(point)
    points.append(target)
    for upper, lower in itertools.pairwise(points):
        upper.below.append(lower)
        lower.above.append(upper)
    return Line(edge["from"], edge["to"], edge["buffer"], edge["bytes"], tuple(points))


def _order(layers: Sequence[list[Point]]) -> None:
    for layer in layers:
        _number(layer)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            layer.sort(key=lambda p: _middle(p.above if down else p.below, p.x))
            _number(layer)


def _number(layer: Sequence[Point]) -> None:
    for place, point in enumerate(layer):
        point.x = place - len(layer) / 2


def _middle(neighbours: Sequence[Point], otherwise: float) -> float:
    return sum(p.x for p in neighbours) / len(neighbours) if neighbours else otherwise


def _spread(layers: Sequence[list[Point]]) -> None:
    """Place every point as near to the mean of its neighbours as its layer allows."""
    for layer in layers:
        _pack(layer, [p.x * BOX_WIDTH for p in layer])
    for sweep in range(_SWEEPS * 3):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            _pack(layer, [_wanted(p) for p in layer])


def _wanted(point: Point) -> float:
    """Where a point would be if it were alone in its layer: straight edges matter more than centred boxes."""
    neighbours = [*point.above, *point.below]
    weights = [_STIFF if point.launch is None and p.launch is None else 1 for p in neighbours]
    total = sum(weights)
    return sum(w * p.x for w, p in zip(weights, neighbours, strict=True)) / total if total else point.x


@dataclass
class _Block:
    """Adjacent points without a gap, which are placed together."""

    pull: float  # weight * wanted start of the block, summed over its points
    weight: float
    width: float
    points: list[Point]

    @property
    def start(self) -> float:
        return self.pull / self.weight


def _pack(layer: Sequence[Point], wanted: Sequence[float]) -> None:
    """Place a layer's points near `wanted`, in order and without overlap, by joining those that collide."""
    blocks: list[_Block] = []
    for point, want in zip(layer, wanted, strict=True):
        weight = 1.0 if point.launch is not None else _STIFF
        blocks.append(_Block(weight * (want - point.width / 2), weight, point.width + _gap(point), [point]))
        while len(blocks) > 1 and blocks[-2].start + blocks[-2].width > blocks[-1].start:
            right, left = blocks.pop(), blocks.pop()
            pull = left.pull + right.pull - left.width * right.weight  # both as starts of the joined block
            blocks.append(
                _Block(pull, left.weight + right.weight, left.width + right.width, left.points + right.points)
            )
    for block in blocks:
        x = block.start
        for point in block.points:
            point.x = x + point.width / 2
            x += point.width + _gap(point)


def _gap(point: Point) -> float:
    return BOX_GAP if point.launch is not None else BOX_GAP / 2
