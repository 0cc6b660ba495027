"""The structs that the kernels take, as ``cutlass_templates/include/sage/params.cuh`` has them.

P is a pointer, q a 64-bit integer, f a float; a tensor is "P5q": data, strides in elements, and its
channels. Each kernel asserts the size of its struct when it is compiled.
"""

from __future__ import annotations

import struct
from typing import Final

_TENSOR: Final = "P5q"
_FLAGS: Final = "P3q"
_MASK: Final = "P5q"
_STAGED: Final = "P3q"

STATISTICS: Final = struct.Struct(f"@{_TENSOR}{_TENSOR}2P{_FLAGS}6q")
QUERY: Final = struct.Struct(f"@{_TENSOR}7P{_FLAGS}9q2f")
KEY: Final = struct.Struct(f"@{_TENSOR}6P{_FLAGS}7q")
VALUE: Final = struct.Struct(f"@{_TENSOR}3P{_FLAGS}6q")
SCHEDULE: Final = struct.Struct("@3P2q")
ATTEND: Final = struct.Struct(f"@9P{_MASK}{_FLAGS}{_FLAGS}3P18q2f")
# What ``struct MaskedAttendParams`` has behind that: rows of a box, and a tensor map.
_TENSOR_MAP_BYTES: Final = 128
_TENSOR_MAP_ALIGNMENT: Final = 64
_GAP: Final = -(ATTEND.size + 8) % _TENSOR_MAP_ALIGNMENT
MASK_MAP: Final = struct.Struct(f"@q{_GAP}x{_TENSOR_MAP_BYTES}s")
MERGE: Final = struct.Struct("@7P10q2f")

# Of a cache.
KEY_MEAN: Final = struct.Struct(f"@{_TENSOR}{_STAGED}P3q")
APPEND: Final = struct.Struct(f"@{_TENSOR}{_TENSOR}{_STAGED}{_STAGED}2P7q")
DELTA: Final = struct.Struct("@4P4q")

# What the kernels for packed batches take behind their own struct; see varlen.py.
SEQUENCES: Final = struct.Struct("@2P10q")

# The tables of a rotary embedding, data and five strides each; the channels, and the dtype.
ROTARY: Final = struct.Struct("@P5qP5q2q")


def with_rotary(plain: struct.Struct) -> struct.Struct:
    """The parameters of a kernel that rotates: those of the plain one, and ``ROTARY``."""
    return struct.Struct(plain.format + ROTARY.format.removeprefix("@"))


def quantize(rotary_query: bool, rotary_key: bool) -> struct.Struct:
    """The parameters of the kernel that does what four do, one struct behind the other.

    Args:
        rotary_query, rotary_key: whether it rotates Q, or K, as it reads it.
    """
    key = (with_rotary(STATISTICS), with_rotary(KEY)) if rotary_key else (STATISTICS, KEY)
    query = with_rotary(QUERY) if rotary_query else QUERY
    structs = (key[0], query, key[1], VALUE, SCHEDULE)
    return struct.Struct("@" + "".join(each.format.removeprefix("@") for each in structs))


# Of the kernels for hosts without torch; a library packs these, see launch_table.py.
MASK_ROWS: Final = struct.Struct(f"@{_MASK}3P7q")
MASK_KEYS: Final = struct.Struct(f"@{_MASK}2P7q")
MASK_COUNTS: Final = struct.Struct("@2P4q")
SINKS: Final = struct.Struct("@2P4q")
