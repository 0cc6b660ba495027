"""How one attention is cut into blocks, and the scratch memory that its launches share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels.cuda.spec import (
    AttendSpec,
    HopperAttendSpec,
    QueryTile,
    padded_dim,
)
from sage_compiler.kernels.cuda.variants import CacheVariant, Variant
from sage_compiler.precision import TILE_MMA, Format
from sage_compiler.semantics import Band, Semantics

FAR: Final = 1 << 30  # beyond any length, and twice of it within 32 bits
ALIGNMENT: Final = 256  # of each part of the scratch memory, in bytes

# Chunks of tokens whose statistics are taken apart: enough blocks for a GPU with few heads, few
# enough to add up again in every block of the quantizers.
_MOST_CHUNKS: Final = 32
_LEAST_CHUNK: Final = 256
_QUERY_SCALES: Final = TILE_MMA.q_block // 4  # of a query block
_FLOAT_BYTES: Final = 4
_COUNTER_BYTES: Final = 32  # of a head: kCounters of params.cuh
_TAKEN_BYTES: Final = 4
# Of K and V, for each multiprocessor: what statistics read ahead of the first conversion. A block's
# tokens, 64 of 128 channels; a multiprocessor has up to three of them on their way.
_AHEAD_BYTES: Final = 16 << 10
# Of an L2 cache of 50 MB in two halves, as H100's, which both keep what both read.
_CACHED_BYTES: Final = 16 << 20


class Reach(NamedTuple):
    """What the band shows; an explicit mask may hide more.

    Attributes:
        lower, upper: query i sees the keys i + lower to i + upper.
        first_key, end_key: some query sees the keys [first_key, end_key), and all of these count.
        first_live, end_live: the queries [first_live, end_live) see a key.
    """

    lower: int
    upper: int
    first_key: int
    end_key: int
    first_live: int
    end_live: int

    @classmethod
    def of(cls, semantics: Semantics, query_length: int, key_length: int) -> Reach:
        """That of a call."""
        band = semantics.band(query_length, key_length) or Band(None, None, 0)
        lower = -FAR if band.left is None else max(-FAR, band.offset - band.left)
        upper = FAR if band.right is None else min(FAR, band.offset + band.right)
        first_key = min(key_length, max(0, lower))
        first_live = min(query_length, max(0, -upper))
        return cls(
            lower,
            upper,
            first_key,
            max(first_key, min(key_length, query_length + upper)),
            first_live,
            max(first_live, min(query_length, key_length - lower)),
        )

    @property
    def key_tiles(self) -> int:
        """The tiles of keys that some query sees."""
        width = TILE_MMA.kv_block
        return -(-self.end_key // width) - self.first_key // width


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

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Queries of all heads."""
        return self.batch * self.heads * self.query_length

    def row_blocks(self, tile: QueryTile) -> int:
        """Tiles of queries: of each head, or with packed heads of each key/value head."""
        if not tile.packed_heads:
            return self.query_blocks
        return -(-self.group * self.query_length // tile.rows)

    def tiles(self, tile: QueryTile) -> int:
        """Tiles of queries of all heads."""
        heads = self.kv_heads if tile.packed_heads else self.heads
        return self.batch * heads * self.row_blocks(tile)

    def heads_at_once(self, attend: AttendSpec | HopperAttendSpec) -> int:
        """Heads that a persistent grid works on at a time, so that their keys and values stay in a
        cache together; at least one of K and V.

        Those of Q in whole groups, or where they are packed those of K and V. As many each time, as
        far as they come out even: a few that are left to the end would be long in being done.
        """
        fitting = max(1, _CACHED_BYTES // (self.key_blocks * attend.tile.bytes))
        heads = self.batch * self.kv_heads
        times = -(-heads // fitting)
        return -(-heads // times) * (1 if attend.packed_heads else self.group)

    def blocks(
        self, kernels: Variant | CacheVariant, splits: int, multiprocessors: int
    ) -> tuple[int, ...]:
        """Of each launch, in the order of ``Variant.specs``, also where K and V are in a cache.

        Args:
            splits: parts that the keys are divided into, of kernels that do; else 1.
            multiprocessors: of the device, of which a persistent grid has one block each.
        """
        kv_heads = self.batch * self.kv_heads
        keys = kv_heads * self.key_blocks
        queries = self.batch * self.heads * self.query_blocks
        products = self.tiles(kernels.attend.query_tile) * splits
        if kernels.attend.persistent:
            products = min(products, multiprocessors)
        statistics = kv_heads * self.chunks
        quantize = kernels.quantize if isinstance(kernels, Variant) else None
        if quantize is None:
            quantizers: tuple[int, ...] = (2 * statistics, queries, keys, keys)
        else:
            statistics *= quantize.slices * (2 if quantize.scales_value else 1)
            quantizers = (statistics + queries * quantize.tasks_of_query_block + 2 * keys,)
        merge = () if kernels.merge is None else (-(-self.rows // kernels.merge.rows),)
        return (*quantizers, products, *merge)

    def scratch(self, kernels: Variant, *, row_term: bool, splits: int = 1) -> tuple[int, ...]:
        """Bytes of each part of the scratch memory, zero for what these kernels do not need.

        The parts: sums of K, amax of V, codes of Q, scales of Q, means of Q, the row term, packed
        tiles of K and V, scales of V, delta; of split keys, what each part makes of a query: sums
        of P V, and two numbers; of quantizers in one launch, counters, sums of K and amax of V of
        all chunks; the counter of a persistent grid.

        Args:
            row_term: whether a float for each query is needed: for an LSE, sinks or a softcap.
            splits: as of ``blocks``.
        """
        attend = kernels.attend
        padded, padded_value = padded_dim(attend.head_dim), padded_dim(attend.value_head_dim)
        kv_heads = self.batch * self.kv_heads
        *of_query, delta, part_outputs, part_sums, taken = self.query_scratch(
            attend, row_term=row_term, splits=splits
        )
        totals = kv_heads if kernels.quantize is not None else 0
        return (
            kv_heads * self.chunks * padded * _FLOAT_BYTES,
            kv_heads * self.chunks * padded_value * _FLOAT_BYTES,
            *of_query,
            kv_heads * self.key_blocks * attend.tile.bytes,
            kv_heads * self.sequences * padded_value * _FLOAT_BYTES,
            delta,
            part_outputs,
            part_sums,
            (1 + totals) * _COUNTER_BYTES if totals else 0,
            totals * padded * _FLOAT_BYTES,
            totals * padded_value * _FLOAT_BYTES,
            taken,
        )

    def ahead(self, kernels: Variant, multiprocessors: int, *, row_term: bool) -> int:
        """Tasks of statistics before the first conversion, beside those of its own unit, of
        quantizers in one launch.

        A unit is K or V of a head, see quantize.cuh. There are as many as it takes for the
        statistics of a unit to be there soon after its conversion begins: more would take the
        place of what is to be read again.

        Args:
            multiprocessors: of the device.
        """
        quantize = kernels.quantize
        assert quantize is not None
        of_key = not (row_term and quantize.qk is Format.INT4)
        units = self.batch * self.kv_heads * (of_key + quantize.scales_value)
        channels = max(quantize.head_dim, quantize.value_head_dim) // quantize.slices
        of_task = self.chunk_tokens * channels * (4 if quantize.dtype == "float32" else 2)
        return min(
            units * self.chunks * quantize.slices, -(-multiprocessors * _AHEAD_BYTES // of_task)
        )

    def query_scratch(
        self, attend: AttendSpec | HopperAttendSpec, *, row_term: bool, splits: int = 1
    ) -> tuple[int, int, int, int, int, int, int, int]:
        """What ``scratch`` has for queries: codes, scales, means, row term, delta, both of parts,
        the counter.

        It is all that an attention needs whose K and V are packed already.
        """
        padded, padded_value = padded_dim(attend.head_dim), padded_dim(attend.value_head_dim)
        smooths_query = attend.qk is Format.INT4
        rows = self.batch * self.heads * self.query_blocks
        # Codes are by head and query, but where wgmma reads them they are the tiles themselves.
        in_tiles = isinstance(attend, HopperAttendSpec)
        code_blocks = self.tiles(attend.query_tile) if in_tiles else rows
        delta = rows * self.most_key_blocks * TILE_MMA.kv_block * _FLOAT_BYTES
        parts = self.rows * splits if attend.split else 0
        return (
            code_blocks * attend.query_block_bytes,
            rows * _QUERY_SCALES * _FLOAT_BYTES,
            rows * padded * _FLOAT_BYTES if smooths_query else 0,
            self.batch * self.heads * self.query_length * _FLOAT_BYTES if row_term else 0,
            delta if smooths_query else 0,
            parts * padded_value * _FLOAT_BYTES,
            parts * 2 * _FLOAT_BYTES,
            _TAKEN_BYTES if attend.persistent else 0,
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
