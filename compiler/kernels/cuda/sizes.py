"""How one attention is cut into blocks, and the scratch memory that its launches share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels.cuda.spec import padded_dim
from sage_compiler.kernels.cuda.variants import Variant
from sage_compiler.precision import TILE_MMA, Format

FAR: Final = 1 << 30  # beyond any length, and twice of it within 32 bits
ALIGNMENT: Final = 256  # of each part of the scratch memory, in bytes

# Chunks of tokens whose statistics are taken apart: enough blocks for a GPU with few heads, few
# enough to add up again in every block of the quantizers.
_MOST_CHUNKS: Final = 32
_LEAST_CHUNK: Final = 256
_QUERY_SCALES: Final = TILE_MMA.q_block // 4  # of a query block
_FLOAT_BYTES: Final = 4


class Sizes(NamedTuple):
    """Those of one attention: Q (B, H, Lq, D), K (B, Hkv, Lk, D); no length is zero.

    Attributes:
        query_blocks, key_blocks: tiles of 128 queries and of 64 keys, the last ones cut off.
        chunks: parts of the keys, ``chunk_tokens`` each, whose statistics are taken apart.
        sequences: those of a packed batch, whose ``batch`` is 1 and whose lengths are sums; 1 of
            any other call.
        most_key_blocks: tiles of keys that one sequence has at most.
    """

    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    query_blocks: int
    key_blocks: int
    chunks: int
    chunk_tokens: int
    sequences: int
    most_key_blocks: int

    @classmethod
    def of(cls, batch: int, heads: int, kv_heads: int, query_length: int, key_length: int) -> Sizes:
        """Raises InvalidAttentionError for a length that positions in the kernels do not hold."""
        if max(query_length, key_length) >= FAR:
            raise InvalidAttentionError(
                f"{query_length} queries and {key_length} keys; the CUDA kernels take "
                f"fewer than {FAR} of each; split the sequence"
            )
        chunk_tokens = max(_LEAST_CHUNK, -(-key_length // _MOST_CHUNKS))
        key_blocks = -(-key_length // TILE_MMA.kv_block)
        return cls(
            batch,
            heads,
            kv_heads,
            query_length,
            key_length,
            -(-query_length // TILE_MMA.q_block),
            key_blocks,
            -(-key_length // chunk_tokens),
            chunk_tokens,
            1,
            key_blocks,
        )

    @classmethod
    def of_sequences(
        cls, count: int, heads: int, kv_heads: int, queries: int, keys: int, longest: int
    ) -> Sizes:
        """Those of a packed batch, at most, when each sequence begins with blocks of its own.

        What is behind the last sequence counts as one more, of queries without keys. See
        varlen.cuh, which has the same numbers.

        Args:
            count: how many sequences there are.
            queries, keys: the sums of their lengths, at most.
            longest: the keys of one sequence, at most.

        Raises:
            InvalidAttentionError: sums that positions in the kernels do not hold.
        """
        return cls.of(1, heads, kv_heads, queries, keys)._replace(
            query_blocks=queries // TILE_MMA.q_block + count + 1,
            key_blocks=keys // TILE_MMA.kv_block + count,
            chunks=keys // _LEAST_CHUNK + count,
            sequences=count + 1,
            most_key_blocks=-(-longest // TILE_MMA.kv_block),
        )

    def blocks(self) -> tuple[int, int, int, int, int]:
        """Of each launch, in the order of ``Variant.specs``."""
        queries = self.batch * self.heads * self.query_blocks
        kv_heads = self.batch * self.kv_heads
        keys = kv_heads * self.key_blocks
        return (2 * kv_heads * self.chunks, queries, keys, keys, queries)

    def scratch(self, kernels: Variant, *, row_term: bool) -> tuple[int, ...]:
        """Bytes of each part of the scratch memory, zero for what these kernels do not need.

        The parts: sums of K, amax of V, codes of Q, scales of Q, means of Q, the row term, packed
        tiles of K and V, scales of V, delta.

        Args:
            row_term: whether a float for each query is needed: for an LSE, sinks or a softcap.
        """
        attend = kernels.attend
        padded, padded_value = padded_dim(attend.head_dim), padded_dim(attend.value_head_dim)
        smooths_query = attend.qk is Format.INT4
        rows = self.batch * self.heads * self.query_blocks
        kv_heads = self.batch * self.kv_heads
        delta = rows * self.most_key_blocks * TILE_MMA.kv_block * _FLOAT_BYTES
        return (
            kv_heads * self.chunks * padded * _FLOAT_BYTES,
            kv_heads * self.chunks * padded_value * _FLOAT_BYTES,
            rows * attend.query_tile_bytes,
            rows * _QUERY_SCALES * _FLOAT_BYTES,
            rows * padded * _FLOAT_BYTES if smooths_query else 0,
            self.batch * self.heads * self.query_length * _FLOAT_BYTES if row_term else 0,
            kv_heads * self.key_blocks * attend.tile.bytes,
            kv_heads * self.sequences * padded_value * _FLOAT_BYTES,
            delta if smooths_query else 0,
        )


def arrange(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offsets of parts of these sizes behind one another, each aligned, and how much they take.

    That includes what aligning the first of them may take.
    """
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end + ALIGNMENT
