"""Which kernels exist: what one attention launches, and what a kernel pack ships.

Whether an attention gets any is for ``dispatch.decide`` to say.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from sage_compiler.kernels.cuda.arch import Geometry, named
from sage_compiler.kernels.cuda.preparation import preparation_specs
from sage_compiler.kernels.cuda.spec import (
    HEAD_DIMS,
    QUERY_BLOCK,
    AppendSpec,
    AttendSpec,
    DeltaSpec,
    HopperAttendSpec,
    KernelSpec,
    KeyMeanSpec,
    KeySpec,
    MergeSpec,
    QuantizeSpec,
    QuerySpec,
    QueryTile,
    RotaryKeySpec,
    RotaryQuantizeSpec,
    RotaryQuerySpec,
    RotaryStatisticsSpec,
    StatisticsSpec,
    ValueSpec,
    padded_dim,
)
from sage_compiler.precision import RECIPES, Accumulator, Format
from sage_compiler.semantics import RotaryPairs

PACKED_DTYPES: Final = ("float16", "bfloat16")
PACKED_HEAD_DIMS: Final = (64, 128)


class Share(StrEnum):
    """Which of an architecture's recipes a group of a pack has."""

    FIRST = "the first one"  # what `auto` means
    OFFERED = "all of them"


@dataclass(frozen=True, slots=True)
class Group:
    """Attentions that a kernel pack has, and why these.

    Attributes:
        recipes: of each architecture.
        head_dims: of Q, K and V.
        masked: whether there is an explicit mask.
        few_queries: whether it is decoding, with tiles of ``decoding_tile``.
        cache: whether keys and values are a cache, ``sage.PackedKV``; then with whole blocks of
            queries too, of prompts.
    """

    name: str
    recipes: Share
    head_dims: tuple[int, ...]
    masked: bool
    reason: str
    few_queries: bool = False
    cache: bool = False


PACK: Final = (
    Group(
        "plain",
        Share.OFFERED,
        PACKED_HEAD_DIMS,
        masked=False,
        reason="nearly all models have these head_dims, and what is between is filled up with "
        "zeros: 64 has all from 33 on, 40 of Stable Diffusion among them, 128 all from 97 on. "
        "Full and causal attention and any length are one kernel. All recipes, so that a policy "
        "compiles nothing",
    ),
    Group(
        "masked",
        Share.FIRST,
        PACKED_HEAD_DIMS,
        masked=True,
        reason="padded batches: BERT and other encoders at 64, batched generation at 128. A key "
        "padding and any other explicit mask, bool or float, with any strides, are one kernel, "
        "with a diagonal on top or not",
    ),
    Group(
        "96",
        Share.FIRST,
        (96,),
        masked=False,
        reason="Phi-3 mini, and the 80 channels of ViT-H and Stable Diffusion. Its operands are "
        "filled up to 128, so that it shares all kernels but one with 128",
    ),
    Group(
        "decode",
        Share.FIRST,
        PACKED_HEAD_DIMS,
        masked=False,
        few_queries=True,
        reason="a token, or a few that were guessed, against keys and values that torch keeps. One "
        "tile of 32 rows has all heads of a group and token up to groups of 32; more rows take "
        "several. Only with split keys: of one part it has the bits of the kernel that does not "
        "split, for one small launch more, so that batches of many sequences do without a kernel "
        "of their own",
    ),
    Group(
        "decode, masked",
        Share.FIRST,
        PACKED_HEAD_DIMS,
        masked=True,
        few_queries=True,
        reason="static caches, which is what compiled generation has: the mask hides what is not "
        "filled yet; and padded batches. The merging kernel is that of the group above",
    ),
    Group(
        "cache",
        Share.FIRST,
        (128,),
        masked=False,
        few_queries=True,
        cache=True,
        reason="sage.PackedKV: appending, prompts and tokens. Who keeps a quantized cache has many "
        "keys, in models of billions of parameters, and of those nearly all have 128 channels. "
        "Padding needs no mask here: a sequence's keys are its own",
    ),
)
"""What a kernel pack has, in float16 and bfloat16: what most models ask for. All else is compiled
on first use, in a second or two.

Left out: windows and softcap (few models, and twice as many kernels for each of them); head_dim 32,
192 and 256 (another set of quantizers each); float32 (inference in it is rare); FP16 sums, which no
recipe has; ``RARE``; few queries by other recipes than the first, since who decodes waits for
memory, not for products; lower and higher tiles of few queries, and those without split keys, which
save a launch or a second reading, ``cut.shipped``; and caches at 64 or with masks.
"""

RARE: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {("sm_89", "int4_fp16"): "slower and less accurate than int8_fp8, so hardly a policy has it"}
)
"""Recipes that an architecture offers and packs lack, and why."""

# A host that cannot compile needs masks, windows and softcap too, and pays for them in bytes.
STANDALONE_HEAD_DIMS: Final = (32, 64, 96, 128)

PACKED_ROWS: Final = (32, 64, 128)
"""The rows of a tile of packed heads; at a padded head_dim of 256 from the second on."""
_PACKED_WARP_ROWS: Final = 16
WGMMA_ROWS: Final = QUERY_BLOCK.rows
"""The rows of a tile of the kernel of wgmma, packed or not: two warpgroups' products."""


@dataclass(frozen=True, slots=True)
class Variant:
    """The kernels of one attention, in the order of their launches.

    Attributes:
        quantize: what is launched in place of the four of Q, K and V; None: they are.
        merge: of an ``attend`` that splits keys; else None.
    """

    quantize: QuantizeSpec | None
    statistics: StatisticsSpec
    query: QuerySpec
    key: KeySpec
    value: ValueSpec
    attend: AttendSpec | HopperAttendSpec
    merge: MergeSpec | None = None

    def specs(self) -> tuple[KernelSpec, ...]:
        """All that are launched."""
        return (*self.quantizers(), *self.products())

    def quantizers(self) -> tuple[KernelSpec, ...]:
        """Those that make operands of Q, K and V."""
        if self.quantize is not None:
            return (self.quantize,)
        return (self.statistics, self.query, self.key, self.value)

    def products(self) -> tuple[KernelSpec, ...]:
        """Those that make the output of these."""
        return (self.attend,) if self.merge is None else (self.attend, self.merge)


@functools.cache
def variant(
    arch: str,
    dtype: str,
    head_dim: int,
    recipe: str,
    accumulator: Accumulator = Accumulator.FP32,
    *,
    value_head_dim: int | None = None,
    window: bool = False,
    masked: bool = False,
    softcap: bool = False,
    rotary_query: RotaryPairs | None = None,
    rotary_key: RotaryPairs | None = None,
    tile: QueryTile = QUERY_BLOCK,
    varlen: bool = False,
) -> Variant:
    """The kernels for one call.

    Args:
        head_dim, value_head_dim: any up to the last of ``HEAD_DIMS``; the second is by default the
            first.
        accumulator: FP16 for SageAttention2++ (FP8 P and V only).
        window, masked, softcap: as of ``AttendSpec``.
        rotary_query, rotary_key: how Q and K are rotated, if they are.
        tile: what a block of the attention kernel does; that of wgmma has 128 rows, packed or not.
        varlen: for a packed batch of sequences, each of which has statistics of its own: its
            quantizers are launched one after another.
    """
    qk, pv = RECIPES[recipe].qk, RECIPES[recipe].pv
    key_dim = _least_dim(head_dim)
    value_dim = key_dim if value_head_dim is None else _least_dim(value_head_dim)
    padded, padded_value = padded_dim(key_dim), padded_dim(value_dim)
    longest = max(key_dim, value_dim)
    wgmma = named(arch).uses_wgmma(recipe)
    attend: AttendSpec | HopperAttendSpec
    if wgmma:
        assert tile.rows == WGMMA_ROWS
        ring = named(arch).ring(longest)
        attend = HopperAttendSpec(
            arch,
            dtype,
            key_dim,
            value_dim,
            window,
            masked,
            softcap,
            tiles=ring.masked_tiles if masked else ring.tiles,
            stages=ring.stages,
            packed_heads=tile.packed_heads,
            split=tile.split,
            # The rows of packed heads are no box of a mask.
            mask_places=ring.mask_places if masked and not tile.packed_heads else 0,
            varlen=varlen,
        )
    else:
        geometry = named(arch).geometry(longest)
        attend = AttendSpec(
            arch,
            dtype,
            key_dim,
            value_dim,
            window,
            masked,
            softcap,
            qk,
            pv,
            accumulator,
            warp_rows=_warp_rows(geometry, masked, tile),
            stages=geometry.stages,
            tile_rows=tile.rows,
            packed_heads=tile.packed_heads,
            split=tile.split,
            varlen=varlen,
        )
    statistics = StatisticsSpec(arch, dtype, padded, padded_value, varlen=varlen)
    packs_query = wgmma and tile.packed_heads
    quantize = QuantizeSpec(
        arch,
        dtype,
        padded,
        padded_value,
        qk,
        pv,
        accumulator,
        panels=wgmma,
        packed_heads=packs_query,
    )
    query = QuerySpec(
        arch, dtype, padded, qk, panels=wgmma, packed_heads=packs_query, varlen=varlen
    )
    key = KeySpec(arch, dtype, padded, qk, panels=wgmma, varlen=varlen)
    if rotary_query is not None:
        query = RotaryQuerySpec(
            arch, dtype, padded, qk, rotary_query, panels=wgmma, packed_heads=packs_query
        )
    if rotary_key is not None:
        statistics = RotaryStatisticsSpec(arch, dtype, padded, padded_value, rotary_key)
        key = RotaryKeySpec(arch, dtype, padded, qk, rotary_key, panels=wgmma)
    if rotary_query is not None or rotary_key is not None:
        quantize = RotaryQuantizeSpec(
            arch,
            dtype,
            padded,
            padded_value,
            qk,
            pv,
            accumulator,
            panels=wgmma,
            packed_heads=packs_query,
            rotary_query=rotary_query,
            rotary_key=rotary_key,
        )
    return Variant(
        quantize=None if varlen else quantize,
        statistics=statistics,
        query=query,
        key=key,
        value=ValueSpec(arch, dtype, padded_value, pv, accumulator, panels=wgmma, varlen=varlen),
        attend=attend,
        merge=MergeSpec(arch, dtype, padded_value) if tile.split else None,
    )


@dataclass(frozen=True, slots=True)
class CacheVariant:
    """The kernels of a cache: ``key_mean`` and ``append`` of new tokens, the others of attention.

    Attributes:
        delta: with INT4, which comes with Q smoothing.
        merge: as of ``Variant``.
    """

    key_mean: KeyMeanSpec
    append: AppendSpec
    query: QuerySpec
    delta: DeltaSpec | None
    attend: AttendSpec | HopperAttendSpec
    merge: MergeSpec | None = None

    def specs(self) -> tuple[KernelSpec, ...]:
        """All of them, in the order of their launches."""
        delta = () if self.delta is None else (self.delta,)
        merge = () if self.merge is None else (self.merge,)
        return (self.key_mean, self.append, self.query, *delta, self.attend, *merge)


@functools.cache
def cache_variant(
    arch: str,
    dtype: str,
    head_dim: int,
    recipe: str,
    *,
    value_head_dim: int | None = None,
    window: bool = False,
    masked: bool = False,
    softcap: bool = False,
    tile: QueryTile = QUERY_BLOCK,
) -> CacheVariant:
    """The kernels of a cache, with arguments as of ``variant``."""
    found = variant(
        arch,
        dtype,
        head_dim,
        recipe,
        value_head_dim=value_head_dim,
        window=window,
        masked=masked,
        softcap=softcap,
        tile=tile,
    )
    attend: AttendSpec | HopperAttendSpec
    if isinstance(found.attend, HopperAttendSpec):
        # The scales of V are of a tile, and what is multiplied by them is P V of a step. Beside
        # them there is no room for a mask at every head_dim.
        attend = replace(found.attend, tile_scales=True, tiles=1, mask_places=0)
    else:
        attend = replace(found.attend, tile_scales=True)
    padded, padded_value = padded_dim(attend.head_dim), padded_dim(attend.value_head_dim)
    return CacheVariant(
        key_mean=KeyMeanSpec(arch, dtype, padded),
        append=AppendSpec(
            arch, dtype, padded, padded_value, attend.qk, attend.pv, panels=found.key.panels
        ),
        query=found.query,
        delta=DeltaSpec(arch, padded) if attend.qk is Format.INT4 else None,
        attend=attend,
        merge=found.merge,
    )


def _warp_rows(geometry: Geometry, masked: bool, tile: QueryTile) -> int:
    if tile.packed_heads:  # each row has a scale of its own to keep, and few rows want many warps
        return _PACKED_WARP_ROWS
    return geometry.masked_warp_rows if masked else geometry.warp_rows


def _least_dim(head_dim: int) -> int:
    return next(dim for dim in HEAD_DIMS if dim >= head_dim)


def accumulators(arch: str, recipe: str) -> tuple[Accumulator, ...]:
    """The accumulators that there are kernels for, the default one first."""
    if RECIPES[recipe].pv is Format.FP8 and not named(arch).uses_wgmma(recipe):
        return (Accumulator.FP32, Accumulator.FP16)
    return (Accumulator.FP32,)


def variants(arch: str) -> Iterator[Variant]:
    """What a kernel pack has for an architecture: ``PACK`` but caches, without ``RARE``."""
    for group in PACK:
        if group.cache:
            continue
        for dtype, head_dim, recipe in _members(arch, group):
            tile = decoding_tile(arch, recipe) if group.few_queries else QUERY_BLOCK
            yield variant(arch, dtype, head_dim, recipe, masked=group.masked, tile=tile)


def packed_caches(arch: str) -> Iterator[CacheVariant]:
    """The caches that a kernel pack has kernels for."""
    for group in PACK:
        if not group.cache:
            continue
        for dtype, head_dim, recipe in _members(arch, group):
            for tile in (QUERY_BLOCK, decoding_tile(arch, recipe)):
                yield cache_variant(arch, dtype, head_dim, recipe, masked=group.masked, tile=tile)


def _members(arch: str, group: Group) -> Iterator[tuple[str, int, str]]:
    """Dtype, head_dim and recipe of each attention of a group."""
    recipes = named(arch).recipes[: 1 if group.recipes is Share.FIRST else None]
    for each in itertools.product(PACKED_DTYPES, group.head_dims, recipes):
        if (arch, each[2]) not in RARE:
            yield each


def decoding_tile(arch: str, recipe: str) -> QueryTile:
    """The tile that a pack has for few queries."""
    return QueryTile(_least_rows(arch, recipe), packed_heads=True, split=True)


def _least_rows(arch: str, recipe: str) -> int:
    """The rows of the lowest tile of packed heads."""
    return WGMMA_ROWS if named(arch).uses_wgmma(recipe) else PACKED_ROWS[0]


def further_variants(arch: str) -> Iterator[Variant]:
    """What is compiled on first use, one of each kind: dims, float32, split keys, sequences."""
    packed = set(variants(arch))
    for each in _further_variants(arch):
        if each not in packed:
            yield each


def _further_variants(arch: str) -> Iterator[Variant]:
    for recipe in named(arch).recipes:
        for head_dim in HEAD_DIMS:
            yield variant(arch, "bfloat16", head_dim, recipe)
        yield variant(arch, "bfloat16", 64, recipe, value_head_dim=128)
        yield variant(arch, "float32", 128, recipe)
        yield variant(arch, "bfloat16", 64, recipe, masked=True)
        yield variant(arch, "bfloat16", 128, recipe, masked=True)
        yield variant(arch, "bfloat16", 128, recipe, window=True)
        yield variant(arch, "bfloat16", 128, recipe, softcap=True)
        yield variant(arch, "bfloat16", 256, recipe, window=True, masked=True, softcap=True)
        for head_dim in (64, 128, 256):
            for pairs in RotaryPairs:
                yield variant(
                    arch, "bfloat16", head_dim, recipe, rotary_query=pairs, rotary_key=pairs
                )
        few = QueryTile(_least_rows(arch, recipe), packed_heads=True)
        yield variant(arch, "bfloat16", 128, recipe, tile=few)
        yield variant(arch, "bfloat16", 128, recipe, tile=few._replace(split=True))
        yield variant(arch, "bfloat16", 64, recipe, varlen=True)
        yield variant(arch, "bfloat16", 128, recipe, varlen=True)
        yield variant(arch, "bfloat16", 128, recipe, window=True, softcap=True, varlen=True)
        yield from half_sums(arch, recipe)


def half_sums(arch: str, recipe: str) -> Iterator[Variant]:
    """SageAttention2++'s variants of a recipe, which no call asks for yet: they are checked."""
    for accumulator in accumulators(arch, recipe)[1:]:
        for head_dim in PACKED_HEAD_DIMS:
            yield variant(arch, "bfloat16", head_dim, recipe, accumulator)


def cache_variants(arch: str) -> Iterator[CacheVariant]:
    """The kernels of caches, which are compiled on first use: all dims, and one of each kind."""
    for recipe in named(arch).recipes:
        for head_dim in HEAD_DIMS:
            yield cache_variant(arch, "bfloat16", head_dim, recipe)
        yield cache_variant(arch, "float16", 128, recipe)
        yield cache_variant(arch, "float32", 128, recipe)
        yield cache_variant(arch, "bfloat16", 64, recipe, value_head_dim=128)
        yield cache_variant(arch, "bfloat16", 64, recipe, masked=True)
        yield cache_variant(arch, "bfloat16", 128, recipe, masked=True)
        yield cache_variant(arch, "bfloat16", 128, recipe, window=True)
        yield cache_variant(arch, "bfloat16", 128, recipe, softcap=True)
        for head_dim in PACKED_HEAD_DIMS:
            for split in (False, True):
                tile = QueryTile(_least_rows(arch, recipe), packed_heads=True, split=split)
                yield cache_variant(arch, "bfloat16", head_dim, recipe, tile=tile)


def wgmma_specs(arch: str, head_dims: Iterable[int]) -> Iterator[HopperAttendSpec]:
    """Attention kernels by wgmma of every kind: of calls, caches and packed batches.

    Their registers are full, and which kinds would spill some of them is not to be foreseen.
    """
    recipes = [recipe for recipe in named(arch).recipes if named(arch).uses_wgmma(recipe)]
    for recipe, head_dim in itertools.product(recipes, head_dims):
        of_call = functools.partial(variant, arch, "bfloat16", head_dim, recipe)
        of_cache = functools.partial(cache_variant, arch, "bfloat16", head_dim, recipe)
        found: list[Variant | CacheVariant] = []
        for window, masked, softcap in itertools.product((False, True), repeat=3):
            for packed_heads, split in itertools.product((False, True), repeat=2):
                tile = QueryTile(WGMMA_ROWS, packed_heads, split)
                for of in (of_call, of_cache):
                    found.append(of(window=window, masked=masked, softcap=softcap, tile=tile))
            if not masked:
                found.append(of_call(window=window, softcap=softcap, varlen=True))
        for each in found:
            assert isinstance(each.attend, HopperAttendSpec)
            yield each.attend


def standalone_variants(arch: str) -> Iterator[Variant]:
    """What a host needs that cannot compile: every mask and softcap, and more dims."""
    for dtype in PACKED_DTYPES:
        for head_dim in STANDALONE_HEAD_DIMS:
            for recipe in named(arch).recipes:
                for window, masked, softcap in itertools.product((False, True), repeat=3):
                    yield variant(
                        arch,
                        dtype,
                        head_dim,
                        recipe,
                        window=window,
                        masked=masked,
                        softcap=softcap,
                    )


def standalone_specs(arch: str) -> tuple[KernelSpec, ...]:
    """The kernels of ``standalone_variants``, and those that prepare their operands."""
    found = dict.fromkeys(spec for each in standalone_variants(arch) for spec in each.specs())
    return (*found, *preparation_specs(arch))


def all_specs(arch: str, *, further: bool = False) -> tuple[KernelSpec, ...]:
    """The kernels of a pack, or those besides, each once, in a stable order."""
    packed = _specs((*variants(arch), *packed_caches(arch)))
    if not further:
        return packed
    others = (
        *_specs(further_variants(arch)),
        *_specs(cache_variants(arch)),
        *wgmma_specs(arch, HEAD_DIMS),
    )
    return tuple(spec for spec in dict.fromkeys(others) if spec not in packed)


def checked_specs(arch: str) -> tuple[KernelSpec, ...]:
    """What ``sagec kernels check`` looks at.

    The kernels of a pack, those of ``half_sums``, and of ``wgmma_specs`` those of the longest heads
    that have everything.
    """
    halves = (each for recipe in named(arch).recipes for each in half_sums(arch, recipe))
    full = (
        spec
        for spec in wgmma_specs(arch, HEAD_DIMS[-3:])
        if spec.window and spec.masked and spec.softcap and spec.packed_heads
    )
    return tuple(dict.fromkeys((*all_specs(arch), *_specs(halves), *full)))


def _specs(variants: Iterable[Variant | CacheVariant]) -> tuple[KernelSpec, ...]:
    return tuple(dict.fromkeys(spec for each in variants for spec in each.specs()))
