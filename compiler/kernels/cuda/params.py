"""The structs that the kernels take, as ``cutlass_templates/include/sage/params.cuh`` has them.

P is a pointer, q a 64-bit integer, f a float; a tensor is "P4q": data and strides in elements.
Each kernel asserts the size of its struct when it is compiled.
"""

from __future__ import annotations

import struct
from typing import Final

_TENSOR: Final = "P4q"

STATISTICS: Final = struct.Struct(f"@{_TENSOR}{_TENSOR}2P5q")
QUERY: Final = struct.Struct(f"@{_TENSOR}5P7q2f")
KEY: Final = struct.Struct(f"@{_TENSOR}5P6q")
VALUE: Final = struct.Struct(f"@{_TENSOR}3P5q")
ATTEND: Final = struct.Struct("@8P10q2f")
