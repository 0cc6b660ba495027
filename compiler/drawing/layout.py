"""Where the boxes of a directed acyclic graph go: layers from top to bottom, few crossings.

The method of Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of Hierarchical System
Structures" (1981): assign layers, let long edges pass through them, order each by barycenters, then
move boxes towards what they are connected with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

LAYER_GAP: Final = 26.0  # pixels between the boxes of two layers
BOX_GAP: Final = 14.0  # between the boxes of one layer
LONGEST_EDGE: Final = 12  # layers; a longer edge is not drawn, its end names where it comes from
SWEEPS: Final = 4  # down and up again; more change little


@dataclass(slots=True, eq=False)
class Box:
    """A node, or where a long edge passes through a layer.

    Attributes:
        width, height: its size in pixels; 0 for a passing edge.
        x, y: its center, and its upper edge.
        above, below: the boxes it is connected with in the layers next to its own.
    """

    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    above: list[Box] = field(default_factory=list)
    below: list[Box] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Layout:
    """Boxes in their places.

    Attributes:
        boxes: one for each node, in the order given.
        paths: for each edge that is drawn, the boxes that it runs through, from top to bottom.
        width, height: the size of the whole.
    """

    boxes: list[Box]
    paths: list[list[Box]]
    width: float
    height: float


def levels(inputs: Sequence[Sequence[int]]) -> list[int]:
    """The layer of each node: below all its inputs, and, where it has none, close to its users.

    Args:
        inputs: for each node, those that it reads; all of them come before it.
    """
    found: list[int] = []
    for sources in inputs:
        found.append(1 + max((found[source] for source in sources), default=-1))
    first_use = [-1] * len(inputs)
    for node, sources in enumerate(inputs):
        for source in sources:
            if first_use[source] == -1 or found[node] < first_use[source]:
                first_use[source] = found[node]
    return [
        first_use[node] - 1 if not inputs[node] and first_use[node] > 0 else level
        for node, level in enumerate(found)
    ]


def arrange(
    sizes: Sequence[tuple[float, float]], inputs: Sequence[Sequence[int]], level: Sequence[int]
) -> Layout:
    """Give every box its place.

    Args:
        sizes: width and height of each node.
        inputs: for each node, those it is connected with by an edge from above.
        level: the layer of each node, as ``levels`` gives it.
    """
    boxes = [Box(width, height) for width, height in sizes]
    layers: list[list[Box]] = [[] for _ in range(max(level, default=-1) + 1)]
    for box, at in zip(boxes, level, strict=True):
        layers[at].append(box)
    paths = []
    for node, sources in enumerate(inputs):
        for source in dict.fromkeys(sources):
            passing = [Box(0, 0) for _ in range(level[source] + 1, level[node])]
            for at, box in enumerate(passing, level[source] + 1):
                layers[at].append(box)
            path = [boxes[source], *passing, boxes[node]]
            for upper, lower in pairwise(path):
                upper.below.append(lower)
                lower.above.append(upper)
            paths.append(path)
    _order(layers)
    _place(layers)
    return Layout(boxes, paths, *_move_to_origin(layers))


def _order(layers: list[list[Box]]) -> None:
    """Order each layer by the mean place of what it is connected with, down and up in turns."""
    place: dict[Box, float] = {}
    for layer in layers:
        place.update((box, float(at)) for at, box in enumerate(layer))

    def sort(layer: list[Box], neighbors: Callable[[Box], list[Box]]) -> None:
        mean = {
            box: sum(place[each] for each in found) / len(found)
            if (found := neighbors(box))
            else place[box]
            for box in layer
        }
        layer.sort(key=mean.__getitem__)
        place.update((box, float(at)) for at, box in enumerate(layer))

    for _ in range(SWEEPS):
        for layer in layers:
            sort(layer, lambda box: box.above)
        for layer in reversed(layers):
            sort(layer, lambda box: box.below)


def _place(layers: list[list[Box]]) -> None:
    """Coordinates: layers below each other, boxes as close to what they are connected with as
    their neighbors allow."""
    top = 0.0
    for layer in layers:
        x = 0.0
        height = max((box.height for box in layer), default=0.0)
        for box in layer:
            box.x, box.y = x + box.width / 2, top
            x += box.width + BOX_GAP
            if not box.height:
                box.height = height  # a passing edge runs straight past the boxes of its layer
        top += height + LAYER_GAP
    for _ in range(SWEEPS):
        for layer in layers:
            _pull(layer, lambda box: box.above)
        for layer in reversed(layers):
            _pull(layer, lambda box: box.below)


def _pull(layer: list[Box], neighbors: Callable[[Box], list[Box]]) -> None:
    """Move the boxes of a layer to the mean of their neighbors', in order and without overlap.

    Boxes that meet form a block, which goes where its members want to be on average.
    """
    blocks: list[tuple[float, int, list[tuple[Box, float]]]] = []  # left edge, members, offsets
    for box in layer:
        found = neighbors(box)
        wanted = sum(each.x for each in found) / len(found) if found else box.x
        left, members = wanted - box.width / 2, [(box, 0.0)]
        while blocks:
            before, number, others = blocks[-1]
            last, at = others[-1]
            offset = at + last.width + BOX_GAP
            if before + offset <= left:
                break
            blocks.pop()
            total = number + len(members)
            left = (before * number + (left - offset) * len(members)) / total
            others += [(each, offset + within) for each, within in members]
            members = others
        blocks.append((left, len(members), members))
    for left, _, members in blocks:
        for box, at in members:
            box.x = left + at + box.width / 2


def _move_to_origin(layers: list[list[Box]]) -> tuple[float, float]:
    """Move everything so that it begins at 0; the size of the whole."""
    boxes = [box for layer in layers for box in layer]
    if not boxes:
        return 0.0, 0.0
    left = min(box.x - box.width / 2 for box in boxes)
    for box in boxes:
        box.x -= left
    return max(box.x + box.width / 2 for box in boxes), max(box.y + box.height for box in boxes)
