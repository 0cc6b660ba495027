"""What a query sees: the band of the mask class, and the mask, as tensors of a body.

docs/numerics.md, "What is computed"; ``kernels/masking.py`` and ``Semantics.band`` say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from onnx import AttributeProto

from sage_compiler.onnx.bodies.graph import Graph, Value
from sage_compiler.semantics import MaskClass

_FAR: Final = 1 << 40  # beyond any length; a sum of a few of it is far from overflow

_BOTTOM_RIGHT: Final = (MaskClass.CAUSAL_BOTTOM_RIGHT, MaskClass.WINDOW_BOTTOM_RIGHT)
_WINDOWS: Final = (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)


@dataclass(frozen=True, slots=True)
class Band:
    """Key j is visible to query i iff left <= j - (i + offset) <= right.

    Attributes:
        diagonal: INT64 (Lq, 1), the key on the diagonal of each query, i + offset.
        left, right: INT64 scalars; ``left`` is None without a limit.
    """

    diagonal: Value
    left: Value | None
    right: Value | int

    def shows(self, keys: Value) -> Value:
        """Which of these keys (..., n) each query sees: BOOL (..., Lq, n)."""
        visible = keys <= self.diagonal + self.right
        if self.left is not None:
            visible = visible & (keys >= self.diagonal - self.left)
        return visible


def band(
    graph: Graph, mask_class: MaskClass, query_length: Value, key_length: Value
) -> Band | None:
    """The band of a mask class for these lengths (INT64 scalars); None: every key is visible."""
    if mask_class is MaskClass.NONE:
        return None
    diagonal = query_length.indices()
    if mask_class in _BOTTOM_RIGHT:
        diagonal = diagonal + (key_length - query_length)
    diagonal = diagonal.unsqueeze(1)
    if mask_class in _WINDOWS:
        return Band(diagonal, _side(graph, "window_left"), _side(graph, "window_right"))
    return Band(diagonal, None, 0)


def _side(graph: Graph, name: str) -> Value:
    """How many keys a side of the window shows; that of no limit is far."""
    side = graph.attribute(name, AttributeProto.INT)
    return side.minimum(_FAR).where(side >= 0, _FAR)
