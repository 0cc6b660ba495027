"""The layout of the output, which the operator promises: see ``ops.py``."""

from __future__ import annotations

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false


def lies_length_first(query: Tensor) -> bool:
    """Whether query is stored as (B, Lq, H, D), the layout of a transposed projection."""
    return guard_or_false(query.stride(1) < query.stride(2))


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """An uninitialized output (B, H, Lq, Dv) in the promised layout; fake tensors too."""
    batch, heads, length, _ = query.shape
    if lies_length_first(query):
        return query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
    return query.new_empty((batch, heads, length, value.shape[3]))


def in_layout(output: Tensor, query: Tensor) -> Tensor:
    """The output in the promised layout; copies only where a kernel's differs."""
    if lies_length_first(query):
        return output.transpose(1, 2).contiguous().transpose(1, 2)
    return output.contiguous()
