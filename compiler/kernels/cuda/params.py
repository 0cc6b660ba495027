"""The structs that the kernels take, as ``cutlass_templates/include/sage/params.cuh`` has them.

P is a pointer, q a 64-bit integer, f a float; a tensor is "P5q": data, strides in elements, and its
channels. Each kernel asserts the size of its struct when it is compiled.
"""

from __future__ import annotations

import struct
from typing import Final

_TENSOR: Final = "P5q"

STATISTICS: Final = struct.Struct(f"@{_TENSOR}{_TENSOR}2P6q")
QUERY: Final = struct.Struct(f"@{_TENSOR}5P9q2f")
KEY: Final = struct.Struct(f"@{_TENSOR}5P7q")
VALUE: Final = struct.Struct(f"@{_TENSOR}3P6q")
ATTEND: Final = struct.Struct("@9P12q2f")
