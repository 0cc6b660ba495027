"""Which kernels exist: what one attention launches, and what a kernel pack ships.

The choices of tiles stand here, with their reasons.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from sage_compiler.kernels.cuda.spec import (
    ARCHS,
    DTYPES,
    HEAD_DIMS,
    AttendSpec,
    KernelSpec,
    KeySpec,
    QuerySpec,
    StatisticsSpec,
    ValueSpec,
)
from sage_compiler.precision import RECIPES, Accumulator, Format


@dataclass(frozen=True, slots=True)
class Variant:
    """The kernels of one attention, in the order of their launches."""

    statistics: StatisticsSpec
    query: QuerySpec
    key: KeySpec
    value: ValueSpec
    attend: AttendSpec

    def specs(self) -> tuple[KernelSpec, ...]:
        """All of them."""
        return (self.statistics, self.query, self.key, self.value, self.attend)


@functools.cache
def variant(
    arch: str,
    dtype: str,
    head_dim: int,
    recipe: str,
    accumulator: Accumulator = Accumulator.FP32,
) -> Variant:
    """The kernels for one call; ``accumulator`` is FP16 for SageAttention2++ (FP8 P and V only)."""
    qk, pv = RECIPES[recipe].qk, RECIPES[recipe].pv
    return Variant(
        statistics=StatisticsSpec(arch, dtype, head_dim),
        query=QuerySpec(arch, dtype, head_dim, qk),
        key=KeySpec(arch, dtype, head_dim, qk),
        value=ValueSpec(arch, dtype, head_dim, pv, accumulator),
        attend=AttendSpec(
            arch,
            dtype,
            head_dim,
            qk,
            pv,
            accumulator,
            warp_rows=_warp_rows(arch, head_dim, qk, pv),
            stages=_stages(head_dim),
        ),
    )


def _warp_rows(arch: str, head_dim: int, qk: Format, pv: Format) -> int:
    """32 where the registers last, else 16.

    With 32 rows a warp reads K and V from shared memory half as often. At head_dim 128 its output
    takes 128 of 255 registers, and the compiler spills some, except in INT8 with a 16-bit PV on
    sm_8x and sm_90; there it is also needed most, since V in 16 bits is twice as much to read: with
    16 rows those reads would take as long as the products on an A100.
    """
    if head_dim <= 64:
        return 32
    wide = qk is Format.INT8 and pv is Format.FP16 and ARCHS[arch].capability < (10, 0)
    return 32 if wide else 16


def _stages(head_dim: int) -> int:
    """Tiles of K and V in shared memory: as many as leave room for two blocks in 99 KiB."""
    return 3 if head_dim <= 64 else 2


def accumulators(recipe: str) -> tuple[Accumulator, ...]:
    """The accumulators that there are kernels for, the default one first."""
    if RECIPES[recipe].pv is Format.FP8:
        return (Accumulator.FP32, Accumulator.FP16)
    return (Accumulator.FP32,)


def variants(arch: str) -> Iterator[Variant]:
    """All that an architecture offers."""
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for recipe in ARCHS[arch].recipes:
                for accumulator in accumulators(recipe):
                    yield variant(arch, dtype, head_dim, recipe, accumulator)


def all_specs(arch: str) -> tuple[KernelSpec, ...]:
    """The kernels of all variants of an architecture, each once, in a stable order."""
    return tuple(dict.fromkeys(spec for each in variants(arch) for spec in each.specs()))
