"""What the CUDA kernels need to know of an explicit mask besides its elements.

The kernels read the mask itself, by its strides, where it neither hides nor shows a whole tile.
Which tiles these are, and which tokens count, is found here, by torch on the device of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_compiler.kernels.cuda.tensor_map import UNIT, WIDEST_ROW, TensorMap
from sage_compiler.kernels.visibility import count_in_blocks, group_mask, visibility
from sage_compiler.precision import TILE_MMA
from sage_compiler.semantics import Band

# Numbers of params.cuh.
KINDS: Final = {torch.bool: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
_SEEN, _COUNTS = 1, 2
_HIDES_ALL, _SHOWS_ALL, _MIXED = 0, 1, 2

# Of the search for what is seen, whose result does not depend on it.
_MOST_KEYS_AT_ONCE: Final = 8192
_ELEMENTS_AT_ONCE: Final = 1 << 25

NO_FLAGS: Final = (0, 0, 0, 0)
NO_MASK: Final = (0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask, and what it shows. Dims that it broadcasts have size 1 or stride 0.

    Attributes:
        values: (B|1, H|1, Lq|1, Lk|1), bool or float.
        tiles: uint8 (B|1, H|1, M|1, N), what each tile of 128 queries and 64 keys is.
        live: uint8 (B|1, H|1, Lq|1), whether a query sees a key.
        keys: uint8 (B|1, Hkv|1, Lk), whether a key is seen, and whether it counts.
        counts: float32 (B, Hkv), dense: how many keys count.
    """

    values: Tensor
    tiles: Tensor
    live: Tensor
    keys: Tensor
    counts: Tensor

    @classmethod
    def of(
        cls,
        attn_mask: Tensor,
        band: Band | None,
        batch: int,
        kv_heads: int,
        group: int,
        query_length: int,
        key_length: int,
    ) -> Mask:
        """Look through a mask, broadcastable to (B, Hkv * group, Lq, Lk), and the band on top."""
        grouped = group_mask(attn_mask, kv_heads, group)
        # With a band, a mask that broadcasts its queries is as large as one that does not.
        heads = grouped[..., 0, 0].numel()
        rows = heads * (query_length if band is not None else grouped.shape[3])
        at_once = min(_MOST_KEYS_AT_ONCE, _ELEMENTS_AT_ONCE // max(1, rows))
        at_once = max(TILE_MMA.kv_block, at_once)
        found = visibility(grouped, band, query_length, key_length, at_once, attn_mask.device)
        seen = count_in_blocks(found, key_length)
        keys = seen.reachable * _SEEN + seen.counted * _COUNTS
        counts = seen.counted.sum(-1, dtype=torch.float32).expand(batch, kv_heads)
        values = grouped.flatten(1, 2)
        return cls(
            values=values,
            tiles=_tiles(values, -(-key_length // TILE_MMA.kv_block)),
            live=seen.live.flatten(1, 2).to(torch.uint8),
            keys=keys.to(torch.uint8),
            counts=counts.contiguous(),
        )

    def boxes(self) -> TensorMap | None:
        """How TMA copies tiles of the values, as copied_mask.cuh wants them; None where it cannot.

        It takes keys one behind the other, and 16 bytes as the unit of where rows begin. A dim that
        is broadcast has one element; with one query a box is one row.
        """
        values, size = self.values, self.values.element_size()
        *outer, of_key = (stride * size for stride in _strides(values))
        if of_key != size:
            return None
        anything = -(-values.shape[3] * size // UNIT) * UNIT  # of a dim with one element
        boxes = TensorMap(
            values.data_ptr(),
            size,
            sizes=tuple(
                length if stride else 1
                for length, stride in zip(values.shape, (*outer, of_key), strict=True)
            ),
            strides=tuple(stride or anything for stride in outer),
            box=(
                1,
                1,
                TILE_MMA.q_block if outer[2] else 1,
                min(TILE_MMA.kv_block, WIDEST_ROW // size),
            ),
        )
        return boxes if boxes.is_possible else None

    def packed(self) -> tuple[int, ...]:
        """As ``struct Mask``."""
        kind = KINDS[self.values.dtype]
        return (self.values.data_ptr(), *_strides(self.values), kind)


def flags(bits: Tensor) -> tuple[int, ...]:
    """Bits (B|1, heads|1, tokens|1, ...) as ``struct Flags``."""
    return (bits.data_ptr(), *_strides(bits)[:3])


def _strides(x: Tensor) -> tuple[int, ...]:
    """Zero where a dim is broadcast."""
    return tuple(
        0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    )


def _tiles(values: Tensor, key_blocks: int) -> Tensor:
    """What each tile is: uint8 (B|1, H|1, M|1, N)."""
    is_bool = values.dtype == torch.bool
    seen = values if is_bool else values != -inf
    plain = values if is_bool else values == 0
    sees = _any(seen, TILE_MMA.q_block, 2)
    sees = _any(sees, TILE_MMA.kv_block, 3)
    differs = _any(~plain, TILE_MMA.q_block, 2)
    differs = _any(differs, TILE_MMA.kv_block, 3)
    tiles = torch.where(differs, _MIXED, _SHOWS_ALL).masked_fill_(~sees, _HIDES_ALL)
    return tiles.to(torch.uint8).expand(-1, -1, -1, key_blocks).contiguous()


def _any(x: Tensor, width: int, dim: int) -> Tensor:
    """Whether any of each ``width`` elements along a dim; a dim of size 1 stays one."""
    length = x.shape[dim]
    if length == 1:
        return x
    missing = -length % width
    padding = [0, 0] * (x.dim() - dim - 1) + [0, missing]
    return torch.unflatten(F.pad(x, padding), dim, (-1, width)).any(dim + 1)
