"""Which kernels exist: what one attention launches, and what a kernel pack ships.

Whether an attention gets any is for ``dispatch.decide`` to say.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sage_compiler.kernels.cuda.arch import ARCHS, Geometry
from sage_compiler.kernels.cuda.preparation import preparation_specs
from sage_compiler.kernels.cuda.spec import (
    HEAD_DIMS,
    QUERY_BLOCK,
    AttendSpec,
    KernelSpec,
    KeySpec,
    MergeSpec,
    QuerySpec,
    QueryTile,
    RotaryKeySpec,
    RotaryQuerySpec,
    RotaryStatisticsSpec,
    StatisticsSpec,
    ValueSpec,
    padded_dim,
)
from sage_compiler.precision import RECIPES, Accumulator, Format
from sage_compiler.semantics import RotaryPairs

# What a kernel pack has, of all recipes: what most models ask for, at some 40 kB a kernel. Masks,
# windows, softcap and float32 would be eight times as many and more, and compile in a second.
PACKED_DTYPES: Final = ("float16", "bfloat16")
PACKED_HEAD_DIMS: Final = (64, 128)
# A host that cannot compile needs masks, windows and softcap too, and pays for them in bytes.
STANDALONE_HEAD_DIMS: Final = (32, 64, 96, 128)

PACKED_ROWS: Final = (32, 64, 128)
"""The rows of a tile of packed heads; at a padded head_dim of 256 from the second on."""
_PACKED_WARP_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """The kernels of one attention, in the order of their launches.

    Attributes:
        merge: of an ``attend`` that splits keys; else None.
    """

    statistics: StatisticsSpec
    query: QuerySpec
    key: KeySpec
    value: ValueSpec
    attend: AttendSpec
    merge: MergeSpec | None = None

    def specs(self) -> tuple[KernelSpec, ...]:
        """All of them."""
        merge = () if self.merge is None else (self.merge,)
        return (self.statistics, self.query, self.key, self.value, self.attend, *merge)


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
        tile: what a block of the attention kernel does.
        varlen: for a packed batch of sequences.
    """
    qk, pv = RECIPES[recipe].qk, RECIPES[recipe].pv
    key_dim = _least_dim(head_dim)
    value_dim = key_dim if value_head_dim is None else _least_dim(value_head_dim)
    padded, padded_value = padded_dim(key_dim), padded_dim(value_dim)
    geometry = ARCHS[arch].geometry(max(key_dim, value_dim))
    statistics = StatisticsSpec(arch, dtype, padded, padded_value, varlen=varlen)
    query = QuerySpec(arch, dtype, padded, qk, varlen=varlen)
    key = KeySpec(arch, dtype, padded, qk, varlen=varlen)
    if rotary_query is not None:
        query = RotaryQuerySpec(arch, dtype, padded, qk, rotary_query)
    if rotary_key is not None:
        statistics = RotaryStatisticsSpec(arch, dtype, padded, padded_value, rotary_key)
        key = RotaryKeySpec(arch, dtype, padded, qk, rotary_key)
    return Variant(
        statistics=statistics,
        query=query,
        key=key,
        value=ValueSpec(arch, dtype, padded_value, pv, accumulator, varlen=varlen),
        attend=AttendSpec(
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
        ),
        merge=MergeSpec(arch, dtype, padded_value) if tile.split else None,
    )


def _warp_rows(geometry: Geometry, masked: bool, tile: QueryTile) -> int:
    if tile.packed_heads:  # each row has a scale of its own to keep, and few rows want many warps
        return _PACKED_WARP_ROWS
    return geometry.masked_warp_rows if masked else geometry.warp_rows


def _least_dim(head_dim: int) -> int:
    return next(dim for dim in HEAD_DIMS if dim >= head_dim)


def accumulators(recipe: str) -> tuple[Accumulator, ...]:
    """The accumulators that there are kernels for, the default one first."""
    if RECIPES[recipe].pv is Format.FP8:
        return (Accumulator.FP32, Accumulator.FP16)
    return (Accumulator.FP32,)


def variants(arch: str) -> Iterator[Variant]:
    """What a kernel pack has for an architecture: the dims and dtypes of most models."""
    for dtype in PACKED_DTYPES:
        for head_dim in PACKED_HEAD_DIMS:
            for recipe in ARCHS[arch].recipes:
                for accumulator in accumulators(recipe):
                    yield variant(arch, dtype, head_dim, recipe, accumulator)


def short_variants(arch: str) -> Iterator[Variant]:
    """What few queries get, of the dims and dtypes of a pack: see ``cut.choose``.

    One tile of packed heads, which decoding has, over all keys where there are many sequences, and
    over parts of them else.
    """
    for dtype in PACKED_DTYPES:
        for head_dim in PACKED_HEAD_DIMS:
            for recipe in ARCHS[arch].recipes:
                for split in (False, True):
                    tile = QueryTile(PACKED_ROWS[0], packed_heads=True, split=split)
                    yield variant(arch, dtype, head_dim, recipe, tile=tile)


def further_variants(arch: str) -> Iterator[Variant]:
    """What is compiled on first use, one of each kind: dims, float32, split keys, sequences."""
    for recipe in ARCHS[arch].recipes:
        for head_dim in HEAD_DIMS:
            if head_dim not in PACKED_HEAD_DIMS:
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
        split = QueryTile(PACKED_ROWS[0], packed_heads=True, split=True)
        yield variant(arch, "bfloat16", 128, recipe, tile=split)
        yield variant(arch, "bfloat16", 64, recipe, varlen=True)
        yield variant(arch, "bfloat16", 128, recipe, varlen=True)
        yield variant(arch, "bfloat16", 128, recipe, window=True, softcap=True, varlen=True)


def standalone_variants(arch: str) -> Iterator[Variant]:
    """What a host needs that cannot compile: every mask and softcap, and more dims."""
    for dtype in PACKED_DTYPES:
        for head_dim in STANDALONE_HEAD_DIMS:
            for recipe in ARCHS[arch].recipes:
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
    packed = dict.fromkeys(spec for each in variants(arch) for spec in each.specs())
    if not further:
        return tuple(packed)
    others = dict.fromkeys(spec for each in further_variants(arch) for spec in each.specs())
    return tuple(spec for spec in others if spec not in packed)
