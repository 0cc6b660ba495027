"""What `auto` gives the CPU kernel: a shipped table, never a timing on the spot.

Measured against scaled_dot_product_attention, quantization and packing included; see
docs/cpu-kernel.md. An explicit recipe does not ask.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from sage_compiler.kernels.kernel import Gate, Problem

# Instruction set -> where the kernel begins to gain; one that is not here does not. A few queries
# do not pay for the quantization of all keys: decoding needs keys that stay packed (PackedKV).
GATES: Final[Mapping[str, Gate]] = MappingProxyType(
    {
        "avx512vnni": Gate(query_length=32, key_length=48, products=1 << 19),
        "avxvnni": Gate(query_length=64, key_length=64, products=1 << 20),
        "avx2": Gate(query_length=64, key_length=64, products=1 << 20),
    }
)


def gate(problem: Problem, isa_name: str) -> Gate | str:
    """The least sizes for a problem with this instruction set, or why it gets nothing."""
    if has_amx(problem.dtype):
        dtype = str(problem.dtype).removeprefix("torch.")
        return f"scaled_dot_product_attention has AMX for {dtype} here"
    found = GATES.get(isa_name)
    if found is None:
        return f"no faster than scaled_dot_product_attention with {isa_name} instructions"
    return found


_AMX: Final = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}


@functools.cache
def has_amx(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix units for a dtype, which torch's products in it use."""
    return dtype in _AMX and bool(torch.cpu.get_capabilities().get(_AMX[dtype], False))
