"""The quantizers of the reference: scales by group of tokens, integers, FP8 and FP16 values.

Values are held in float32 tensors that contain exactly what a kernel's operand would contain.
Formulas: SageAttention2 (arXiv 2411.10958), sections 3.1 to 3.3; the midpoint of V is ours.

Non-finite input: an integer cannot hold a NaN, so the scale of its group does. A group with a
NaN or an infinity in any reachable token, counted or not, has scale NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, nan
from types import MappingProxyType
from typing import Final, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from sage_compiler.precision import Accumulator, Format, Granularity, Recipe, Statistics, Tile

E4M3_MAX: Final = 448.0
FP16_MAX: Final = 65504.0
FP16_ACCUMULATOR_MAX: Final = 2.25  # of |V| in E4M3: 64 keys * 448 * 2.25 stays below FP16_MAX
FP16_TOP_EXPONENT: Final = 15  # 2**15 is the largest power of two below FP16_MAX
SMALLEST_SCALE: Final = 2.0**-126  # smallest normal float32: a group of zeros is not 0/0

P_FACTOR: Final[Mapping[Format, float]] = MappingProxyType(
    {Format.FP8: E4M3_MAX, Format.FP16: 1.0, Format.INT8: 255.0, Format.INT16: 65535.0}
)
"""The static factor that makes P in [0, 1] fill the range of its format; the PV formats."""

INTEGER_LIMIT: Final[Mapping[Format, int]] = MappingProxyType({Format.INT4: 7, Format.INT8: 127})
"""The largest magnitude of quantized Q and K."""

# The accumulator of mma m16n8: a lane holds rows lane/4 and lane/4 + 8 of every 16, and columns
# 2*(lane%4) and 2*(lane%4) + 1 of every 8. So one scale of Q and one of K serve a whole thread.
_ROWS_PER_LANE_GROUP: Final = 8
_COLUMNS_PER_LANE: Final = 2
_COLUMNS_PER_ATOM: Final = 8


def query_groups(length: int, granularity: Granularity, tile: Tile, device: torch.device) -> Tensor:
    """The scale group of every query token: int64 (length,)."""
    token = torch.arange(length, device=device)
    match granularity:
        case Granularity.TENSOR:
            return torch.zeros_like(token)
        case Granularity.BLOCK:
            return token // tile.q_block
        case Granularity.WARP:
            return token // tile.q_warp
        case Granularity.THREAD:
            lane_group = token % _ROWS_PER_LANE_GROUP
            return token // tile.q_warp * _ROWS_PER_LANE_GROUP + lane_group
        case Granularity.TOKEN:
            return token
        case _:
            assert_never(granularity)


def key_groups(length: int, granularity: Granularity, tile: Tile, device: torch.device) -> Tensor:
    """The scale group of every key token: int64 (length,)."""
    token = torch.arange(length, device=device)
    match granularity:
        case Granularity.TENSOR:
            return torch.zeros_like(token)
        case Granularity.BLOCK | Granularity.WARP:
            return token // tile.kv_block
        case Granularity.THREAD:
            lane = token % _COLUMNS_PER_ATOM // _COLUMNS_PER_LANE
            lanes = _COLUMNS_PER_ATOM // _COLUMNS_PER_LANE
            return token // tile.kv_block * lanes + lane
        case Granularity.TOKEN:
            return token
        case _:
            assert_never(granularity)


def statistics_width(key_length: int, recipe: Recipe) -> int:
    """How many keys, from key 0 on, make one block of statistics."""
    match recipe.statistics:
        case Statistics.HEAD:
            return key_length
        case Statistics.KV_BLOCK:
            return recipe.tile.kv_block
        case _:
            assert_never(recipe.statistics)


def in_blocks(x: Tensor, width: int) -> Tensor:
    """Cut the tokens of x (..., L, D), filled up with zeros: (..., blocks, width, D)."""
    blocks = -(-x.shape[-2] // width)
    missing = blocks * width - x.shape[-2]
    return torch.unflatten(F.pad(x, (0, 0, 0, missing)), -2, (blocks, width))


def for_tokens(blocks: Tensor, width: int, length: int) -> Tensor:
    """What belongs to blocks (..., blocks, D), for each of their tokens: (..., length|1, D)."""
    if blocks.shape[-2] == 1:
        return blocks
    return blocks.repeat_interleave(width, dim=-2)[..., :length, :]


def quantize_tokens(
    x: Tensor, counted: Tensor, groups: Tensor, limit: int
) -> tuple[Tensor, Tensor]:
    """Round x to integers in [-limit, limit], one scale for each group of tokens.

    Args:
        x: float32 (..., L, D), zero in tokens that are not reachable.
        counted: bool, broadcastable to (..., L): the tokens whose amax makes the scale.
        groups: int64 (L,), the group of every token.
        limit: 7 or 127.

    Returns:
        The integers, float32 (..., L, D), and the scale of every token, float32 (..., L).
    """
    # inf * 0 and NaN * 0 are NaN: tokens that do not count still report what is not finite.
    amax = x.abs().amax(-1) * counted
    # Groups are numbered below the number of tokens; asking for the largest would wait for a GPU.
    per_group = torch.zeros_like(amax)
    per_group = per_group.scatter_reduce(-1, groups.expand_as(amax), amax, "amax")
    scale = _scale(per_group, limit)[..., groups]
    return _to_range(x / scale.unsqueeze(-1), limit).round_(), scale


def mean_over(x: Tensor, counted: Tensor) -> Tensor:
    """Mean of x (..., L, D) over the counted tokens (bool, (..., L)): (..., 1, D); none: zero."""
    weights = counted.unsqueeze(-1)
    total = torch.where(weights, x, 0.0).sum(-2, keepdim=True)
    return total / weights.sum(-2, keepdim=True).clamp(min=1)


def block_means(x: Tensor, counted: Tensor, width: int) -> Tensor:
    """Means of x (..., L, D) over the counted tokens of each block: (..., blocks, D)."""
    counts = in_blocks(counted.unsqueeze(-1), width).squeeze(-1)
    return mean_over(in_blocks(x, width), counts).squeeze(-2)


@dataclass(frozen=True, slots=True)
class QuantizedValue:
    """V = data * scale + offset, with data in the operand's format.

    Attributes:
        data: float32 (B, Hkv, Lk, Dv).
        scale, offset: float32 (B, Hkv, blocks, Dv), one for each block of ``width`` keys.
    """

    data: Tensor
    scale: Tensor
    offset: Tensor
    width: int

    def tile(self, start: int, stop: int) -> QuantizedValue:
        """Keys start..stop-1, which lie in one block."""
        block = start // self.width
        return QuantizedValue(
            self.data[..., start:stop, :],
            self.scale[:, :, block : block + 1],
            self.offset[:, :, block : block + 1],
            self.width,
        )


def value_limit(recipe: Recipe) -> float:
    """The largest magnitude of V in E4M3."""
    return FP16_ACCUMULATOR_MAX if recipe.accumulator is Accumulator.FP16 else E4M3_MAX


def quantize_value(
    value: Tensor, reachable: Tensor, counted: Tensor, recipe: Recipe
) -> QuantizedValue:
    """Quantize V (B, Hkv, Lk, Dv) in the recipe's PV format, per channel and block of statistics.

    Args:
        value: float32, bfloat16 or float16.
        reachable, counted: bool (B|1, Hkv|1, Lk), from ``visibility``.
    """
    key_length = value.shape[2]
    width = statistics_width(key_length, recipe)
    # Tokens are (..., blocks, width, Dv) from here on, statistics (..., blocks, 1, Dv).
    reachable = in_blocks(reachable.unsqueeze(-1), width)
    counted = in_blocks(counted.unsqueeze(-1), width)
    v = torch.where(reachable, in_blocks(value.float(), width), 0.0)
    offset = v.new_zeros(*v.shape[:3], 1, v.shape[4])
    if recipe.smooth_v:
        offset = mean_over(v, counted.squeeze(-1))
        v = torch.where(reachable, v - offset, 0.0)
    amax = (v.abs() * counted).amax(-2, keepdim=True)
    if recipe.pv is Format.FP8:
        most = value_limit(recipe)
        scale = _scale(amax, most)
        data = _to_range(v / scale, most).to(torch.float8_e4m3fn).float()
    elif recipe.pv is Format.FP16:
        if value.dtype == torch.float16 and not recipe.smooth_v:
            scale, data = torch.ones_like(amax), v
        else:
            scale = power_of_two_scale(amax)
            data = _to_range(v / scale, FP16_MAX).half().float()
    else:  # V in INT8, whatever the bits of P
        middle, scale = _midpoint_and_scale(v, counted, amax)
        data = _to_range((v - middle) / scale, 127).round_()
        data = torch.where(reachable, data, 0.0)
        offset = offset + middle
    data = data.flatten(2, 3)[:, :, :key_length]
    return QuantizedValue(data, scale.squeeze(-2), offset.squeeze(-2), width)


def _scale(amax: Tensor, limit: float) -> Tensor:
    """amax / limit; positive for a group of zeros, NaN for a group that is not finite."""
    return torch.where(amax.isfinite(), (amax / limit).clamp(min=SMALLEST_SCALE), nan)


def _to_range(x: Tensor, limit: float) -> Tensor:
    """Clip to [-limit, limit]: only uncounted tokens reach beyond. NaN stays NaN.

    Needed before a conversion to FP8 too: torch 2.13 saturates infinity, 2.11 makes it NaN.
    """
    return x.clamp(-limit, limit)


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The power of two that brings amax into [2**14, 2**15): room above, precision below."""
    # frexp gives amax in [2**(e-1), 2**e). Below 2**-111 the inverse would leave float32.
    exponent = torch.frexp(amax).exponent.clamp(min=FP16_TOP_EXPONENT - 126)
    scale = torch.ldexp(torch.ones_like(amax), exponent - FP16_TOP_EXPONENT)
    return torch.where(amax.isfinite(), scale, nan)


def _midpoint_and_scale(v: Tensor, counted: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel (max + min) / 2 and (max - min) / 254, over the counted tokens."""
    nothing = ~counted.any(-2, keepdim=True)
    high = torch.where(counted, v, -inf).amax(-2, keepdim=True).masked_fill(nothing, 0.0)
    low = torch.where(counted, v, inf).amin(-2, keepdim=True).masked_fill(nothing, 0.0)
    # Halved first: the difference of two finite extremes may not be finite.
    half_range = (high / 2 - low / 2).masked_fill(~amax.isfinite(), nan)
    return high / 2 + low / 2, _scale(half_range, 127)
