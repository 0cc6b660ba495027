"""What the quantizing kernels write: codes and scales, bit by bit those of the reference.

The reference's formulas are applied to the kernels' own means, which differ from torch's in the
last bit; given these, nothing may differ.
"""

from __future__ import annotations

import itertools
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from sage_compiler.kernels.cuda.spec import KeyValueTile
from sage_compiler.kernels.quantize import (
    FP16_ACCUMULATOR_MAX,
    key_groups,
    quantize_tokens,
    quantize_value,
    query_groups,
)
from sage_compiler.precision import RECIPES, TILE_MMA, Accumulator, Format, Granularity
from sage_compiler.semantics import MaskClass
from tests.compiler.kernels.cuda.emulation import RECIPE_VARIANTS, Result, attend, named
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.dense import Call
from tests.cutlass_templates import host

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

LN_2 = log(2.0)  # as the scale of the scores it makes the factor of Q's scales exactly 1
LIMIT = {Format.INT4: 7, Format.INT8: 127}
# Lq, Lk, mask: whole blocks and tails; with dead queries, and with keys that nobody sees.
CASES = [
    (128, 64, MaskClass.NONE),
    (200, 333, MaskClass.NONE),
    (300, 130, MaskClass.CAUSAL_BOTTOM_RIGHT),
    (100, 150, MaskClass.CAUSAL),
]


def quantized(
    recipe: str, accumulator: Accumulator, head_dim: int, case: tuple[int, int, MaskClass]
) -> tuple[Call, Result]:
    query_length, key_length, mask_class = case
    call = make_call(
        query_length,
        key_length,
        head_dim,
        torch.bfloat16 if head_dim == 64 else torch.float16,
        batch=2,
        kv_heads=2,
        group=3,
        mask_class=mask_class,
        scale=LN_2,
    )
    return call, attend(call, recipe, accumulator)


def scratch(result: Result, address: int) -> np.ndarray:
    """The scratch memory at an address, as bytes."""
    found = [memory for memory in result.scratch if memory.data_ptr() == address]
    assert len(found) == 1
    return found[0].numpy()


def floats(result: Result, address: int, *shape: int) -> Tensor:
    return torch.from_numpy(scratch(result, address).view(np.float32).copy()).view(*shape)


def integers(codes: np.ndarray, format_: Format, head_dim: int) -> Tensor:
    """Codes (..., D) of INT8, or of two INT4 in a byte, the first in the low half."""
    if format_ is Format.INT8:
        return torch.from_numpy(codes.view(np.int8).astype(np.float32)).view(-1, head_dim)
    low, high = (codes.astype(np.int8) << 4) >> 4, codes.view(np.int8) >> 4
    return torch.from_numpy(np.stack([low, high], -1).astype(np.float32)).view(-1, head_dim)


def tiles(call: Call, result: Result) -> np.ndarray:
    """The packed tiles as bytes: (B, Hkv, N, bytes of a tile)."""
    batch, kv_heads = call.key.shape[:2]
    memory = scratch(result, result.call.tiles)
    return memory.reshape(batch, kv_heads, -1, result.call.tile.bytes)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("recipe", ["int4_fp16", "int8_fp16"])
def test_query(recipe: str, head_dim: int, case: tuple[int, int, MaskClass]) -> None:
    call, result = quantized(recipe, Accumulator.FP32, head_dim, case)
    batch, heads, length, _ = call.query.shape
    running, format_ = result.call, RECIPES[recipe].qk
    live = torch.arange(length) >= running.first_live
    blocks, width = running.query_blocks, TILE_MMA.q_block
    query = torch.where(live[:, None], call.query.float(), 0.0)
    if format_ is Format.INT4:
        means = floats(result, running.means, batch, heads, blocks, head_dim)
        for block in range(blocks):
            tokens = slice(block * width, min((block + 1) * width, length))
            exact = query[:, :, tokens].sum(2) / max(1, int(live[tokens].sum()))
            torch.testing.assert_close(means[:, :, block], exact, rtol=1e-4, atol=1e-5)
        of_tokens = means.repeat_interleave(width, 2)[:, :, :length]
        query = torch.where(live[:, None], query - of_tokens, 0.0)
    groups = query_groups(length, Granularity.THREAD, TILE_MMA, query.device)
    expected, scale = quantize_tokens(query, live, groups, LIMIT[format_])

    codes = integers(scratch(result, running.query_codes), format_, head_dim)
    codes = codes.view(batch, heads, blocks * width, head_dim)
    assert torch.equal(codes[:, :, :length], expected)
    assert not codes[:, :, length:].any()
    scales = floats(result, running.query_scales, batch, heads, -1)
    assert torch.equal(scales[:, :, groups], scale)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("recipe", ["int4_fp16", "int8_fp16"])
def test_key_and_its_delta(recipe: str, head_dim: int, case: tuple[int, int, MaskClass]) -> None:
    call, result = quantized(recipe, Accumulator.FP32, head_dim, case)
    batch, kv_heads, length, _ = call.key.shape
    running, format_ = result.call, RECIPES[recipe].qk
    counted = torch.arange(length) < running.end_key
    sums = floats(result, running.key_sums, batch, kv_heads, running.chunks, head_dim)
    mean = torch.zeros(batch, kv_heads, head_dim)
    for chunk in range(running.chunks):
        mean += sums[:, :, chunk]
    mean = (mean / running.end_key).unsqueeze(2)
    exact = call.key[:, :, : running.end_key].double().mean(2, keepdim=True)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-4, atol=1e-4)

    smoothed = torch.where(counted[:, None], call.key.float() - mean, 0.0)
    groups = key_groups(length, Granularity.THREAD, TILE_MMA, smoothed.device)
    expected, scale = quantize_tokens(smoothed, counted, groups, LIMIT[format_])
    packed = tiles(call, result)
    codes = integers(packed[..., : running.tile.value_offset].copy(), format_, head_dim)
    codes = codes.view(batch, kv_heads, -1, head_dim)
    assert torch.equal(codes[:, :, :length], expected)
    assert not codes[:, :, length:].any()
    at = running.tile.scales_offset
    scales = packed[..., at : at + 16].copy().view(np.float32).reshape(batch, kv_heads, -1)
    assert torch.equal(torch.from_numpy(scales)[:, :, groups], scale)

    if format_ is Format.INT4:
        means = floats(result, running.means, batch, kv_heads, -1, head_dim).double()
        delta = floats(result, running.delta, batch, kv_heads, means.shape[2], -1)
        wanted = means @ smoothed.double().mT
        # TF32 has 10 bits of mantissa, in both operands.
        bound = means.abs() @ smoothed.double().mT.abs() * 2.0**-10
        assert ((delta[..., :length].double() - wanted).abs() <= bound).all()
        assert not delta[..., length:].any()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("recipe", ["int4_fp16", "int8_fp16"])
def test_with_other_sums_codes_differ_at_ties_alone(recipe: str, head_dim: int) -> None:
    """Against means that torch adds up: at most one step, and rarely."""
    call, result = quantized(recipe, Accumulator.FP32, head_dim, CASES[1])
    batch, kv_heads, length, _ = call.key.shape
    format_, running = RECIPES[recipe].qk, result.call
    smoothed = call.key.float() - call.key.float().mean(2, keepdim=True)
    counted = torch.ones(length, dtype=torch.bool)
    groups = key_groups(length, Granularity.THREAD, TILE_MMA, smoothed.device)
    expected, _ = quantize_tokens(smoothed, counted, groups, LIMIT[format_])
    packed = tiles(call, result)
    codes = integers(packed[..., : running.tile.value_offset].copy(), format_, head_dim)
    steps = (codes.view(batch, kv_heads, -1, head_dim)[:, :, :length] - expected).abs()
    assert steps.max() <= 1
    assert steps.mean() < 1e-3


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("recipe", "accumulator"), RECIPE_VARIANTS[2:])
def test_value(
    recipe: str, accumulator: Accumulator, head_dim: int, case: tuple[int, int, MaskClass]
) -> None:
    call, result = quantized(recipe, accumulator, head_dim, case)
    batch, kv_heads, length, _ = call.value.shape
    running = result.call
    counted = (torch.arange(length) < running.end_key).view(1, 1, -1)
    expected = quantize_value(call.value, counted, counted, named(recipe, accumulator))

    packed = tiles(call, result)
    data = packed[..., running.tile.value_offset : running.tile.scales_offset].copy()
    if RECIPES[recipe].pv is Format.FP8:
        values = torch.from_numpy(data).view(torch.float8_e4m3fn).float()
        order = permutation()
    else:
        values = torch.from_numpy(data.view(np.float16)).float()
        order = torch.arange(TILE_MMA.kv_block)
    # (B, Hkv, N, D, positions) -> (B, Hkv, tokens, D)
    values = values.view(batch, kv_heads, -1, head_dim, TILE_MMA.kv_block)
    in_order = torch.empty_like(values)
    in_order[..., order] = values
    tokens = in_order.transpose(3, 4).flatten(2, 3)
    assert torch.equal(tokens[:, :, :length], expected.data)
    assert not tokens[:, :, length:].any()
    scales = floats(result, running.value_scales, batch, kv_heads, head_dim)
    assert torch.equal(scales, expected.scale.squeeze(2))
    if accumulator is Accumulator.FP16:
        assert expected.data.abs().max() <= FP16_ACCUMULATOR_MAX


def permutation() -> Tensor:
    """The token at each position of a tile of V in E4M3.

    A thread t of four has the accumulators of columns 2 t and 2 t + 1 of every 8, and positions
    4 t to 4 t + 3 of each 16 of the operand: those of two neighbouring eights.
    """
    tokens = torch.empty(TILE_MMA.kv_block, dtype=torch.int64)
    for half, t, eight, column in itertools.product(range(4), range(4), range(2), range(2)):
        tokens[half * 16 + 4 * t + 2 * eight + column] = half * 16 + 8 * eight + 2 * t + column
    return tokens


def test_row_term() -> None:
    """scale * q . mean K, whatever the sign of the scale."""
    for scale in (0.3, -0.3):
        call = make_call(130, 70, 64, torch.float16, kv_heads=2, group=2, scale=scale)
        result = attend(call, "int8_fp16")
        mean = call.key.double().mean(2, keepdim=True).repeat_interleave(2, 1)
        wanted = (call.query.double() @ mean.mT).squeeze(-1) * scale
        found = floats(result, result.call.row_term, *wanted.shape)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_packed_tiles_are_as_the_kernels_say() -> None:
    """Sizes in Python and in C++ agree: what a kernel asserts when it is compiled."""
    tile = KeyValueTile.of(128, 128, Format.INT8, Format.FP8)
    assert (tile.value_offset, tile.scales_offset, tile.bytes) == (8192, 16384, 16512)
