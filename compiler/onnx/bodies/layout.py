"""How the bodies of recipes lay out their tensors: keys in tiles, heads in groups.

    rows of scores  (B, Hkv, T, G, Lq, n)    T tiles of n keys, G = H / Hkv
    queries         (B, Hkv, 1, G, Lq, D)
    keys, values    (B, Hkv, T, 1, n, D)

So a tile is an axis: what the reference does in a loop over tiles, a body does in one operator, at
the memory of the scores. Keys that fill up the last tile are hidden. There is at least one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sage_compiler.onnx.bodies.graph import Graph, Value
from sage_compiler.onnx.schema import Variant

BATCH, HEAD, TILE, GROUP, TOKEN, CHANNEL = range(6)
KEY: Final = 5  # of rows; of keys and values it is TOKEN
_SWAPPED: Final = (BATCH, HEAD, TILE, GROUP, CHANNEL, TOKEN)


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes of one attention; INT64 (1,) where they are values.

    Attributes:
        width: n, keys in a tile.
    """

    graph: Graph
    width: int
    batch: Value
    heads: Value
    kv_heads: Value
    query_length: Value
    key_length: Value
    grouped: bool

    @property
    def group(self) -> Value | int:
        return self.heads / self.kv_heads.maximum(1) if self.grouped else 1

    @property
    def tiles(self) -> Value:
        return ((self.key_length + (self.width - 1)) / self.width).maximum(1)

    def keys(self) -> Value:
        """The index of every key, the filling included: INT64 (1, 1, T, 1, 1, n)."""
        indices = (self.tiles * self.width).indices()
        return indices.reshape(self.graph.shape(1, 1, self.tiles, 1, 1, self.width))

    def queries(self) -> Value:
        """The index of every query: INT64 (Lq,)."""
        return self.query_length.indices()

    def by_head(self, x: Value) -> Value:
        """(B, H, Lq, D) -> (B, Hkv, 1, G, Lq, D)."""
        if not self.grouped:
            return x.unsqueeze(TILE, GROUP)
        heads = self.batch, self.kv_heads, 1, self.group
        return x.reshape(self.graph.shape(*heads, self.query_length, x.dim(3)))

    def by_tile(self, x: Value) -> Value:
        """(B, Hkv, Lk, D) -> (B, Hkv, T, 1, n, D), filled up with zeros."""
        filled = x.pad_end([0, 0, self.tiles * self.width - self.key_length, 0])
        tiles = self.batch, self.kv_heads, self.tiles, 1
        return filled.reshape(self.graph.shape(*tiles, self.width, x.dim(3)))

    def mask(self, mask: Value) -> Value:
        """A mask of 1 to 4 dims as (B|1, Hkv|1, T, G|1, Lq|1, n), filled up with zeros."""
        shape = self.graph.shape
        four = self.graph.add("Concat", shape(1, 1, 1, 1), mask.dims(), axis=0)
        mask = mask.reshape(four.slice(0, -4, _END)).expand(shape(1, 1, 1, self.key_length))
        mask = mask.pad_end([0, 0, 0, self.tiles * self.width - self.key_length])
        heads = mask.dim(1)
        group = heads.minimum(self.group)
        kv_heads = heads / group.maximum(1)
        split = shape(mask.dim(0), kv_heads, group, mask.dim(2), self.tiles, self.width)
        return mask.reshape(split).transpose(0, 1, 4, 2, 3, 5)

    def output(self, x: Value) -> Value:
        """(B, Hkv, 1, G, Lq, D) -> (B, H, Lq, D)."""
        return x.reshape(self.graph.shape(self.batch, self.heads, self.query_length, x.dim(5)))


_END: Final = (1 << 63) - 1


def layout(graph: Graph, variant: Variant, width: int) -> Layout:
    """The layout of a body's inputs, in tiles of ``width`` keys."""
    query, key = graph.input("query"), graph.input("key")
    sizes = query.dim(0), query.dim(1), key.dim(1), query.dim(2), key.dim(2)
    return Layout(graph, width, *sizes, grouped=variant.grouped)


def swapped(x: Value) -> Value:
    """The last two axes swapped: from tokens to the rows of scores and back."""
    return x.transpose(*_SWAPPED)
