"""The lengths of a packed batch, as the kernels read them: cumulative, from the device's memory.

The host need not know them: what it launches and the scratch memory go by the sums of lengths and
the number of sequences, so that nothing waits for the device, and a CUDA graph may be captured and
replayed with other lengths. ``varlen.cuh`` has the other half.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels.cuda import params
from sage_compiler.kernels.cuda.sizes import Sizes
from sage_compiler.packed import read_offsets
from sage_compiler.semantics import MaskClass, Semantics

_NO_LIMIT: Final = 1 << 40  # of a side of a window: beyond any length


@dataclass(frozen=True, slots=True)
class Lengths:
    """Those of N sequences, packed along the lengths of a batch of 1.

    Attributes:
        queries, keys: cumulative lengths (N + 1,), int32 or int64, dense, on the kernels' device.
            The kernels do not trust them: each is clamped to the packed length, and a sequence that
            would end before it begins has no tokens. Queries behind the last offset yield zeros.
            Where offsets do not ascend from 0, what the tokens yield that no sequence has, or more
            than one, is not defined.
        longest: the keys of one sequence, at most.
    """

    queries: Tensor
    keys: Tensor
    longest: int

    @classmethod
    def of(
        cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, query: Tensor, key: Tensor, *, read: bool
    ) -> Lengths:
        """Those of a call's tensors (1, H, total, D).

        Args:
            read: read offsets on the device too, which waits for it, for the longest sequence;
                those on the CPU are always read.

        Raises:
            InvalidAttentionError: offsets that were read and do not ascend from 0 to the packed
                length; or none at all.
        """
        if cu_seqlens_q.shape[0] == 0:
            raise InvalidAttentionError(
                "cu_seqlens_q and cu_seqlens_k are empty; N sequences have N + 1 offsets each"
            )
        longest = key.shape[2]
        if read or cu_seqlens_q.is_cpu:
            read_offsets("cu_seqlens_q", cu_seqlens_q, query.shape[2])
        if read or cu_seqlens_k.is_cpu:
            ends = read_offsets("cu_seqlens_k", cu_seqlens_k, key.shape[2])
            longest = max((b - a for a, b in itertools.pairwise(ends)), default=0)
        return cls(
            # What was checked is what is copied: pinned memory may change under a copy that waits.
            cu_seqlens_q.to(query.device).contiguous(),
            cu_seqlens_k.to(query.device).contiguous(),
            longest,
        )

    def sizes(self, heads: int, kv_heads: int, queries: int, keys: int) -> Sizes:
        """How a batch of these sums of lengths is cut into blocks, at most."""
        return Sizes.of_sequences(
            self.queries.shape[0] - 1, heads, kv_heads, queries, keys, self.longest
        )

    def packed(self, sizes: Sizes, semantics: Semantics) -> bytes:
        """As ``struct Sequences``."""
        band = semantics.band(0, 0)
        left, right = (None, None) if band is None else (band.left, band.right)
        return params.SEQUENCES.pack(
            self.queries.data_ptr(),
            self.keys.data_ptr(),
            self.queries.element_size(),
            self.keys.element_size(),
            self.queries.shape[0] - 1,
            sizes.query_length,
            sizes.key_length,
            sizes.heads // sizes.kv_heads,
            sizes.most_key_blocks,
            _NO_LIMIT if left is None else left,
            _NO_LIMIT if right is None else right,
            semantics.mask_class in (MaskClass.CAUSAL_BOTTOM_RIGHT, MaskClass.WINDOW_BOTTOM_RIGHT),
        )
