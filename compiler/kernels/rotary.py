"""Rotary embedding of Q and K: its tables, its formula in torch, and its checks.

Of the first R channels of a token every pair (a, b) becomes (a cos - b sin, b cos + a sin); the
other channels stay. Source: RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.semantics import DTYPES, RotaryPairs


@dataclass(frozen=True, slots=True)
class Tables:
    """The cosines and the sines for the tokens of Q or of K.

    Attributes:
        cosine, sine: broadcastable to (B, heads, L, R), the last dim R, with an entry for each
            channel, or R / 2, with one for each pair. Any strides.
    """

    cosine: Tensor
    sine: Tensor


@dataclass(frozen=True, slots=True)
class Rotary:
    """How Q and K are rotated before they are multiplied.

    Attributes:
        pairs: which channels make a pair.
        channels: R, how many of them are rotated; even.
        dtype: in which products and sums are computed where torch computes them: that of the
            model. Kernels rotate in float32.
        query, key: their tables; None: it is not rotated.
    """

    pairs: RotaryPairs
    channels: int
    dtype: torch.dtype
    query: Tables | None
    key: Tables | None

    def rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query (B, H, Lq, D) and key (B, Hkv, Lk, D), rotated by torch: differentiable."""
        return self._rotate(query, self.query), self._rotate(key, self.key)

    def _rotate(self, tensor: Tensor, tables: Tables | None) -> Tensor:
        if tables is None:
            return tensor
        turned = tensor[..., : self.channels].to(self.dtype)
        if self.pairs is RotaryPairs.HALF:
            first, second = turned.chunk(2, -1)
            other = torch.cat((-second, first), -1)
        else:
            first, second = turned[..., ::2], turned[..., 1::2]
            other = torch.stack((-second, first), -1).flatten(-2)
        cosine, sine = self._whole(tables.cosine), self._whole(tables.sine)
        result = (turned * cosine + other * sine).to(tensor.dtype)
        if self.channels == tensor.shape[-1]:
            return result
        return torch.cat((result, tensor[..., self.channels :]), -1)

    def _whole(self, table: Tensor) -> Tensor:
        """A table with an entry for each channel."""
        if table.shape[-1] == self.channels:
            return table
        if self.pairs is RotaryPairs.HALF:
            return torch.cat((table, table), -1)
        return table.repeat_interleave(2, -1)

    def strides(self, table: Tensor) -> tuple[int, int, int, int, int]:
        """Steps in elements from batch to batch, head, token, pair, and channel of a pair."""
        missing = 4 - table.dim()
        outer = [
            0 if size == 1 else stride
            for size, stride in zip(table.shape[:-1], table.stride()[:-1], strict=True)
        ]
        batch, head, token = (0,) * missing + tuple(outer)
        step = table.stride(-1)
        if table.shape[-1] != self.channels:
            return batch, head, token, step, 0
        if self.pairs is RotaryPairs.HALF:
            return batch, head, token, step, step * (self.channels // 2)
        return batch, head, token, 2 * step, step

    def check(self, query: Tensor, key: Tensor) -> None:
        """Check the tables against query and key, real or fake.

        Raises:
            InvalidAttentionError: a number of channels that is odd or more than there are, or
                tables of other shapes, dtypes or devices.
        """
        head_dim = query.shape[3]
        if self.channels % 2 or not 2 <= self.channels <= head_dim:
            raise InvalidAttentionError(
                f"{self.channels} rotated channels of {head_dim}; it must be an even number from 2 "
                "to head_dim"
            )
        for name, tensor, tables in (("query", query, self.query), ("key", key, self.key)):
            if tables is not None:
                self._check_table(f"cosine of {name}", tables.cosine, tensor, tables.cosine.dtype)
                self._check_table(f"sine of {name}", tables.sine, tensor, tables.cosine.dtype)

    def _check_table(self, name: str, table: Tensor, tensor: Tensor, dtype: torch.dtype) -> None:
        if table.dtype not in DTYPES or table.dtype != dtype:
            raise InvalidAttentionError(
                f"the {name} is {table.dtype}; cosines and sines must both be one of float32, "
                "bfloat16 and float16"
            )
        if torch.promote_types(table.dtype, self.dtype) != self.dtype:
            raise InvalidAttentionError(
                f"the {name} is {table.dtype}, and the rotation in {self.dtype}; rotate in float32"
            )
        if table.device != tensor.device:
            raise InvalidAttentionError(
                f"the {name} is on {table.device} and the tensor on {tensor.device}; move them to "
                "one device"
            )
        shape, of_tensor = tuple(table.shape), tuple(tensor.shape)
        aligned = of_tensor[4 - table.dim() : 3]
        fits = 1 <= table.dim() <= 4 and all(
            statically_known_true(size == 1) or not statically_known_true(size != full)
            for size, full in zip(shape[:-1], aligned, strict=True)
        )
        if not fits or shape[-1] not in (self.channels, self.channels // 2):
            raise InvalidAttentionError(
                f"the {name} has shape {shape}; it must broadcast to {of_tensor[:3]} and end in "
                f"{self.channels} channels or {self.channels // 2} pairs"
            )
