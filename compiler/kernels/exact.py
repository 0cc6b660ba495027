"""The unquantized operator: scaled_dot_product_attention where it can express the call, else
plain float arithmetic. Differentiable, so the operator's gradient is recomputed through it.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_compiler.kernels.masking import visible_band
from sage_compiler.semantics import DeadRows, MaskClass, Semantics

QUERY_CHUNK: Final = 1024  # rows of scores that the float path holds at once


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    *,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Exact attention: (B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv) -> (B, H, Lq, Dv).

    ``attn_mask`` (bool, True = visible, or additive float) broadcasts to (B, H, Lq, Lk);
    ``sinks`` (H,) are logits that only enter the denominator.
    """
    if semantics.softcap is not None or sinks is not None:
        return attention_with_lse(query, key, value, semantics, attn_mask=attn_mask, sinks=sinks)[0]
    query_length, key_length = query.shape[2], key.shape[2]
    if query.shape[1] == 0:  # scaled_dot_product_attention of torch 2.11 divides by the heads
        return query.new_zeros(*query.shape[:3], value.shape[3])
    is_causal = attn_mask is None and (
        semantics.mask_class is MaskClass.CAUSAL
        or (semantics.mask_class is MaskClass.CAUSAL_BOTTOM_RIGHT and query_length == key_length)
    )
    mask = attn_mask if is_causal else _with_band(attn_mask, semantics, query, key)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else torch.atleast_2d(mask),  # its kernels need two dims
        is_causal=is_causal,
        scale=semantics.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if semantics.dead_rows is DeadRows.NAN and mask is not None and key_length:
        visible = mask if mask.dtype == torch.bool else mask > -math.inf
        live = visible.any(-1, keepdim=True)
        output = torch.where(live, output, math.nan)
    return output


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    *,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``attention``, in float32 arithmetic, with the log-sum-exp of the scores.

    Returns (B, H, Lq, Dv) in query's dtype and (B, H, Lq) float32, natural logarithm, the sink
    included; -inf for a row that sees no key and has no sink.
    """
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length = key.shape[1], key.shape[2]
    if min(heads, key_length) == 0:
        return _without_keys(query, value, sinks)
    group = heads // kv_heads
    mask = _with_band(attn_mask, semantics, query, key)
    if mask is not None:
        mask = mask.expand(batch, heads, query_length, key_length).unflatten(1, (kv_heads, group))
    grouped = query.float().unflatten(1, (kv_heads, group))  # (B, Hkv, G, Lq, D)
    keys = key.float().unsqueeze(2)
    values = value.float().unsqueeze(2)
    sink = None if sinks is None else sinks.float().view(kv_heads, group, 1, 1)
    outputs, lses = [], []
    for start in range(0, max(query_length, 1), QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        scores = (grouped[..., rows, :] * semantics.scale_for(head_dim)) @ keys.mT
        if semantics.softcap is not None:
            scores = semantics.softcap * torch.tanh(scores / semantics.softcap)
        if mask is not None:
            tile = mask[..., rows, :]
            if tile.dtype == torch.bool:
                scores = scores.masked_fill(~tile, -math.inf)
            else:
                scores = scores + tile.float()
        if sink is not None:
            scores = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], dim=-1)
        dead = (scores == -math.inf).all(-1, keepdim=True)
        # The softmax of a row of -inf is NaN, and so would be its gradient and that of the LSE.
        scores = scores.masked_fill(dead, 0.0)
        weights = scores.softmax(-1)[..., :key_length]
        empty = math.nan if semantics.dead_rows is DeadRows.NAN else 0.0
        outputs.append((weights @ values).masked_fill(dead, empty))
        lses.append(scores.logsumexp(-1).masked_fill(dead.squeeze(-1), -math.inf))
    output = torch.cat(outputs, dim=-2).flatten(1, 2).to(query.dtype)
    return output, torch.cat(lses, dim=-1).flatten(1, 2)


def _without_keys(query: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = query.shape[:-1]
    lse = query.new_full(rows, -math.inf, dtype=torch.float32)
    if sinks is not None:
        lse = sinks.float().view(1, -1, 1).expand(rows).clone()
    return query.new_zeros((*rows, value.shape[-1])), lse


def _with_band(
    attn_mask: Tensor | None, semantics: Semantics, query: Tensor, key: Tensor
) -> Tensor | None:
    """The explicit mask with the visible band of the mask class applied."""
    query_length, key_length = query.shape[2], key.shape[2]
    band = semantics.band(query_length, key_length)
    if band is None:
        return attn_mask
    visible = visible_band(band, query_length, 0, key_length, query.device)
    if attn_mask is None:
        return visible
    if attn_mask.dtype == torch.bool:
        return attn_mask & visible
    return torch.where(visible, attn_mask, -math.inf)
