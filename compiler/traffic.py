"""What quantizing Q, K and V moves: bytes and launches, by the sizes of an attention alone.

What blocks load and store is exact, for tokens that are all seen and rows of whole 32 bytes: a test
holds it against what the kernels do on a CPU. What of it comes from memory rather than the L2 cache
is a model, and nothing was measured: K and V are read twice, and ``missed`` says how much of the
second reading the cache does not have any more.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from sage_compiler.kernels.cuda.arch import Arch
from sage_compiler.kernels.cuda.sizes import Sizes
from sage_compiler.kernels.cuda.spec import KeyValueTile, padded_dim, value_is_scaled
from sage_compiler.kernels.cuda.variants import Variant
from sage_compiler.precision import TILE_MMA, Format

_FLOAT_BYTES: Final = 4
_SECTOR: Final = 32  # bytes: the least that the cache loads
_ITEM_BYTES: Final = MappingProxyType({"float16": 2, "bfloat16": 2, "float32": 4})
_BITS: Final = MappingProxyType({Format.INT4: 4, Format.INT8: 8, Format.FP8: 8, Format.FP16: 16})
_QUERY_SCALES: Final = TILE_MMA.q_block // 4  # of a query block
_BLOCKS: Final = 3  # that run at a time on a multiprocessor, by their registers

# What a cache is followed through: more units, or tasks of one, are taken together.
_MOST_AHEAD: Final = 16
_MOST_BLOCKS: Final = 512

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
class Traffic:
    """What the quantizers of one attention move, in bytes.

    Attributes:
        launches: of kernels.
        loaded: by blocks, each address once by each.
        stored: by the launches.
        inputs, operands: Q, K and V, and what the attention kernel takes of them: the least that
            can be loaded and stored.
        again: of the inputs, what is read a second time, and not in the cache any more.
    """

    launches: int
    loaded: int
    stored: int
    inputs: int
    operands: int
    again: int

    @property
    def bound(self) -> int:
        """The least: inputs are read once and operands written once."""
        return self.inputs + self.operands

    @property
    def ratio(self) -> float:
        """What memory has to move, over the bound."""
        return (self.inputs + self.again + self.stored) / self.bound


def traffic(arch: Arch, kernels: Variant, sizes: Sizes, *, row_term: bool = False) -> Traffic:
    """That of a call whose head_dims are those of ``kernels``, whole and padded.

    Args:
        arch: one with kernels of its own, which has a known cache.
        sizes: of a call, not of a packed batch, all of whose tokens are seen.
        row_term: as of ``Sizes.scratch``.
    """
    attend = kernels.attend
    item = _ITEM_BYTES[attend.dtype]
    smooths = attend.qk is Format.INT4
    scales_value = value_is_scaled(attend.dtype, attend.pv)
    heads, kv_heads = sizes.batch * sizes.heads, sizes.batch * sizes.kv_heads
    key = kv_heads * sizes.key_length * attend.head_dim * item
    value = kv_heads * sizes.key_length * attend.value_head_dim * item
    query = heads * sizes.query_length * attend.head_dim * item
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

    return Traffic(
        launches=len(kernels.quantizers()),
        loaded=loaded,
        stored=stored,
        inputs=key + value + query,
        operands=operands,
        again=_again(arch, kernels, sizes, key, value, query, row_term=row_term),
    )


def _again(
    arch: Arch, kernels: Variant, sizes: Sizes, key: int, value: int, query: int, *, row_term: bool
) -> int:
    """What of K and V is read a second time from memory."""
    quantize, cache = kernels.quantize, CACHES[arch.name] // 2
    if quantize is None:  # everything is read before anything is read again
        return key + value if key + value + query > cache else 0
    found = 0
    key_first = row_term and quantize.qk is Format.INT4
    if key_first and key + query > cache:
        found += key
    in_order = (0 if key_first else key) + (value if quantize.scales_value else 0)
    if in_order == 0:
        return found
    tile = kernels.attend.tile
    running = arch.multiprocessors * (_BLOCKS - (quantize.qk is Format.INT4))
    units = Units(
        statistics=(sizes.chunks, quantize.slices),
        blocks=sizes.key_blocks,
        bytes_read=sizes.key_length * kernels.attend.head_dim * _ITEM_BYTES[quantize.dtype],
        bytes_written=sizes.key_blocks * tile.bytes // 2,
        ahead=sizes.ahead(kernels, row_term=row_term),
        number=(1 if key_first or not quantize.scales_value else 2) * sizes.batch * sizes.kv_heads,
    )
    return found + round(in_order * missed(units, cache, running))


class Units(NamedTuple):
    """The units of quantize.cuh, K or V of a head each, and their order.

    Attributes:
        statistics: the tasks of a unit: chunks of tokens, slices of channels.
        blocks: its tasks that convert.
        bytes_read, bytes_written: of a unit.
        ahead: units whose statistics come before the first conversion.
        number: of units.
    """

    statistics: tuple[int, int]
    blocks: int
    bytes_read: int
    bytes_written: int
    ahead: int
    number: int


@functools.cache
def missed(units: Units, cache: int, running: float) -> float:
    """How much of K and V the cache has lost when it is read for the second time, from 0 to 1.

    A cache of which the least recently used goes first, and which takes what is written as what is
    read. Tasks touch it in the order of their tickets, but each may be late by as many tasks as run
    at the same time, at random. Units in the middle count, of as many as show a steady state.

    Args:
        cache: bytes that can be counted on: ``traffic`` takes half of what there is. A100, H100
            and B200 have it in two halves, of which each may hold a copy of what the other has.
        running: blocks at the same time.
    """
    if (units.bytes_read + units.bytes_written) * units.number <= cache:
        return 0.0
    units, running = _coarser(units, running)
    count = min(units.number, 2 * units.ahead + 6)
    counted = range(min(units.ahead + 1, count - 1), max(units.ahead + 2, count - units.ahead - 1))
    dice = random.Random(0)
    (chunks, slices), blocks = units.statistics, units.blocks
    part = units.bytes_read // (blocks * slices)
    touches: list[tuple[float, tuple[int, int, int], int]] = []  # when, what, and how many bytes
    ticket = 0

    def statistics(unit: int) -> None:
        nonlocal ticket
        for chunk, piece in itertools.product(range(chunks), range(slices)):
            late = ticket + dice.random() * running
            of_chunk = range(chunk * blocks // chunks, (chunk + 1) * blocks // chunks)
            touches.extend((late, (unit, block, piece), part) for block in of_chunk)
            ticket += 1

    def conversion(unit: int) -> None:
        nonlocal ticket
        for block in range(blocks):
            late = ticket + dice.random() * running
            touches.extend((late, (unit, block, piece), part) for piece in range(slices))
            touches.append((late, (unit, block, -1), units.bytes_written // blocks))
            ticket += 1

    for unit in range(min(units.ahead, count)):
        statistics(unit)
    for unit in range(count):
        if unit + units.ahead < count:
            statistics(unit + units.ahead)
        conversion(unit)

    kept: OrderedDict[tuple[int, int, int], int] = OrderedDict()
    seen: set[tuple[int, int, int]] = set()
    total = second = lost = 0
    for _, what, size in sorted(touches):
        if what in seen and what[0] in counted:
            second += 1
            lost += what not in kept
        seen.add(what)
        total += 0 if what in kept else size
        kept[what] = size
        kept.move_to_end(what)
        while total > cache:
            total -= kept.popitem(last=False)[1]
    return lost / second


def _coarser(units: Units, running: float) -> tuple[Units, float]:
    """The same in fewer units and tasks, which show as much of a cache."""
    group = -(-units.ahead // _MOST_AHEAD) if units.ahead > _MOST_AHEAD else 1
    chunks, slices = units.statistics
    blocks = units.blocks * group
    tasks = -(-blocks // _MOST_BLOCKS)
    grouped = Units(
        statistics=(min(chunks * group, _MOST_BLOCKS), slices),
        blocks=-(-blocks // tasks),
        bytes_read=units.bytes_read * group,
        bytes_written=units.bytes_written * group,
        ahead=units.ahead // group,
        number=max(1, units.number // group),
    )
    return grouped, running / tasks
