"""Calls of the operator for its tests: tensors in any layout, and one way to run a ``Call``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sage_compiler import ops as ops  # registers the operator
from tests.compiler.kernels.dense import Call

attention = torch.ops.sage.attention.default
attention_lse = torch.ops.sage.attention.lse

LAYOUTS = (
    "contiguous",
    "tokens_first",
    "expanded_heads",
    "every_other",
    "head_dim_first",
    "sliced",
)


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_call(
    *lengths: int,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> Call:
    """Gaussian Q, K, V; lengths (Lq, Lk), or one for both."""
    query_length, key_length = lengths[0], lengths[-1]
    shapes = (
        (batch, heads, query_length, head_dim),
        (batch, kv_heads, key_length, head_dim),
        (batch, kv_heads, key_length, head_dim if value_dim is None else value_dim),
    )
    made = [gaussian(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    return Call(*(laid_out(tensor, layout) for tensor in made))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same shape with other strides (and, where they are 0, repeated values)."""
    match layout:
        case "contiguous":
            return tensor
        case "tokens_first":  # a projection (B, L, H * D), split into heads and transposed
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        case "expanded_heads":
            return tensor[:, :1].expand_as(tensor)
        case "every_other":
            return tensor.repeat_interleave(2, -1)[..., ::2]
        case "head_dim_first":
            return tensor.mT.contiguous().mT
        case "sliced":  # one third of a fused projection (B, L, 3, H, D)
            fused = torch.stack([tensor.transpose(1, 2)] * 3, 2)
            return fused[:, :, 1].transpose(1, 2)
        case _:
            raise ValueError(layout)


def options(call: Call) -> dict[str, Any]:
    """The operator's arguments after query, key and value."""
    semantics = call.semantics
    return {
        "attn_mask": call.attn_mask,
        "mask_class": str(semantics.mask_class),
        "scale": semantics.scale,
        "dead_rows": str(semantics.dead_rows),
        "softcap": semantics.softcap,
        "sinks": call.sinks,
        "window_left": semantics.window_left,
        "window_right": semantics.window_right,
    }


def run(call: Call, recipe: str = "exact") -> Tensor:
    output: Tensor = attention(call.query, call.key, call.value, recipe=recipe, **options(call))
    return output


def run_lse(call: Call, recipe: str = "exact") -> tuple[Tensor, Tensor]:
    output, lse = attention_lse(call.query, call.key, call.value, recipe=recipe, **options(call))
    return output, lse
