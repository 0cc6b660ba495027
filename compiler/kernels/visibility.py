"""Which tokens an attention sees, and which of them count in quantization statistics.

Masked slots of a static cache, padding and garbage must have no weight in a mean or an amax:
with 300 of 4096 slots live, counting the others multiplies the error of INT4 by three to six.

Shapes: B batch, Hkv key/value heads, G query heads per key/value head, Lq and Lk lengths. A
dim that a mask broadcasts keeps size 1 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Final

import torch
from torch import Tensor

from sage_compiler.kernels.masking import mask_tile, visible_band
from sage_compiler.semantics import Band

NEGLIGIBLE_BIAS: Final = -5000.0
"""A key with this bias or less is padding in disguise (masks use -1e4 or finfo.min): next to any
key above it, its softmax weight is zero for every score below thousands. Such a key stays an
additive term, but does not count in statistics, unless its whole row lies this low; then the
row is an ordinary softmax over all of its keys."""


@dataclass(frozen=True, slots=True)
class Visibility:
    """What the queries of one call see, as booleans.

    Attributes:
        reachable: (B|1, Hkv|1, Lk), some query of the head sees the key.
        counted: same shape, the reachable keys that count in statistics.
        live: (B|1, Hkv|1, G|1, Lq|1), the query sees some key.
    """

    reachable: Tensor
    counted: Tensor
    live: Tensor


def group_mask(attn_mask: Tensor, kv_heads: int, group: int) -> Tensor:
    """View a mask of 1 to 4 dims as (B|1, Hkv|1, G|1, Lq|1, Lk|1); expanded dims become size 1."""
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    for dim in range(4):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask.unsqueeze(2) if mask.shape[1] == 1 else torch.unflatten(mask, 1, (kv_heads, group))


def visible_tiles(
    band: Band | None, query_length: int, key_length: int, width: int
) -> Iterator[tuple[int, int]]:
    """The tiles (start, stop) of keys, ``width`` wide, that the band shows to some query."""
    first, last = _visible_keys(band, query_length, key_length)
    for start in range(first - first % width, last, width):
        yield start, min(start + width, key_length)


def visibility(
    mask: Tensor | None,
    band: Band | None,
    query_length: int,
    key_length: int,
    width: int,
    device: torch.device,
) -> Visibility:
    """Find what is visible through a band and a mask from ``group_mask``.

    A band alone is solved in closed form; a mask is read in tiles of ``width`` keys.
    """
    if mask is None:
        return _through_band(band, query_length, key_length, device)

    # A row that sees a key of ordinary bias ignores its keys of negligible bias.
    live = torch.zeros(*mask.shape[:3], 1, dtype=torch.bool, device=device)
    discerning = live
    for start, stop in visible_tiles(band, query_length, key_length, width):
        seen, ordinary = _seen(mask, band, query_length, start, stop)
        live = live | seen.any(-1)
        discerning = discerning | ordinary.any(-1)

    reachable = torch.zeros(*mask.shape[:2], key_length, dtype=torch.bool, device=device)
    counted = torch.zeros_like(reachable)
    for start, stop in visible_tiles(band, query_length, key_length, width):
        seen, ordinary = _seen(mask, band, query_length, start, stop)
        counts = ordinary | (seen & ~discerning.unsqueeze(-1))
        reachable[..., start:stop] = seen.any(-2).any(-2)
        counted[..., start:stop] = counts.any(-2).any(-2)
    return Visibility(reachable, counted, live)


def count_in_blocks(seen: Visibility, width: int) -> Visibility:
    """Let every reachable key count in a block of ``width`` keys where none would."""
    counted = seen.counted.clone()
    blocks = zip(counted.split(width, -1), seen.reachable.split(width, -1), strict=True)
    for counted_here, reachable_here in blocks:
        counted_here |= reachable_here & ~counted_here.any(-1, keepdim=True)
    return replace(seen, counted=counted)


def _seen(
    mask: Tensor, band: Band | None, query_length: int, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Which keys start..stop-1 each query sees, and which with an ordinary bias."""
    tile = mask_tile(mask, start, stop)
    if tile.dtype == torch.bool:
        seen = ordinary = tile
    else:
        # Written as negations so that a NaN bias is seen, and counts.
        seen, ordinary = tile != -inf, ~(tile <= NEGLIGIBLE_BIAS)
    if band is not None:
        inside = visible_band(band, query_length, start, stop, mask.device)
        seen, ordinary = seen & inside, ordinary & inside
    return seen, ordinary


def _visible_keys(band: Band | None, query_length: int, key_length: int) -> tuple[int, int]:
    """The keys first..last-1 are visible to some query; first >= last when none is."""
    first, last = 0, key_length
    if band is not None:
        # The rows' intervals move right by one per row, so their union has no gap.
        if band.left is not None:
            first = max(first, band.offset - band.left)
        if band.right is not None:
            last = min(last, query_length + band.offset + band.right)
    return first, last


def _through_band(
    band: Band | None, query_length: int, key_length: int, device: torch.device
) -> Visibility:
    first, last = _visible_keys(band, query_length, key_length)
    key = torch.arange(key_length, device=device)
    reachable = ((key >= first) & (key < last)).view(1, 1, key_length)
    query = torch.arange(query_length, device=device)
    live = torch.ones(query_length, dtype=torch.bool, device=device)
    if band is not None:
        if band.left is not None:
            live &= query + band.offset - band.left < key_length
        if band.right is not None:
            live &= query + band.offset + band.right >= 0
    return Visibility(reachable, reachable, live.view(1, 1, 1, query_length))
