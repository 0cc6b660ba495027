"""Masks as tensors, in tiles, so that no kernel needs the full (Lq, Lk) matrix at once."""

from __future__ import annotations

import torch
from torch import Tensor

from sage_compiler.semantics import Band


def visible_band(
    band: Band, query_length: int, start: int, stop: int, device: torch.device
) -> Tensor:
    """Which keys start..stop-1 the band shows to each query: bool (query_length, stop - start)."""
    query = torch.arange(query_length, device=device).unsqueeze(1) + band.offset
    key = torch.arange(start, stop, device=device).unsqueeze(0)
    visible = torch.ones(query_length, stop - start, dtype=torch.bool, device=device)
    if band.left is not None:
        visible &= key >= query - band.left
    if band.right is not None:
        visible &= key <= query + band.right
    return visible


def mask_tile(attn_mask: Tensor, start: int, stop: int) -> Tensor:
    """Columns start..stop-1 of a mask broadcastable to (B, H, Lq, Lk); a size-1 key dim stays."""
    return attn_mask if attn_mask.shape[-1] == 1 else attn_mask[..., start:stop]
