"""Packed batches: sequences of different lengths along the length of a batch of 1."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sage_compiler.errors import InvalidAttentionError


def sequences(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The packed sequences of (1, H, total, D) tensors, one triple of views each.

    Raises:
        InvalidAttentionError: lengths that do not ascend from 0 to the total.
    """
    starts_q = read_offsets("cu_seqlens_q", cu_q, query.shape[2])
    starts_k = read_offsets("cu_seqlens_k", cu_k, key.shape[2])
    bounds = zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    return [(query[:, :, a:b], key[:, :, c:d], value[:, :, c:d]) for a, b, c, d in bounds]


def join(parts: list[tuple[Tensor, Tensor]], query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and LSEs of the sequences, packed again; an empty LSE was not wanted."""
    if not parts:
        output = query.new_zeros((*query.shape[:3], value.shape[3]))
        return output, query.new_zeros(query.shape[:3], dtype=torch.float32)
    outputs, lses = zip(*parts, strict=True)
    lse = lses[0] if lses[0].dim() == 1 else torch.cat(lses, dim=2)
    return torch.cat(outputs, dim=2), lse


def read_offsets(name: str, offsets: Tensor, total: int) -> list[int]:
    """Read cumulative lengths: 0 = o[0] <= o[1] <= ... <= o[N] = total tokens.

    Raises:
        InvalidAttentionError: otherwise.
    """
    values: list[int] = offsets.tolist()
    ascending = all(a <= b for a, b in itertools.pairwise(values))
    if not values or values[0] != 0 or values[-1] != total or not ascending:
        raise InvalidAttentionError(
            f"{name} = {values[:8]}{'...' if len(values) > 8 else ''}; it must ascend from 0 to "
            f"the packed length {total}"
        )
    return values
