"""Drawings of graphs as SVG: every node with its operation, dtype and shape.

All text comes from users' code; ElementTree escapes it, and ``drawable`` replaces what XML cannot
hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import Any, Final
from xml.etree import ElementTree

from torch import Tensor, fx
from torch._ops import OpOverload

from sage_compiler import files
from sage_compiler.drawing.layout import LONGEST_EDGE, Box, arrange, levels

_LONGEST_TEXT: Final = 34  # characters of a line in a box
_CHARACTER: Final = 6.7  # pixels, of the monospaced font at 11 pixels, bold included
_LINE: Final = 15.0  # pixels
_PADDING: Final = 8.0
_MARGIN: Final = 6.0
# Not in XML 1.0: control characters, surrogates, two non-characters.
_UNDRAWABLE: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def stylesheet() -> str:
    """The CSS of drawings, in light and dark."""
    return resources.files(__name__).joinpath("drawing.css").read_text(encoding="utf-8")


def drawable(text: str) -> str:
    """The text with a mark instead of each character that XML has no way to say."""
    return _UNDRAWABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def draw(nodes: Sequence[fx.Node], kinds: Mapping[str, str], title: str) -> ElementTree.Element:
    """An ``<svg>`` of some nodes of a graph, with the edges between them.

    Args:
        nodes: in the order of their graph.
        kinds: name of a node -> "replaced", "inserted" or "context", where it is one of these.
        title: what a screen reader says.
    """
    index = {node: at for at, node in enumerate(nodes)}
    inputs = [
        [index[source] for source in node.all_input_nodes if source in index] for node in nodes
    ]
    level = levels(inputs)
    near = [
        [source for source in sources if level[at] - level[source] <= LONGEST_EDGE]
        for at, sources in enumerate(inputs)
    ]
    labels = []
    for node, sources, drawn in zip(nodes, inputs, near, strict=True):
        far = [nodes[source].name for source in sources if source not in drawn]
        labels.append(_label(node, far))
    sizes = [
        (
            max(map(len, lines)) * _CHARACTER + 2 * _PADDING,
            len(lines) * _LINE + _PADDING,
        )
        for lines in labels
    ]
    layout = arrange(sizes, near, level)
    svg = _canvas(layout.width, layout.height, title)
    ElementTree.SubElement(
        svg, "path", {"class": "edges", "d": "".join(_curve(path) for path in layout.paths)}
    )
    for node, lines, box in zip(nodes, labels, layout.boxes, strict=True):
        kind = f"node {kinds.get(node.name, '')}".rstrip()
        svg.append(_box(box, lines, kind, _description(node)))
    return svg


def write_svg(svg: ElementTree.Element, path: str | os.PathLike[str]) -> None:
    """Write a drawing as a file of its own, with its stylesheet.

    Raises:
        OSError: the file cannot be written.
    """
    style = ElementTree.Element("style")
    style.text = stylesheet()
    svg.insert(0, style)
    files.write(path, ElementTree.tostring(svg, encoding="utf-8", xml_declaration=True))


def operation_text(node: fx.Node) -> str:
    """What a node does: ``softmax``, ``aten.clone``, ``.chunk``, ``get_attr weight``."""
    target = node.target
    if node.op == "call_method":
        return f".{target}"
    if not callable(target):
        return node.op if target in (node.op, node.name) else f"{node.op} {target}"
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def value_text(node: fx.Node) -> str:
    """``float32 (1, 12, s0, 64)`` of a tensor, its type of anything else; "" when unknown."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')} ({sizes})"
    return "" if value is None else _short(value)


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, (tuple, list, dict)) else str(value)


def _label(node: fx.Node, far: Sequence[str]) -> list[str]:
    """The lines of a box; ``far`` are inputs whose edges would be too long to follow."""
    lines = [node.name, operation_text(node), value_text(node)]
    if far:
        lines.append(f"\N{LEFTWARDS ARROW} {', '.join(far)}")
    return [clip(drawable(" ".join(line.split())), _LONGEST_TEXT) for line in lines if line]


def clip(text: str, longest: int) -> str:
    """The text without its middle if it is long: generated names differ at their ends."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 3]}\N{HORIZONTAL ELLIPSIS}{text[-longest // 2 :]}"


def _description(node: fx.Node) -> str:
    """What a pointer that rests on a box shows: nothing clipped."""
    return drawable("\n".join(filter(None, (node.name, operation_text(node), value_text(node)))))


def _canvas(width: float, height: float, title: str) -> ElementTree.Element:
    width, height = width + 2 * _MARGIN, height + 2 * _MARGIN
    return ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "class": "graph",
            "role": "img",
            "aria-label": drawable(title),
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
            "viewBox": f"{-_MARGIN:g} {-_MARGIN:g} {width:.0f} {height:.0f}",
        },
    )


def _curve(boxes: Sequence[Box]) -> str:
    """An edge: straight past boxes, curved between layers, with a head at its end."""
    first, last = boxes[0], boxes[-1]
    parts = [f"M{first.x:.0f} {first.y + first.height:.0f}"]
    for upper, lower in pairwise(boxes):
        start, end = upper.y + upper.height, lower.y
        middle = (start + end) / 2
        parts.append(f"C{upper.x:.0f} {middle:.0f} {lower.x:.0f} {middle:.0f} ")
        parts.append(f"{lower.x:.0f} {end:.0f}")
        if lower is not last:
            parts.append(f"V{end + lower.height:.0f}")
    parts.append("m-3 -5l3 5l3 -5")
    return "".join(parts)


def _box(box: Box, lines: Sequence[str], kind: str, description: str) -> ElementTree.Element:
    left = box.x - box.width / 2
    group = ElementTree.Element(
        "g", {"class": kind, "transform": f"translate({left:.0f} {box.y:.0f})"}
    )
    ElementTree.SubElement(group, "title").text = description
    ElementTree.SubElement(
        group, "rect", {"width": f"{box.width:.0f}", "height": f"{box.height:.0f}", "rx": "4"}
    )
    for number, line in enumerate(lines):
        y = _PADDING / 2 + (number + 0.75) * _LINE
        text = ElementTree.SubElement(group, "text", {"x": f"{_PADDING:g}", "y": f"{y:.0f}"})
        text.text = line
    return group
