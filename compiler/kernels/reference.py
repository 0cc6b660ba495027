"""Every recipe in readable PyTorch, step for step as the kernels compute it: their oracle.

Sources: SageAttention2 (arXiv 2411.10958) for smoothing, INT4/INT8 per-thread scales, FP8 P and V
and two-level accumulation; SageAttention (arXiv 2410.02367) for K smoothing and FP16 P and V;
FlashAttention-2 (arXiv 2307.08691) for the online softmax. docs/numerics.md states the rules.

Shapes: B batch, H query heads, Hkv key/value heads, G = H / Hkv, Lq and Lk lengths, D head_dim,
Dv value head_dim, n keys of one tile; blocks of statistics: one for all keys, or one for each tile.
Query heads are kept as (Hkv, G), so that K and V of a group are never repeated. All arithmetic is
float32; products of integers are exact in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, log, log2, nan
from typing import Final, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_compiler.kernels.masking import mask_tile, visible_band
from sage_compiler.kernels.quantize import (
    E4M3_MAX,
    INTEGER_LIMIT,
    P_FACTOR,
    QuantizedValue,
    block_means,
    for_tokens,
    key_groups,
    quantize_tokens,
    quantize_value,
    query_groups,
    statistics_width,
    value_limit,
)
from sage_compiler.kernels.visibility import (
    Visibility,
    count_in_blocks,
    group_mask,
    visibility,
    visible_tiles,
)
from sage_compiler.precision import Accumulator, Format, Recipe, Statistics
from sage_compiler.semantics import Band, DeadRows, Semantics

LOG2_E: Final = 1.0 / log(2.0)
LN_2: Final = log(2.0)
LOG2_E4M3_MAX: Final = log2(E4M3_MAX)

# The models of the FP8 tensor core's accumulators: mma.m16n8k32 adds 32 products at a time. Of
# float32's 23 mantissa bits, 13 survive in FP22.
FP8_STEP: Final = 32
_FP22_MASK: Final = ~((1 << (23 - 13)) - 1)

_PLAIN: Final = Semantics()


@torch.no_grad()
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recipe: Recipe,
    semantics: Semantics = _PLAIN,
    *,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    splits: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attention in the precision of ``recipe``. Not differentiable; inputs are not checked.

    Args:
        query: (B, H, Lq, D), float32, bfloat16 or float16; any strides.
        key, value: (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv), H a multiple of Hkv.
        recipe: any combination of its fields, not only the named ones.
        semantics: band, scale, softcap, dead rows.
        attn_mask: bool (True: visible) or float (added to the scores, natural-log units),
            broadcastable to (B, H, Lq, Lk).
        sinks: (H,), one more logit per head, which takes part in the denominator only.
        splits: parts of the keys, at least 1, each with a running maximum of its own; see "Split
            keys" of docs/numerics.md.

    Returns:
        The output (B, H, Lq, Dv) in query's dtype, and the LSE (B, H, Lq) in float32: natural
        logarithm, sink included, -inf for a row that sees nothing and has no sink.
    """
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    if min(batch, heads, query_length, key_length) == 0:
        return _without_keys(query, value_dim, sinks)
    if head_dim == 0:  # all scores are zero; one zero channel says the same
        query, key = F.pad(query, (0, 1)), F.pad(key, (0, 1))

    group = heads // kv_heads
    band = semantics.band(query_length, key_length)
    mask = None if attn_mask is None else group_mask(attn_mask, kv_heads, group)
    width = recipe.tile.kv_block
    seen = visibility(mask, band, query_length, key_length, width, query.device)
    seen = count_in_blocks(seen, statistics_width(key_length, recipe))

    query = torch.unflatten(query, 1, (kv_heads, group))
    scores = _quantize_scores(query, key, seen, recipe, semantics, mask, band)
    v = quantize_value(value, seen.reachable, seen.counted, recipe)

    at_once = width * recipe.tile.softmax_blocks
    tiles = list(visible_tiles(band, query_length, key_length, at_once))
    state = _start(query, value_dim)
    for part in in_parts(tiles, splits):
        of_part = _start(query, value_dim)
        for start, stop in part:
            of_part = _step(of_part, scores.tile(start, stop), v.tile(start, stop), recipe)
        state = _join(state, of_part)

    output = state.output / state.total.unsqueeze(-1)
    if recipe.statistics is Statistics.HEAD:
        # The rows of P now sum to 1, so the offset returns as it is.
        if recipe.pv is Format.FP8:
            # The rounded P may sum to a little more than 1, which may not make an infinity.
            most = value_limit(recipe)
            output = output.clamp(-most, most)
        output = output * v.scale.unsqueeze(2) + v.offset.unsqueeze(2)
    output = output.masked_fill((state.maximum == -inf).unsqueeze(-1), 0.0)
    lse = state.maximum + torch.log2(state.total / P_FACTOR[recipe.pv])
    if not scores.row_term_inside:  # every score of a row is too low by it, and so is the LSE
        lse = lse + scores.row_term.squeeze(-1)
    # The sink joins here: in the running maximum a large sink would cost P its range.
    if sinks is not None:
        sink = to_log2(sinks.reshape(kv_heads, group, 1))
        with_sink = torch.logaddexp2(lse, sink.masked_fill(sink == inf, nan))
        output = output * torch.exp2(lse - with_sink).unsqueeze(-1)  # the keys' share
        lse = with_sink
    dead_value = nan if semantics.dead_rows is DeadRows.NAN else 0.0
    output = output.masked_fill((lse == -inf).unsqueeze(-1), dead_value)
    return output.flatten(1, 2).to(query.dtype).contiguous(), (lse * LN_2).flatten(1, 2)


def _without_keys(query: Tensor, value_dim: int, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """No key at all, or no query: zeros, and an LSE of the sink alone."""
    logits = query.new_full((query.shape[1],), -inf) if sinks is None else sinks
    lse = logits.float().unsqueeze(-1).expand(query.shape[:3]).contiguous()
    return query.new_zeros(*query.shape[:3], value_dim), lse


@dataclass(frozen=True, slots=True)
class _Scores:
    """Quantized Q and K, and all that turns their product into scores, tile by tile.

    Attributes:
        query: integers (B, Hkv, G, Lq, D).
        query_scale: (B, Hkv, G, Lq, 1), with the factor of the scores folded in.
        block_mean: (B, Hkv, G, blocks, D), means of the query blocks times that factor; None
            without Q smoothing. ``q_block`` is the length of a block.
        key: integers (B, Hkv, Lk, D).
        key_scale: (B, Hkv, Lk).
        smooth_key: (B, Hkv, Lk, D), K' before quantization.
        row_term: (B, Hkv, G, Lq, blocks), q . mean K times the factor of the scores: what K
            smoothing takes from the scores of a row in a block; zero without it.
        row_term_inside: whether the scores have it back; if not, there is one block.
        block_width: keys of a block.
        softcap, mask, band: what is done to the scores; the mask as from ``group_mask``.
    """

    query: Tensor
    query_scale: Tensor
    block_mean: Tensor | None
    q_block: int
    key: Tensor
    key_scale: Tensor
    smooth_key: Tensor
    row_term: Tensor
    row_term_inside: bool
    block_width: int
    softcap: float | None
    mask: Tensor | None
    band: Band | None

    def tile(self, start: int, stop: int) -> Tensor:
        """Scores of keys start..stop-1 in units of log 2: (B, Hkv, G, Lq, n), -inf: not seen."""
        query_length = self.query.shape[3]
        scores = _times_keys(self.query, self.key[..., start:stop, :])
        scores *= self.query_scale
        scores *= self.key_scale[:, :, None, None, start:stop]
        if self.block_mean is not None:
            mean_scores = _times_keys(self.block_mean, self.smooth_key[..., start:stop, :])
            scores += for_tokens(mean_scores, self.q_block, query_length)
        if self.row_term_inside:
            block = start // self.block_width
            scores += self.row_term[..., block : block + 1]
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * (self.softcap * LOG2_E)
        if self.mask is not None:
            tile = mask_tile(self.mask, start, stop)
            if tile.dtype == torch.bool:
                scores.masked_fill_(~tile, -inf)
            else:
                scores += to_log2(tile)
        if self.band is not None:
            inside = visible_band(self.band, query_length, start, stop, scores.device)
            scores.masked_fill_(~inside, -inf)
        return scores


def _quantize_scores(
    query: Tensor,
    key: Tensor,
    seen: Visibility,
    recipe: Recipe,
    semantics: Semantics,
    mask: Tensor | None,
    band: Band | None,
) -> _Scores:
    """Smooth and quantize Q (B, Hkv, G, Lq, D) and K (B, Hkv, Lk, D)."""
    tile, device = recipe.tile, query.device
    limit = INTEGER_LIMIT[recipe.qk]
    scale = semantics.scale_for(query.shape[-1])
    # A key nobody sees, and a query that sees nothing, are zeros: NaN there has no effect.
    reachable, live = seen.reachable.unsqueeze(-1), seen.live.unsqueeze(-1)
    k = torch.where(reachable, key.float(), 0.0)
    q = torch.where(live, query.float(), 0.0)

    width = statistics_width(k.shape[2], recipe)
    key_mean = k.new_zeros(*k.shape[:2], -(-k.shape[2] // width), k.shape[3])
    if recipe.smooth_k:
        key_mean = block_means(k, seen.counted, width)
        k = torch.where(reachable, k - for_tokens(key_mean, width, k.shape[2]), 0.0)
    row_term = _times_keys(q, key_mean) * scale

    # exp2 needs scores in units of log 2; a softcap needs them in natural units first.
    factor = scale
    if semantics.softcap is None:
        factor, row_term = scale * LOG2_E, row_term * LOG2_E
    block_mean = None
    if recipe.smooth_q:
        lives = seen.live.expand(*seen.live.shape[:-1], q.shape[3])
        mean = block_means(q, lives, tile.q_block)
        q = torch.where(live, q - for_tokens(mean, tile.q_block, q.shape[3]), 0.0)
        block_mean = mean * factor

    q_groups = query_groups(q.shape[3], recipe.granularity, tile, device)
    k_groups = key_groups(k.shape[2], recipe.granularity, tile, device)
    q_integers, q_scale = quantize_tokens(q, seen.live, q_groups, limit)
    k_integers, k_scale = quantize_tokens(k, seen.counted, k_groups, limit)
    return _Scores(
        query=q_integers,
        query_scale=q_scale.unsqueeze(-1) * factor,
        block_mean=block_mean,
        q_block=tile.q_block,
        key=k_integers,
        key_scale=k_scale,
        smooth_key=k,
        row_term=row_term,
        # A term that all scores of a row share changes nothing but the LSE and the softcap.
        row_term_inside=recipe.statistics is Statistics.KV_BLOCK or semantics.softcap is not None,
        block_width=width,
        softcap=semantics.softcap,
        mask=mask,
        band=band,
    )


def _times_keys(rows: Tensor, keys: Tensor) -> Tensor:
    """(B, Hkv, G, L, D) @ (B, Hkv, n, D)^T -> (B, Hkv, G, L, n)."""
    return torch.unflatten(rows.flatten(2, 3) @ keys.mT, 2, rows.shape[2:4])


def to_log2(x: Tensor) -> Tensor:
    """x * log2(e) in float32, where finite stays finite: finfo.min must not become -inf."""
    limit = torch.finfo(torch.float32).max
    return torch.where(x.isinf(), x, (x.float() * LOG2_E).clamp(-limit, limit)).float()


@dataclass(frozen=True, slots=True)
class _State:
    """The online softmax of every row, relative to its running maximum.

    Attributes:
        maximum: (B, Hkv, G, Lq), units of log 2; -inf until a key is seen.
        total: same shape, the denominator times the static factor of P.
        output: (B, Hkv, G, Lq, Dv), the numerator times that factor; with statistics of the head,
            of the quantized V.
    """

    maximum: Tensor
    total: Tensor
    output: Tensor


def _start(query: Tensor, value_dim: int) -> _State:
    """Before the first key; query (B, Hkv, G, Lq, D) gives shape and device."""
    rows = query.shape[:-1]
    zeros = query.new_zeros(rows, dtype=torch.float32)
    return _State(zeros - inf, zeros, zeros.new_zeros(*rows, value_dim))


def _step(state: _State, scores: Tensor, value: QuantizedValue, recipe: Recipe) -> _State:
    """Add one tile: scores (B, Hkv, G, Lq, n), which are overwritten, and its n keys of V."""
    highest = scores.amax(-1)
    maximum = torch.maximum(state.maximum, highest)
    by_block = recipe.statistics is Statistics.KV_BLOCK
    relative_to = highest if by_block else maximum
    exponents = scores.sub_(_origin(relative_to).unsqueeze(-1))
    weights, row_sum = _quantize_weights(exponents, recipe.pv)
    product = _product(weights.flatten(2, 3), value.data, recipe)
    product = torch.unflatten(product, 2, weights.shape[2:4])

    # Make the tile and the sums so far relative to the new maximum; the tile before its V returns
    # to its size, so that a tile without weight adds zero however large its V is.
    share = torch.exp2(relative_to - _origin(maximum))
    decay = torch.exp2(state.maximum - _origin(maximum))
    row_sum, product = row_sum * share, product * share.unsqueeze(-1)
    if by_block:
        product = product * value.scale.unsqueeze(2)
        product += row_sum.unsqueeze(-1) * value.offset.unsqueeze(2)
    return _State(
        maximum,
        state.total * decay + row_sum,
        state.output * decay.unsqueeze(-1) + product,
    )


def in_parts(tiles: Sequence[tuple[int, int]], parts: int) -> Iterator[Sequence[tuple[int, int]]]:
    """The tiles in so many parts, in order: the first ones have one more where it must be."""
    size, more = divmod(len(tiles), parts)
    for part in range(parts):
        first = part * size + min(part, more)
        yield tiles[first : first + size + (part < more)]


def _join(state: _State, other: _State) -> _State:
    """Two parts of the keys, relative to the maximum of both."""
    maximum = torch.maximum(state.maximum, other.maximum)
    shares = [torch.exp2(each.maximum - _origin(maximum)) for each in (state, other)]
    return _State(
        maximum,
        state.total * shares[0] + other.total * shares[1],
        state.output * shares[0].unsqueeze(-1) + other.output * shares[1].unsqueeze(-1),
    )


def _origin(maximum: Tensor) -> Tensor:
    """What exponents are taken relative to; -inf - -inf must not arise."""
    return maximum.masked_fill(maximum == -inf, 0.0)


def _quantize_weights(exponents: Tensor, pv: Format) -> tuple[Tensor, Tensor]:
    """P = exp2(exponents) times the static factor, in its format, and its row sums.

    The row sum is taken before rounding for floating point, where the kernel has P at hand in
    float32, and after rounding for integers, whose rounding errors then cancel in the quotient.
    """
    match pv:
        case Format.FP8:
            # The factor costs nothing: it is part of the maximum that is subtracted.
            weights = exponents.add_(LOG2_E4M3_MAX).exp2_()
            return weights.to(torch.float8_e4m3fn).float(), weights.sum(-1)
        case Format.FP16:
            weights = exponents.exp2_()
            return weights.half().float(), weights.sum(-1)
        case _:
            weights = exponents.exp2_().mul_(P_FACTOR[pv]).round_()
            return weights, weights.sum(-1)


def _product(weights: Tensor, value: Tensor, recipe: Recipe) -> Tensor:
    """P (B, Hkv, G * Lq, n) @ V (B, Hkv, n, Dv), in an accumulator of its own."""
    if recipe.pv is Format.INT16:
        # Two bytes, each an exact integer product: 255 * 127 * 512 keys is below 2**24.
        high = torch.floor(weights / 256)
        return (high @ value) * 256 + (weights - high * 256) @ value
    match recipe.accumulator:
        case Accumulator.FP32:
            return weights @ value
        case Accumulator.FP22:
            return _fp22_product(weights, value)
        case Accumulator.FP16:
            return _fp16_product(weights, value)
        case _:
            assert_never(recipe.accumulator)


def _fp22_product(weights: Tensor, value: Tensor) -> Tensor:
    """weights @ value, the sum cut to 13 mantissa bits after every 32 keys. A model.

    Real hardware also aligns and cuts the products inside a step; that is not modelled.
    """
    total = weights.new_zeros(*weights.shape[:-1], value.shape[-1])
    for part in _steps(weights, value):
        total = ((total + part).view(torch.int32) & _FP22_MASK).view(torch.float32)
    return total


def _fp16_product(weights: Tensor, value: Tensor) -> Tensor:
    """weights @ value, the sum rounded to FP16 after every 32 keys: SageAttention2++.

    Its source is arXiv 2505.21136. The scale of V keeps the sum of a tile in range.
    """
    total = weights.new_zeros(*weights.shape[:-1], value.shape[-1])
    for part in _steps(weights, value):
        total = (total + part).half().float()
    return total


def _steps(weights: Tensor, value: Tensor) -> Iterator[Tensor]:
    """The products of 32 keys each."""
    for start in range(0, weights.shape[-1], FP8_STEP):
        stop = start + FP8_STEP
        yield weights[..., start:stop] @ value[..., start:stop, :]
