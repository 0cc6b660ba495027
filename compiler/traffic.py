"""What quantizing Q, K and V moves: bytes and launches, by the sizes of an attention alone.

What blocks load and store is exact, for tokens that are all seen and rows of whole 32 bytes: a test
holds it against what the kernels do on a CPU. What of it comes from memory rather than the L2 cache
is a model, and nothing was measured: K and V are read twice, and ``second_reading`` says how much
of the second time the cache does not have any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Final

from sage_compiler.kernels.cuda.arch import Arch
from sage_compiler.kernels.cuda.sizes import Sizes
from sage_compiler.kernels.cuda.spec import KeyValueTile, padded_dim, value_is_scaled
from sage_compiler.kernels.cuda.variants import Variant
from sage_compiler.precision import TILE_MMA, Format
from sage_compiler.second_reading import Units, missed

_FLOAT_BYTES: Final = 4
_SECTOR: Final = 32  # bytes: the least that the cache loads
_ITEM_BYTES: Final = MappingProxyType({"float16": 2, "bfloat16": 2, "float32": 4})
_BITS: Final = MappingProxyType({Format.INT4: 4, Format.INT8: 8, Format.FP8: 8, Format.FP16: 16})
_QUERY_SCALES: Final = TILE_MMA.q_block // 4  # of a query block
_BLOCKS: Final = 3  # that run at a time on a multiprocessor, by their registers

CACHES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "sm_80": 40 << 20,
        "sm_86": 6 << 20,
        "sm_89": 72 << 20,
        "sm_90a": 50 << 20,
        "sm_100a": 126 << 20,
        "sm_120a": 96 << 20,
    }
)
"""The L2 cache of the usual board of an architecture, in bytes: of A100, RTX 3090, RTX 4090, H100,
B200 and RTX 5090, as their vendor's documents have it."""


@dataclass(frozen=True, slots=True)
class Account:
    """What the quantizers of one attention load and store, in bytes.

    Attributes:
        launches: of kernels.
        loaded: by blocks, each address once by each.
        stored: by the launches.
        streamed: of this, with the hint that it leaves caches first: K, V and delta.
        inputs, operands: Q, K and V, and what the attention kernel takes of them: the least that
            can be loaded and stored.
        unfit: of the inputs, K and V whose heads are larger than the cache: by the order of work
            they cannot be kept until they are read again.
    """

    launches: int
    loaded: int
    stored: int
    streamed: int
    inputs: int
    operands: int
    unfit: int

    @property
    def bound(self) -> int:
        """The least: inputs are read once and operands written once."""
        return self.inputs + self.operands

    @property
    def bound_of_cache(self) -> int:
        """The same where inputs fit into the cache, and twice what does not."""
        return self.bound + self.unfit


@dataclass(frozen=True, slots=True)
class Traffic(Account):
    """The same, and what memory has to move of it.

    Attributes:
        again: of the inputs, what is read a second time, and not in the cache any more.
    """

    again: int

    @property
    def moved(self) -> int:
        """What memory has to move."""
        return self.inputs + self.again + self.stored

    @property
    def ratio(self) -> float:
        """What memory has to move, over the bound."""
        return self.moved / self.bound

    @property
    def ratio_of_cache(self) -> float:
        """The same over ``bound_of_cache``."""
        return self.moved / self.bound_of_cache


def traffic(
    arch: Arch, kernels: Variant, sizes: Sizes, *, row_term: bool = False, streaming: bool = True
) -> Traffic:
    """That of a call whose head_dims are those of ``kernels``, whole and padded.

    Args:
        arch: one with kernels of its own, which has a known cache.
        sizes: of a call, not of a packed batch, all of whose tokens are seen.
        row_term: as of ``Sizes.scratch``.
        streaming: as of ``missed``.
    """
    told = account(arch, kernels, sizes, row_term=row_term)
    return Traffic(
        **{field.name: getattr(told, field.name) for field in fields(told)},
        again=_again(arch, kernels, sizes, row_term, streaming),
    )


def account(arch: Arch, kernels: Variant, sizes: Sizes, *, row_term: bool = False) -> Account:
    """What of ``traffic`` needs no model but the size of the cache."""
    attend = kernels.attend
    smooths = attend.qk is Format.INT4
    scales_value = value_is_scaled(attend.dtype, attend.pv)
    heads, kv_heads = sizes.batch * sizes.heads, sizes.batch * sizes.kv_heads
    query, key, value = _inputs(kernels, sizes)
    padded, padded_value = padded_dim(attend.head_dim), padded_dim(attend.value_head_dim)

    tiles, rows = kv_heads * sizes.key_blocks, heads * sizes.query_blocks
    tile = KeyValueTile.of(attend.head_dim, attend.value_head_dim, attend.qk, attend.pv)
    of_tiles = tiles * (tile.scales_offset + _SECTOR)  # 4 scales of K are stored, of 16 bytes
    of_queries = rows * (attend.query_block_bytes + _QUERY_SCALES * _FLOAT_BYTES)
    means = rows * padded * _FLOAT_BYTES if smooths else 0
    delta = rows * sizes.key_blocks * TILE_MMA.kv_block * _FLOAT_BYTES if smooths else 0
    terms = heads * sizes.query_length * _FLOAT_BYTES if row_term else 0
    value_scales = kv_heads * padded_value * _FLOAT_BYTES
    operands = of_tiles + of_queries + delta + terms + value_scales

    one_launch = kernels.quantize is not None
    sums, magnitudes = padded * _FLOAT_BYTES, padded_value * _FLOAT_BYTES
    twice = key + (value if scales_value or not one_launch else 0)
    # What each conversion loads of statistics: those of all chunks, or their total.
    chunks = 1 if one_launch else sizes.chunks
    loaded = key + value + query + twice
    loaded += tiles * chunks * (sums + (magnitudes if scales_value else 0))
    loaded += tiles * sizes.group * sizes.query_blocks * padded * _FLOAT_BYTES if smooths else 0
    if row_term:
        query_tasks = rows * (2 if one_launch and not smooths else 1)
        loaded += query_tasks * chunks * sums
    of_statistics = kv_heads * (sums + (magnitudes if scales_value or not one_launch else 0))
    stored = operands + means + sizes.chunks * of_statistics
    if one_launch:
        loaded += sizes.chunks * of_statistics  # whoever comes last adds up those of all
        stored += of_statistics + (1 + kv_heads) * _SECTOR

    return Account(
        launches=len(kernels.quantizers()),
        loaded=loaded,
        stored=stored,
        streamed=tiles * tile.scales_offset + delta,
        inputs=key + value + query,
        operands=operands,
        unfit=sum(
            each
            for each, read_twice in ((key, True), (value, twice > key))
            if read_twice and each // kv_heads > _cache(arch)
        ),
    )


def _inputs(kernels: Variant, sizes: Sizes) -> tuple[int, int, int]:
    """Bytes of Q, K and V."""
    attend = kernels.attend
    item = _ITEM_BYTES[attend.dtype]
    keys = sizes.batch * sizes.kv_heads * sizes.key_length * item
    return (
        sizes.rows * attend.head_dim * item,
        keys * attend.head_dim,
        keys * attend.value_head_dim,
    )


def _cache(arch: Arch) -> int:
    """What can be counted on: A100, H100 and B200 have their cache in two halves, of which each may
    hold a copy of what the other has; and of no other GPU is it known that it keeps more.
    """
    return CACHES[arch.name] // 2


def _again(arch: Arch, kernels: Variant, sizes: Sizes, row_term: bool, streaming: bool) -> int:
    """What of K and V is read a second time from memory."""
    quantize = kernels.quantize
    query, key, value = _inputs(kernels, sizes)
    if quantize is None:  # everything is read before anything is read again
        return key + value if query + key + value > _cache(arch) else 0
    smooths = quantize.qk is Format.INT4
    key_first = row_term and smooths
    found = key if key_first and key + query + value > _cache(arch) else 0
    in_order = [] if key_first else [key]
    if quantize.scales_value:
        in_order.append(value)
    if not in_order:
        return found
    blocks = sizes.batch * sizes.kv_heads * sizes.key_blocks
    delta = sizes.group * sizes.query_blocks * TILE_MMA.kv_block * _FLOAT_BYTES if smooths else 0
    tile = kernels.attend.tile
    stored = [] if key_first else [tile.value_offset + delta]
    if quantize.scales_value:
        stored.append(tile.scales_offset - tile.value_offset)
    units = Units(
        chunks=sizes.chunks,
        slices=quantize.slices,
        blocks=sizes.key_blocks,
        loaded=tuple(each // blocks for each in in_order),
        streamed=tuple(stored),
        ahead=sizes.ahead(kernels, arch.multiprocessors, row_term=row_term),
        number=len(in_order) * sizes.batch * sizes.kv_heads,
    )
    running = arch.multiprocessors * (_BLOCKS - smooths)
    lost = missed(units, _cache(arch), running, streaming=streaming)
    return found + round(sum(in_order) * lost)
