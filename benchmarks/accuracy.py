"""Print the accuracy of the recipes and of their parts as a markdown table.

    python -m benchmarks.accuracy

Most inputs are synthetic and stand for what SageAttention2 (arXiv 2411.10958) describes: channels
of K and Q with a large common offset, that of Q drifting along the sequence. One is real: what
all-MiniLM-L6-v2 (the extra ``demo``) attends with in its six layers. Each row is one reference
recipe against float64 attention; cosine similarity, relative L1 and RMSE over all heads, and the
worst head's cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from math import log, pi
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sage_compiler.kernels.cuda.packed import MEAN_TOKENS
from sage_compiler.kernels.quantize import INTEGER_LIMIT, key_groups, quantize_tokens
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
from sage_compiler.semantics import Semantics
from tests.compiler.kernels.dense import Call, channel_outliers, dense
from tests.tolerances import cosine, rel_l1, rmse

Measures = tuple[float, float, float, float]
"""As ``measure`` gives them."""
Row = tuple[str, Measures]

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


def first_key_heavy(length: int = 4096) -> Call:
    """The first key takes about half of every row and has a small V: an attention sink."""
    call = channel_outliers(length=length, heads=2)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(call.query.shape, generator=generator)
    key = torch.randn(call.key.shape, generator=generator)
    value = call.value.clone()
    # The others' scores have a variance of 1: of 4096, all weigh some 4096 * exp(1/2) = exp(8.8).
    query[..., 0], key[..., 0] = 8.0, 0.0
    key[:, :, 0] = 0.0
    key[:, :, 0, 0] = 8.8 + log(length / 4096)
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


def gaussian() -> Call:
    """Q, K and V of independent gaussians: scores with a standard deviation of 1."""
    generator = torch.Generator().manual_seed(4)
    query, key, value = torch.randn(3, 1, 4, 1024, 64, generator=generator)
    return Call(query, key, value)


def sharp() -> Call:
    """As ``gaussian``, with a scale that makes the scores 8 times as large."""
    return replace(gaussian(), semantics=Semantics(scale=8.0 / 64**0.5))


class Calls(TorchFunctionMode):
    """Keeps the arguments of scaled_dot_product_attention while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.found.append(self.call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Call:
        assert dropout_p == 0.0 and not is_causal
        return Call(query, key, value, Semantics(scale=scale), attn_mask)


@torch.no_grad()
def minilm_layers(lengths: Sequence[int]) -> list[Call]:
    """What the layers of all-MiniLM-L6-v2 attend with, on texts of these many tokens.

    The texts are the demo's sentences, joined; where they differ in length, the shorter ones are
    padded and a bool mask hides the padding.
    """
    from examples.minilm import (
        SENTENCES,
        AutoModel,
        AutoTokenizer,
        disable_progress_bar,
        model_folder,
    )

    disable_progress_bar()
    model = AutoModel.from_pretrained(model_folder(), attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    texts = []
    for index, length in enumerate(lengths):
        start = index * len(sentences) // len(lengths)
        text = " ".join(sentences[start:] + sentences[:start])
        texts.append(tokenizer(text, truncation=True, max_length=length))
    with Calls() as calls:
        model(**tokenizer.pad(texts, return_tensors="pt"))
    return calls.found


@cache
def real_activations() -> Call:
    """Four texts of 512 tokens in all-MiniLM-L6-v2, the 12 heads of its 6 layers side by side."""
    layers = minilm_layers((512,) * 4)
    query, key, value = (
        torch.cat([getattr(call, name) for call in layers], 1) for name in ("query", "key", "value")
    )
    return Call(query, key, value, layers[0].semantics, layers[0].attn_mask)


def real_sink() -> Call:
    """Of ``real_activations`` the head where int8_int8 has its largest relative L1.

    On average the first token takes 0.35 of a row; the norm of its V is 0.04 of the mean one.
    """
    call, head = real_activations(), slice(4 * 12 + 5, 4 * 12 + 6)  # the fifth layer's sixth
    return replace(
        call, query=call.query[:, head], key=call.key[:, head], value=call.value[:, head]
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
CPU_RECIPES: Final = MappingProxyType({name: RECIPES[name] for name in ("int8_int8", "int8_int16")})
STATISTICS: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        f"{name}, {label}": replace(
            RECIPES[name], statistics=statistics, tile=replace(TILE_CPU, kv_block=kv_block)
        )
        for name in CPU_RECIPES
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
    (
        "The recipes, a first key of 512 with half the weight",
        partial(first_key_heavy, 512),
        RECIPES,
    ),
    ("The recipes, K and V drifting along 4096 keys", drifting, RECIPES),
    ("The recipes, all-MiniLM-L6-v2 on texts of 512 tokens", real_activations, RECIPES),
    ("The recipes, the worst head of all-MiniLM-L6-v2", real_sink, RECIPES),
    ("The recipes of CPUs, gaussian Q, K and V", gaussian, CPU_RECIPES),
    ("The recipes of CPUs, scores 8 times as large", sharp, CPU_RECIPES),
    ("Statistics, long-tailed rows", long_tailed, STATISTICS),
    ("Statistics, a first key with half the weight", first_key_heavy, STATISTICS),
    ("Statistics, K and V drifting", drifting, STATISTICS),
    ("Accumulators, V with an offset", value_offset, ACCUMULATION),
)


CACHE_RECIPES: Final = ("int8_fp8", "int8_fp16", "int4_fp16")
CACHED: Final[tuple[tuple[str, Callable[[], Call]], ...]] = (
    ("A cache on a GPU, gaussian Q, K and V", gaussian),
    ("A cache on a GPU, channel offsets in Q and K", channel_outliers),
    ("A cache on a GPU, K and V drifting along 4096 keys", drifting),
    ("A cache on a GPU, all-MiniLM-L6-v2 on texts of 512 tokens", real_activations),
)


def measure(call: Call, expected: Tensor, recipe: Recipe) -> Measures:
    """Cosine, relative L1 and RMSE over all heads, and the worst head's cosine."""
    output, _ = attention(
        call.query, call.key, call.value, recipe, call.semantics, attn_mask=call.attn_mask
    )
    heads = zip(output.unbind(1), expected.unbind(1), strict=True)
    worst = min(cosine(actual, exact) for actual, exact in heads)
    return cosine(output, expected), rel_l1(output, expected), rmse(output, expected), worst


def in_cache(call: Call, recipe: Recipe) -> Call:
    """The call with K as a cache on a GPU packs it: smoothed by the mean of the first tokens."""
    key = call.key.float()
    key = key - key[:, :, :MEAN_TOKENS].mean(2, keepdim=True)
    groups = key_groups(key.shape[2], recipe.granularity, recipe.tile, key.device)
    counted = torch.ones(key.shape[2], dtype=torch.bool)
    codes, scale = quantize_tokens(key, counted, groups, INTEGER_LIMIT[recipe.qk])
    # With scales of its own maxima it is quantized again to the same codes, and a Q that is
    # smoothed by its blocks meets nothing but these.
    return replace(call, key=codes * scale.unsqueeze(-1))


def cached(call: Call, expected: Tensor, recipe: Recipe) -> Iterator[Row]:
    """One attention, a cache, and a cache that is asked for one query at a time.

    V is that of the one attention in all three: a scale for each of its tiles is no coarser.
    """
    yield recipe.name, measure(call, expected, recipe)
    packed, packed_recipe = in_cache(call, recipe), replace(recipe, smooth_k=False)
    yield f"{recipe.name}, cache", measure(packed, expected, packed_recipe)
    if recipe.smooth_q:  # a query's own mean is all of it
        one = replace(packed_recipe, tile=replace(recipe.tile, q_block=1))
        yield f"{recipe.name}, cache, one query", measure(packed, expected, one)


def main() -> None:
    for title, make_call, recipes in SECTIONS:
        call = make_call()
        expected, _ = dense(call)
        print_table(title, ((n, measure(call, expected, r)) for n, r in recipes.items()))
    for title, make_call in CACHED:
        call = make_call()
        expected, _ = dense(call)
        rows = (row for name in CACHE_RECIPES for row in cached(call, expected, RECIPES[name]))
        print_table(title, rows)


def print_table(title: str, rows: Iterable[Row]) -> None:
    print(f"| {title} | cosine | relative L1 | RMSE | worst head cosine |")
    print("|---|---|---|---|---|")
    for name, (average, l1, error, worst) in rows:
        print(f"| {name} | {average:.2%} | {l1:.4f} | {error:.4f} | {worst:.2%} |")
    print()


if __name__ == "__main__":
    main()
