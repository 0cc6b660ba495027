"""Print the accuracy of the recipes and of their parts as a markdown table.

    python -m benchmarks.accuracy

The inputs are synthetic and stand for what SageAttention2 (arXiv 2411.10958) describes: channels
of K and Q with a large common offset, that of Q drifting along the sequence. Each row is one
reference recipe against float64 attention; cosine similarity, relative L1 and RMSE over all heads,
and the worst head's cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import pi
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from sage_compiler.kernels.reference import attention
from sage_compiler.precision import (
    RECIPES,
    TILE_CPU,
    TILE_WGMMA,
    Accumulator,
    Format,
    Granularity,
    Recipe,
    Statistics,
    Tile,
)
from tests.compiler.kernels.dense import Call, channel_outliers, dense
from tests.tolerances import cosine, rel_l1, rmse

BASE: Final = RECIPES["int4_fp8"]
ONE_LEVEL: Final = Tile(q_block=128, q_warp=32, kv_block=2**20)


def value_outliers() -> Call:
    """As ``channel_outliers``, with values ten times as large in every 97th token of V."""
    call = channel_outliers()
    value = call.value.clone()
    value[:, :, ::97] *= 10.0
    return replace(call, value=value)


def value_offset() -> Call:
    """As ``channel_outliers``, with a common offset in every channel of V."""
    call = channel_outliers()
    return replace(call, value=call.value + 2.0)


def long_tailed() -> Call:
    """One key of weight near 0.1 for each query; the rest is spread over thousands of keys."""
    call = channel_outliers(length=4096, heads=2)
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(call.key.shape, generator=generator)
    return Call(torch.randn(key.shape, generator=generator) + 0.9 * key, key, call.value)


def first_key_heavy() -> Call:
    """The first key takes about half of every row and has a small V: an attention sink."""
    call = channel_outliers(length=4096, heads=2)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(call.query.shape, generator=generator)
    key = torch.randn(call.key.shape, generator=generator)
    value = call.value.clone()
    # The others' scores have a variance of 1: together they weigh some 4096 * exp(1/2) = exp(8.8).
    query[..., 0], key[..., 0] = 8.0, 0.0
    key[:, :, 0] = 0.0
    key[:, :, 0, 0] = 8.8
    value[:, :, 0] *= 0.02
    return Call(query, key, value)


def drifting() -> Call:
    """K and V with channel offsets that change sign along the sequence."""
    call = channel_outliers(length=4096, heads=2)
    generator = torch.Generator().manual_seed(3)
    phase = torch.linspace(0.0, 2.0 * pi, 4096).view(1, 1, -1, 1)
    offset = 3.0 * torch.randn(1, 2, 1, 64, generator=generator)
    return replace(
        call, key=call.key + offset * phase.cos(), value=call.value + offset * phase.sin()
    )


ABLATIONS: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "INT4 QK, no smoothing": replace(BASE, smooth_q=False, smooth_k=False),
        "K smoothed": replace(BASE, smooth_q=False),
        "Q smoothed": replace(BASE, smooth_k=False),
        "Q and K smoothed (int4_fp8)": BASE,
        **{
            f"granularity: {granularity}": replace(BASE, granularity=granularity)
            for granularity in reversed(Granularity)
        },
        "tiles of sm_90": replace(BASE, tile=TILE_WGMMA),
        **{f"P, V: {pv}": replace(BASE, pv=pv) for pv in Format if pv is not Format.INT4},
        "FP22 accumulator": replace(BASE, accumulator=Accumulator.FP22),
    }
)
ACCUMULATION: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "FP32": replace(RECIPES["int8_fp8"], accumulator=Accumulator.FP32),
        "FP22, two levels": replace(RECIPES["int8_fp8"], accumulator=Accumulator.FP22),
        "FP22, one level": replace(
            RECIPES["int8_fp8"], accumulator=Accumulator.FP22, tile=ONE_LEVEL
        ),
        "FP22, one level, V smoothed": replace(
            RECIPES["int8_fp8"], accumulator=Accumulator.FP22, tile=ONE_LEVEL, smooth_v=True
        ),
    }
)
STATISTICS: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        f"{name}, {label}": replace(
            RECIPES[name], statistics=statistics, tile=replace(TILE_CPU, kv_block=kv_block)
        )
        for name in ("int8_int8", "int8_int16")
        for label, statistics, kv_block in (
            ("of the head", Statistics.HEAD, TILE_CPU.kv_block),
            *((f"of {keys} keys", Statistics.KV_BLOCK, keys) for keys in (512, 256, 128)),
        )
    }
)

SECTIONS: Final[tuple[tuple[str, Callable[[], Call], Mapping[str, Recipe]], ...]] = (
    ("Channel offsets in Q and K", channel_outliers, ABLATIONS),
    ("The recipes, same inputs", channel_outliers, RECIPES),
    ("The recipes, V with outliers", value_outliers, RECIPES),
    ("The recipes, long-tailed rows of 4096 keys", long_tailed, RECIPES),
    ("The recipes, a first key of 4096 with half the weight", first_key_heavy, RECIPES),
    ("The recipes, K and V drifting along 4096 keys", drifting, RECIPES),
    ("Statistics, long-tailed rows", long_tailed, STATISTICS),
    ("Statistics, a first key with half the weight", first_key_heavy, STATISTICS),
    ("Statistics, K and V drifting", drifting, STATISTICS),
    ("Accumulators, V with an offset", value_offset, ACCUMULATION),
)


def measure(call: Call, expected: Tensor, recipe: Recipe) -> tuple[float, float, float, float]:
    """Cosine, relative L1 and RMSE over all heads, and the worst head's cosine."""
    output, _ = attention(call.query, call.key, call.value, recipe, call.semantics)
    heads = zip(output.unbind(1), expected.unbind(1), strict=True)
    worst = min(cosine(actual, exact) for actual, exact in heads)
    return cosine(output, expected), rel_l1(output, expected), rmse(output, expected), worst


def main() -> None:
    for title, make_call, recipes in SECTIONS:
        call = make_call()
        expected, _ = dense(call)
        print(f"| {title} | cosine | relative L1 | RMSE | worst head cosine |")
        print("|---|---|---|---|---|")
        for name, recipe in recipes.items():
            average, l1, error, worst = measure(call, expected, recipe)
            print(f"| {name} | {average:.2%} | {l1:.4f} | {error:.4f} | {worst:.2%} |")
        print()


if __name__ == "__main__":
    main()
