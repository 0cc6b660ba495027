"""Tensor maps: what TMA is told of a tensor, boxes of which it copies to shared memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

UNIT: Final = 16
"""Bytes; a tensor and its rows begin at multiples of it."""
WIDEST_ROW: Final = 128
"""Bytes of a box's row that are swizzled at most."""

_BYTES: Final = 128
_ALIGNMENT: Final = 64
_STRIDES_END: Final = 1 << 40

# CUtensorMapDataType by the bytes of an element, which is copied as it is; CUtensorMapSwizzle by
# those of a row; CUtensorMapL2promotion.
_UNSIGNED: Final = {1: 0, 2: 1, 4: 2}
_SWIZZLES: Final = {32: 1, 64: 2, 128: 3}
_PROMOTED_TO_128_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A tensor in global memory, and the boxes that are copied. Dims as torch has them.

    Attributes:
        address: of its first element.
        element_bytes: 1, 2 or 4.
        sizes: of its dims.
        strides: in bytes, of all dims but the last, whose elements are contiguous.
        box: elements of each dim; a row has 32, 64 or 128 bytes, and is swizzled as wide as that.
    """

    address: int
    element_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    @property
    def is_possible(self) -> bool:
        """Whether it begins, and goes on, where TMA can."""
        places = (self.address, *self.strides)
        return not any(place % UNIT for place in places) and max(self.strides) < _STRIDES_END

    def encoded(self, encode: Any) -> bytes | None:
        """Its 128 bytes, by the driver's cuTensorMapEncodeTiled; None where that refuses."""
        rank = len(self.sizes)
        memory = ctypes.create_string_buffer(_BYTES + _ALIGNMENT - 1)
        offset = -ctypes.addressof(memory) % _ALIGNMENT
        status: int = encode(
            ctypes.addressof(memory) + offset,
            _UNSIGNED[self.element_bytes],
            rank,
            self.address,
            (ctypes.c_uint64 * rank)(*reversed(self.sizes)),
            (ctypes.c_uint64 * rank)(*reversed(self.strides)),
            (ctypes.c_uint32 * rank)(*reversed(self.box)),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,  # not interleaved
            _SWIZZLES[self.box[-1] * self.element_bytes],
            _PROMOTED_TO_128_BYTES,
            0,  # what is out of bounds is zero
        )
        return None if status else memory.raw[offset : offset + _BYTES]
