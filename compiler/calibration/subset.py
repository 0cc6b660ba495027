"""A part of the heads and queries of a call, where measuring all of them takes too long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from sage_compiler.calibration.probe import Call
from sage_compiler.errors import InvalidOptionError
from sage_compiler.kernels.masking import visible_band
from sage_compiler.precision import TILE_MMA
from sage_compiler.semantics import Semantics

# Queries are taken in whole blocks: those that are smoothed together stay together.
_BLOCK: Final = TILE_MMA.q_block


@dataclass(frozen=True, slots=True)
class Subset:
    """How much of every call is measured; all keys always are.

    Attributes:
        heads: about so many query heads, evenly spread, whole groups of them; None: all.
        queries: about so many queries, in evenly spread blocks of 128; None: all.

    Raises:
        InvalidOptionError: a number below 1.
    """

    heads: int | None = None
    queries: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("heads", self.heads), ("queries", self.queries)):
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidOptionError(
                    f"{name}={value!r}; it must be a number from 1 up, or None for all"
                )

    def __str__(self) -> str:
        parts = (("heads", self.heads), ("queries", self.queries))
        return ", ".join(f"{value} {name}" for name, value in parts if value is not None)

    def of(self, call: Call) -> Call:
        """The part of a call that is measured; the call itself where that is all of it."""
        if self.heads is not None and self.heads < call.query.shape[1]:
            call = _some_heads(call, self.heads)
        if self.queries is not None:
            blocks = -(-self.queries // _BLOCK)
            if blocks * _BLOCK < call.query.shape[2]:
                call = _some_queries(call, blocks)
        return call


def _some_heads(call: Call, heads: int) -> Call:
    kv_heads = call.key.shape[1]
    group = call.query.shape[1] // kv_heads
    kept = _spread(max(1, heads // group), kv_heads).to(call.query.device)
    queries = (kept.unsqueeze(1) * group + torch.arange(group, device=kept.device)).flatten()
    mask = call.attn_mask
    if mask is not None and mask.dim() >= 3 and mask.shape[-3] > 1:
        mask = mask.index_select(-3, queries)
    return replace(
        call,
        query=call.query.index_select(1, queries),
        key=call.key.index_select(1, kept),
        value=call.value.index_select(1, kept),
        attn_mask=mask,
        sinks=None if call.sinks is None else call.sinks.index_select(0, queries),
    )


def _some_queries(call: Call, blocks: int) -> Call:
    length, key_length = call.query.shape[2], call.key.shape[2]
    first = _spread(blocks, -(-length // _BLOCK)) * _BLOCK
    rows = (first.unsqueeze(1) + torch.arange(_BLOCK)).flatten()
    rows = rows[rows < length].to(call.query.device)
    mask = call.attn_mask
    if mask is not None and mask.dim() >= 2 and mask.shape[-2] > 1:
        mask = mask.index_select(-2, rows)
    # Positions are lost with the other queries: the band becomes an explicit mask.
    semantics = call.semantics
    band = semantics.band(length, key_length)
    if band is not None:
        visible = visible_band(band, length, 0, key_length, rows.device).index_select(0, rows)
        mask = _joined(mask, visible)
        semantics = Semantics(
            scale=semantics.scale, softcap=semantics.softcap, dead_rows=semantics.dead_rows
        )
    return replace(
        call, query=call.query.index_select(2, rows), attn_mask=mask, semantics=semantics
    )


def _joined(mask: Tensor | None, visible: Tensor) -> Tensor:
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return torch.where(visible, mask, -torch.inf)


def _spread(number: int, total: int) -> Tensor:
    """``number`` of the indices 0 to total - 1, evenly spread, each once."""
    number = min(number, total)
    return torch.arange(number) * total // number
