"""Kernels for a host without torch: what a mask shows, and sinks as floats.

``masks.py`` finds the same with torch's operations. They know nothing of a head_dim or a dtype, so
that an architecture has one of each.
"""

from __future__ import annotations

import struct
from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Final

from sage_compiler.kernels.cuda import params
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.precision import TILE_MMA

_THREADS: Final = 256
_WORD_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class PreparationSpec(KernelSpec, ABC):
    """One of these kernels."""

    @property
    def threads(self) -> int:
        return _THREADS

    @property
    def arguments(self) -> tuple[str, ...]:
        return (str(_THREADS),)


@dataclass(frozen=True, slots=True)
class MaskRowsSpec(PreparationSpec):
    """What a mask is in each tile, and which queries see a key."""

    kind: ClassVar[str] = "mask_rows"
    template: ClassVar[str] = "MaskRows"
    params: ClassVar[struct.Struct] = params.MASK_ROWS

    @property
    def shared_bytes(self) -> int:
        return 2 * (TILE_MMA.q_block // 32) * _THREADS * _WORD_BYTES


@dataclass(frozen=True, slots=True)
class MaskKeysSpec(PreparationSpec):
    """Which keys some query sees, and which count in statistics."""

    kind: ClassVar[str] = "mask_keys"
    template: ClassVar[str] = "MaskKeys"
    params: ClassVar[struct.Struct] = params.MASK_KEYS

    @property
    def shared_bytes(self) -> int:
        return _THREADS * _WORD_BYTES


@dataclass(frozen=True, slots=True)
class MaskCountsSpec(PreparationSpec):
    """How many keys of a head count."""

    kind: ClassVar[str] = "mask_counts"
    template: ClassVar[str] = "MaskCounts"
    params: ClassVar[struct.Struct] = params.MASK_COUNTS

    @property
    def shared_bytes(self) -> int:
        return _THREADS * _WORD_BYTES


@dataclass(frozen=True, slots=True)
class SinksSpec(PreparationSpec):
    """Sinks as floats, each repeated."""

    kind: ClassVar[str] = "sinks"
    template: ClassVar[str] = "Sinks"
    params: ClassVar[struct.Struct] = params.SINKS

    @property
    def shared_bytes(self) -> int:
        return 0


def preparation_specs(arch: str) -> tuple[PreparationSpec, ...]:
    """All of them, in the order in which tables name them."""
    return (MaskRowsSpec(arch), MaskKeysSpec(arch), MaskCountsSpec(arch), SinksSpec(arch))
