"""The operands of a recipe's matrix products before rounding, from docs/numerics.md in float64.

Dense and slow, with loops over groups, blocks and tiles; independent of the bodies and of the
arithmetic of the reference. Shapes: queries (B, Hkv, G, Lq, D), keys (B, Hkv, Lk, D), rows of
scores (B, Hkv, G, Lq, Lk).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from sage_compiler.kernels.quantize import (
    INTEGER_LIMIT,
    P_FACTOR,
    key_groups,
    query_groups,
    statistics_width,
)
from sage_compiler.precision import Format, Recipe, Statistics
from tests.compiler.kernels.dense import Call, class_mask


@dataclass(frozen=True)
class Operands:
    """What is rounded to the codes of Q, K and V, and what makes scores of the codes.

    Attributes:
        query, key, value: in units of a code.
        query_scale, key_scale: (B, Hkv, G, Lq, 1) and (B, Hkv, Lk, 1).
        extra: rows of scores, what smoothing took from them and gives back before the softcap.
        shown: rows of scores, what the band and a bool mask show.
    """

    query: Tensor
    query_scale: Tensor
    key: Tensor
    key_scale: Tensor
    value: Tensor
    extra: Tensor
    shown: Tensor


def operands(call: Call, recipe: Recipe) -> Operands:
    batch, heads, query_length, head_dim = call.query.shape
    kv_heads, key_length = call.key.shape[1], call.key.shape[2]
    by_head = (batch, kv_heads, heads // kv_heads, query_length)
    shown = class_mask(call.semantics, query_length, key_length).expand(*by_head, key_length)
    seen = ordinary = shown
    if call.attn_mask is not None:
        mask = call.attn_mask.expand(batch, heads, query_length, key_length)
        mask = mask.reshape(*by_head, key_length)
        if mask.dtype == torch.bool:
            seen = ordinary = shown = shown & mask
        else:
            seen, ordinary = shown & (mask > -inf), shown & (mask > -5000)
    counts = ordinary | (seen & ~ordinary.any(-1, keepdim=True))
    reachable, counted = (x.any(3).any(2) for x in (seen, counts))  # (B, Hkv, Lk)
    live = seen.any(-1)
    width = statistics_width(key_length, recipe)
    if recipe.statistics is Statistics.KV_BLOCK:
        for here, all_here in zip(
            counted.split(width, -1), reachable.split(width, -1), strict=True
        ):
            here |= all_here & ~here.any(-1, keepdim=True)

    scale = call.semantics.scale_for(head_dim)
    query = call.query.double().reshape(*by_head, head_dim).masked_fill(~live[..., None], 0.0)
    key = call.key.double().masked_fill(~reachable[..., None], 0.0)
    value = call.value.double().masked_fill(~reachable[..., None], 0.0)

    key_mean = _means(key, counted, width)
    smooth_key = (key - key_mean).masked_fill(~reachable[..., None], 0.0)
    extra = query @ key_mean.mT.unsqueeze(2) * scale
    if recipe.statistics is Statistics.HEAD and call.semantics.softcap is None:
        extra = torch.zeros_like(extra)  # the softmax does not notice
    if recipe.smooth_q:
        query_mean = _means(query, live, recipe.tile.q_block)
        query = (query - query_mean).masked_fill(~live[..., None], 0.0)
        extra = extra + query_mean @ smooth_key.mT.unsqueeze(2) * scale

    limit, device = INTEGER_LIMIT[recipe.qk], query.device
    q_groups = query_groups(query_length, recipe.granularity, recipe.tile, device)
    k_groups = key_groups(key_length, recipe.granularity, recipe.tile, device)
    query_scale = _scales(query, live, q_groups) / limit
    key_scale = _scales(smooth_key, counted, k_groups) / limit
    return Operands(
        (query / query_scale).clamp(-limit, limit),
        query_scale,
        (smooth_key / key_scale).clamp(-limit, limit),
        key_scale,
        _value(call, value, counted, reachable, recipe, width),
        extra,
        shown,
    )


def weights(call: Call, recipe: Recipe, found: Operands, query: Tensor, key: Tensor) -> Tensor:
    """P before rounding, from these codes of Q and K: rows of scores."""
    semantics = call.semantics
    scores = query.double() @ key.double().mT.unsqueeze(2) * found.query_scale
    scores = scores * found.key_scale.mT.unsqueeze(2) * semantics.scale_for(query.shape[-1])
    scores = scores + found.extra
    if semantics.softcap is not None:
        scores = semantics.softcap * torch.tanh(scores / semantics.softcap)
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        batch, kv_heads, group, query_length, key_length = scores.shape
        bias = call.attn_mask.expand(batch, kv_heads * group, query_length, key_length)
        # In float32 a score vanishes beside finfo.min.
        scores = (scores.float() + bias.reshape(scores.shape).float()).double()
    scores = scores.masked_fill(~found.shown, -inf)
    tiles, so_far = [], torch.full_like(scores[..., :1], -inf)
    for tile in scores.split(recipe.tile.kv_block, -1):
        highest = tile.amax(-1, keepdim=True)
        so_far = torch.maximum(so_far, highest)
        origin = highest if recipe.statistics is Statistics.KV_BLOCK else so_far
        tiles.append(torch.exp(tile - origin.masked_fill(origin == -inf, 0.0)))
    return torch.cat(tiles, -1) * P_FACTOR[recipe.pv]


def rounded(x: Tensor, number_format: Format) -> Tensor:
    """To the format's nearest number, half to even."""
    match number_format:
        case Format.FP8:
            return x.clamp(-448.0, 448.0).float().to(torch.float8_e4m3fn).float()
        case Format.FP16:
            return x.half().float()
        case _:
            return x.round().float()


def _means(x: Tensor, counted: Tensor, width: int) -> Tensor:
    """For every token the mean of the counted tokens of its block."""
    found = torch.zeros_like(x)
    for start in range(0, x.shape[-2], width):
        here = slice(start, start + width)
        weight = counted[..., here, None].double()
        total = (x[..., here, :] * weight).sum(-2, keepdim=True)
        found[..., here, :] = total / weight.sum(-2, keepdim=True).clamp(min=1)
    return found


def _scales(x: Tensor, counted: Tensor, groups: Tensor) -> Tensor:
    """For every token the amax of the counted tokens of its group: (..., L, 1)."""
    found = torch.zeros_like(x[..., :1])
    amax = x.abs().amax(-1, keepdim=True) * counted[..., None]
    for group in groups.unique():
        here = groups == group
        found[..., here, :] = amax[..., here, :].amax(-2, keepdim=True)
    return found.clamp(min=1e-37)


def _value(
    call: Call, value: Tensor, counted: Tensor, reachable: Tensor, recipe: Recipe, width: int
) -> Tensor:
    if recipe.pv is Format.FP16 and call.value.dtype == torch.float16:
        return value
    found = torch.zeros_like(value)
    for start in range(0, value.shape[2], width):
        here = slice(start, start + width)
        v, counts = value[:, :, here], counted[:, :, here, None]
        amax = (v.abs() * counts).amax(2, keepdim=True).clamp(min=1e-37)
        match recipe.pv:
            case Format.FP8:
                found[:, :, here] = (v / (amax / 448)).clamp(-448, 448)
            case Format.FP16:
                found[:, :, here] = v / torch.exp2(amax.log2().floor() - 14)
            case _:
                high = v.masked_fill(~counts, -inf).amax(2, keepdim=True)
                low = v.masked_fill(~counts, inf).amin(2, keepdim=True)
                step = ((high - low) / 254).clamp(min=1e-37)
                found[:, :, here] = ((v - (high + low) / 2) / step).clamp(-127, 127)
    return found.masked_fill(~reachable[..., None], 0.0).nan_to_num(0.0)
