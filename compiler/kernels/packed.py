"""What ``sage_compiler.PackedKV`` asks of the device that has its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sage_compiler.semantics import Semantics


@dataclass(frozen=True, slots=True)
class PackedShape:
    """The sizes of a cache, all at least 1; capacity in tokens."""

    batch: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    capacity: int
    dtype: torch.dtype


class PackedStore(Protocol):
    """The memory of a cache, and what is done to it; arguments are checked before.

    How many tokens it has, the caller remembers: an append that raises leaves those before it.
    """

    @property
    def precision(self) -> str:
        """The recipe."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory, whatever the number of tokens."""

    def append(self, length: int, key: Tensor, value: Tensor) -> None:
        """Add n tokens after the first ``length``.

        Args:
            key, value: (batch, kv_heads, n, head_dim) and (batch, kv_heads, n, value_head_dim),
                any strides; n may be 0, and is at most what is free.
        """

    def attend(
        self,
        length: int,
        query: Tensor,
        semantics: Semantics,
        output: Tensor,
        *,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        lse: Tensor | None,
    ) -> None:
        """Attention to the first ``length`` tokens.

        Args:
            query: (batch, H, Lq, head_dim), any strides.
            output: (batch, H, Lq, value_head_dim), as ``layout.empty_output`` makes it; written.
            attn_mask: of 1 to 4 dims, broadcastable to (batch, H, Lq, length).
            sinks: float32 (H,), dense.
            lse: float32 (batch, H, Lq), dense; written, if it is wanted.
        """
