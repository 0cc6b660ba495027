"""What one compiled kernel is: the only source of its symbol, template arguments and cache key.

A spec is plain data. It knows nothing of torch, of a compiler or of a device.
"""

from __future__ import annotations

import functools
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import ClassVar, Final, NamedTuple

from sage_compiler.kernels.cuda import params
from sage_compiler.precision import TILE_MMA, Accumulator, Format
from sage_compiler.semantics import RotaryPairs

HEAD_DIMS: Final = (32, 64, 96, 128, 192, 256)
"""What the products are made for; what is between is filled up with zeros."""

DTYPES: Final[Mapping[str, str]] = MappingProxyType(
    {"float16": "cutlass::half_t", "bfloat16": "cutlass::bfloat16_t", "float32": "float"}
)
"""The dtypes of Q, K, V and the output, as torch and as C++ name them."""


def padded_dim(head_dim: int) -> int:
    """The channels that quantized operands have: rows are a power of two in bytes."""
    return max(64, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True, slots=True)
class KernelSpec(ABC):
    """One kernel, compiled for one architecture.

    Attributes:
        arch: a key of ``arch.ARCHS``, or the name of ``arch.PORTABLE``.
        varlen: whether it takes a packed batch of sequences, whose lengths it reads itself: any
            kernel on Q, K or V may.
    """

    arch: str
    varlen: bool = field(default=False, kw_only=True)

    kind: ClassVar[str]
    template: ClassVar[str]  # of namespace sage, in the header sage/<kind>.cuh
    params: ClassVar[struct.Struct]
    follows: ClassVar[bool] = False  # another kernel of the same call, and waits for it
    precedes: ClassVar[bool] = False  # such a one, and lets it begin

    @property
    def awaits_prerequisites(self) -> bool:
        """Whether it may be launched dependent on the launch before it, from sm_90 on."""
        return self.follows or self.varlen

    @property
    def launches_dependents(self) -> bool:
        """Whether what depends on it begins when its blocks have begun, not when they end."""
        return self.precedes or self.varlen

    @property
    def symbol(self) -> str:
        """The name of the kernel in its binary, unique among all specs; also a file's name."""
        values = [str(getattr(self, each.name)) for each in fields(self) if each.name != "varlen"]
        return "_".join(("sage", self.kind, *values, *(["varlen"] if self.varlen else [])))

    @property
    def instance(self) -> str:
        """The instance of the template, in C++."""
        plain = f"sage::{self.template}<{', '.join(self.arguments)}>"
        return f"sage::Varlen<{plain}>" if self.varlen else plain

    @property
    def params_bytes(self) -> int:
        """The size of its struct of parameters."""
        return self.params.size + (params.SEQUENCES.size if self.varlen else 0)

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a block."""

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""

    @property
    @abstractmethod
    def arguments(self) -> tuple[str, ...]:
        """The template arguments, in C++."""


@dataclass(frozen=True, slots=True)
class OperandSpec(KernelSpec, ABC):
    """A kernel on Q, K or V.

    Attributes:
        dtype: a key of ``DTYPES``.
        head_dim: of the attention kernel one of ``HEAD_DIMS``, of the quantizers a ``padded_dim``.
    """

    dtype: str
    head_dim: int


_CPP_FORMATS: Final[Mapping[Format, str]] = MappingProxyType(
    {
        Format.INT4: "sage::Int4",
        Format.INT8: "sage::Int8",
        Format.FP8: "sage::E4m3",
        Format.FP16: "sage::Half",
    }
)
_BITS: Final[Mapping[Format, int]] = MappingProxyType(
    {Format.INT4: 4, Format.INT8: 8, Format.FP8: 8, Format.FP16: 16}
)

QUANTIZER_THREADS: Final = 256
_CHUNK: Final = 8  # channels that one of them has of a token
_FLOAT_BYTES: Final = 4
_CACHE_LINE: Final = 128
_LONGEST_SHARED_QUERY: Final = 128
_BANK_PADDING: Final = 4  # floats between rows, against bank conflicts
WARPGROUP: Final = 128  # threads
_KEY_SCALES: Final = 16  # bytes, of a tile
_MBARRIER_BYTES: Final = 8
_SLICE_CHANNELS: Final = 32
_SLOT_BYTES: Final = 16  # for what one thread tells all
_QUERIES: Final = 2  # query blocks in shared memory, each with the task that it belongs to
_TASK_BYTES: Final = 4
_SEQUENCE_BYTES: Final = 20  # and with its sequence
_MERGE_THREADS: Final = 128
_MERGE_CHANNELS: Final = 4  # that one of them has of a row


@dataclass(frozen=True, slots=True)
class _QuantizerSpec(OperandSpec, ABC):
    """What prepares operands: its blocks read tokens in rows of threads, 8 channels a thread."""

    @property
    def threads(self) -> int:
        return QUANTIZER_THREADS

    @property
    def _rows_at_once(self) -> int:
        """Tokens that a block reads at once."""
        return QUANTIZER_THREADS // (self.head_dim // _CHUNK)


@dataclass(frozen=True, slots=True)
class StatisticsSpec(_QuantizerSpec):
    """Sums of K and largest magnitudes of V over chunks of tokens."""

    value_head_dim: int

    kind: ClassVar[str] = "statistics"
    template: ClassVar[str] = "Statistics"
    params: ClassVar[struct.Struct] = params.STATISTICS

    @property
    def shared_bytes(self) -> int:
        return QUANTIZER_THREADS * _CHUNK * _FLOAT_BYTES

    @property
    def arguments(self) -> tuple[str, ...]:
        return (DTYPES[self.dtype], str(self.head_dim), str(self.value_head_dim))


@dataclass(frozen=True, slots=True)
class QuerySpec(_QuantizerSpec):
    """Smoothing and quantization of Q; INT4 comes with Q smoothing.

    Attributes:
        panels: whether codes are in the order that wgmma reads (order.cuh), here and of K and V.
        packed_heads: whether codes are in the tiles of packed heads, which ``panels`` need; else
            they are by head and query, whatever the attention kernel packs.
    """

    qk: Format
    panels: bool = field(default=False, kw_only=True)
    packed_heads: bool = field(default=False, kw_only=True)

    kind: ClassVar[str] = "query"
    template: ClassVar[str] = "QuantizeQuery"
    params: ClassVar[struct.Struct] = params.QUERY
    precedes: ClassVar[bool] = True

    @property
    def shared_bytes(self) -> int:
        rows = self._rows_at_once
        groups = TILE_MMA.q_block // 4 * (rows // 8)
        return (rows * self.head_dim + groups) * _FLOAT_BYTES

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            DTYPES[self.dtype],
            _CPP_FORMATS[self.qk],
            str(self.head_dim),
            _cpp(self.panels),
            _cpp(self.packed_heads),
        )


@dataclass(frozen=True, slots=True)
class KeySpec(_QuantizerSpec):
    """Smoothing and quantization of K; INT4 comes with Q smoothing, so with its term of K."""

    qk: Format
    panels: bool = field(default=False, kw_only=True)

    kind: ClassVar[str] = "key"
    template: ClassVar[str] = "QuantizeKey"
    params: ClassVar[struct.Struct] = params.KEY

    @property
    def shared_bytes(self) -> int:
        rows = self._rows_at_once
        smoothed = TILE_MMA.kv_block * (self.head_dim + _BANK_PADDING)
        return (rows + (smoothed if self.qk is Format.INT4 else 0)) * _FLOAT_BYTES

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            DTYPES[self.dtype],
            _CPP_FORMATS[self.qk],
            str(self.head_dim),
            _cpp(self.panels),
        )


_READERS: Final[Mapping[RotaryPairs, str]] = MappingProxyType(
    {
        RotaryPairs.HALF: "sage::Rotated<sage::RotaryPairs::kHalves>",
        RotaryPairs.INTERLEAVED: "sage::Rotated<sage::RotaryPairs::kInterleaved>",
    }
)


_PLAIN_READER: Final = "sage::Plain"


@dataclass(frozen=True, slots=True)
class RotaryStatisticsSpec(StatisticsSpec):
    """Of a K that is rotated first."""

    rotary: RotaryPairs

    params: ClassVar[struct.Struct] = params.with_rotary(params.STATISTICS)

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*super(RotaryStatisticsSpec, self).arguments, _READERS[self.rotary])


@dataclass(frozen=True, slots=True)
class RotaryQuerySpec(QuerySpec):
    """Of a Q that is rotated first."""

    rotary: RotaryPairs

    params: ClassVar[struct.Struct] = params.with_rotary(params.QUERY)

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*super(RotaryQuerySpec, self).arguments, _READERS[self.rotary])


@dataclass(frozen=True, slots=True)
class RotaryKeySpec(KeySpec):
    """Of a K that is rotated first."""

    rotary: RotaryPairs

    params: ClassVar[struct.Struct] = params.with_rotary(params.KEY)

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*super(RotaryKeySpec, self).arguments, _READERS[self.rotary])


@dataclass(frozen=True, slots=True)
class ValueSpec(_QuantizerSpec):
    """Quantization of V, transposed, in the order of tokens that P has; ``head_dim`` is V's."""

    pv: Format
    accumulator: Accumulator = Accumulator.FP32
    panels: bool = field(default=False, kw_only=True)

    kind: ClassVar[str] = "value"
    template: ClassVar[str] = "QuantizeValue"
    params: ClassVar[struct.Struct] = params.VALUE

    @property
    def shared_bytes(self) -> int:
        return TILE_MMA.kv_block * (self.head_dim + _BANK_PADDING) * _FLOAT_BYTES

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            DTYPES[self.dtype],
            _CPP_FORMATS[self.pv],
            str(self.head_dim),
            _cpp(self.accumulator is Accumulator.FP16),
            _cpp(self.panels),
        )


@dataclass(frozen=True, slots=True)
class QuantizeSpec(_QuantizerSpec):
    """Q, K and V to operands in one launch: what the four kernels above do in one each.

    Attributes:
        value_head_dim, qk, pv, accumulator, panels, packed_heads: as of these.
    """

    value_head_dim: int
    qk: Format
    pv: Format
    accumulator: Accumulator = Accumulator.FP32
    panels: bool = field(default=False, kw_only=True)
    packed_heads: bool = field(default=False, kw_only=True)

    kind: ClassVar[str] = "quantize"
    template: ClassVar[str] = "Quantize"
    params: ClassVar[struct.Struct] = params.quantize(rotary_query=False, rotary_key=False)
    precedes: ClassVar[bool] = True

    @property
    def shared_bytes(self) -> int:
        key_dim, value_dim = self.head_dim, self.value_head_dim
        tasks = (
            StatisticsSpec(self.arch, self.dtype, key_dim, value_dim),
            QuerySpec(self.arch, self.dtype, key_dim, self.qk),
            KeySpec(self.arch, self.dtype, key_dim, self.qk),
            ValueSpec(self.arch, self.dtype, value_dim, self.pv),
        )
        return max(task.shared_bytes for task in tasks) + _SLOT_BYTES

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            DTYPES[self.dtype],
            _CPP_FORMATS[self.qk],
            _CPP_FORMATS[self.pv],
            str(self.head_dim),
            str(self.value_head_dim),
            _cpp(self.accumulator is Accumulator.FP16),
            _cpp(self.panels),
            _cpp(self.packed_heads),
        )

    @property
    def slices(self) -> int:
        """Blocks that share the channels of a chunk of tokens for statistics."""
        return max(self.head_dim, self.value_head_dim) // _SLICE_CHANNELS

    @property
    def tasks_of_query_block(self) -> int:
        """Blocks that quantize 128 queries: as they have a mean in INT4, it is one."""
        return 1 if self.qk is Format.INT4 else 2

    @property
    def scales_value(self) -> bool:
        """Whether V has scales, and so statistics."""
        return value_is_scaled(self.dtype, self.pv)


@dataclass(frozen=True, slots=True)
class RotaryQuantizeSpec(QuantizeSpec):
    """Of a Q or a K that is rotated first, or both."""

    rotary_query: RotaryPairs | None = field(kw_only=True)
    rotary_key: RotaryPairs | None = field(kw_only=True)

    @property
    def params_bytes(self) -> int:
        return params.quantize(self.rotary_query is not None, self.rotary_key is not None).size

    @property
    def arguments(self) -> tuple[str, ...]:
        readers = (
            _PLAIN_READER if pairs is None else _READERS[pairs]
            for pairs in (self.rotary_query, self.rotary_key)
        )
        return (*super(RotaryQuantizeSpec, self).arguments, *readers)


class QueryTile(NamedTuple):
    """What a block of the attention kernel does.

    Attributes:
        rows: queries; fewer than a query block only with packed heads.
        packed_heads: whether the rows are (query, head) pairs of all heads of a key/value head,
            the heads of a query behind one another; else they are queries of one head.
        split: whether the keys are divided among blocks, whose results a ``MergeSpec`` joins.
    """

    rows: int = TILE_MMA.q_block
    packed_heads: bool = False
    split: bool = False


QUERY_BLOCK: Final = QueryTile()
"""All keys for a query block of one head: what is best where queries are many."""


@dataclass(frozen=True, slots=True)
class KeyMeanSpec(_QuantizerSpec):
    """The mean of K by which a cache smooths it."""

    kind: ClassVar[str] = "key_mean"
    template: ClassVar[str] = "KeyMean"
    params: ClassVar[struct.Struct] = params.KEY_MEAN
    precedes: ClassVar[bool] = True

    @property
    def shared_bytes(self) -> int:
        return QUANTIZER_THREADS * _CHUNK * _FLOAT_BYTES

    @property
    def arguments(self) -> tuple[str, ...]:
        return (DTYPES[self.dtype], str(self.head_dim))


@dataclass(frozen=True, slots=True)
class AppendSpec(_QuantizerSpec):
    """New tokens of a cache, packed into its tiles."""

    value_head_dim: int
    qk: Format
    pv: Format
    panels: bool = field(default=False, kw_only=True)

    kind: ClassVar[str] = "append"
    template: ClassVar[str] = "Append"
    params: ClassVar[struct.Struct] = params.APPEND
    follows: ClassVar[bool] = True

    @property
    def shared_bytes(self) -> int:
        key = KeySpec(self.arch, self.dtype, self.head_dim, self.qk)
        value = ValueSpec(self.arch, self.dtype, self.value_head_dim, self.pv)
        return max(key.shared_bytes, value.shared_bytes + self.value_head_dim * _FLOAT_BYTES)

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            DTYPES[self.dtype],
            _CPP_FORMATS[self.qk],
            _CPP_FORMATS[self.pv],
            str(self.head_dim),
            str(self.value_head_dim),
            _cpp(self.panels),
        )


@dataclass(frozen=True, slots=True)
class AttendSpec(OperandSpec):
    """The fused attention over quantized operands.

    Attributes:
        value_head_dim: of V and the output, one of ``HEAD_DIMS``.
        window: whether rows do not see the first keys; else they see all up to a diagonal.
        masked: whether there is an explicit mask.
        softcap: whether the scores have one.
        qk, pv: formats of the operands of both products.
        accumulator: of P @ V within a tile of keys.
        tile_scales: whether V has its scales in the tiles, as in a cache; else they are of heads.
        warp_rows: queries of a warp, 16 or 32: more of them read K and V from shared memory less
            often, and take more registers.
        stages: tiles of K and V in shared memory.
        tile_rows, packed_heads, split: as of ``QueryTile``.
    """

    value_head_dim: int
    window: bool
    masked: bool
    softcap: bool
    qk: Format
    pv: Format
    accumulator: Accumulator
    warp_rows: int
    stages: int
    tile_rows: int = QUERY_BLOCK.rows
    packed_heads: bool = QUERY_BLOCK.packed_heads
    split: bool = QUERY_BLOCK.split
    tile_scales: bool = False

    kind: ClassVar[str] = "attend"
    template: ClassVar[str] = "Attend"
    params: ClassVar[struct.Struct] = params.ATTEND
    follows: ClassVar[bool] = True
    keys: ClassVar[int] = TILE_MMA.kv_block  # of a step
    persistent: ClassVar[bool] = False

    @property
    def launches_dependents(self) -> bool:
        return self.split or self.varlen

    @property
    def threads(self) -> int:
        return self.tile_rows // self.warp_rows * 32

    @property
    def shared_bytes(self) -> int:
        # Of packed heads each row has a delta of its own, which is read where it lies.
        has_delta = self.qk is Format.INT4 and not self.packed_heads
        delta = TILE_MMA.kv_block * _FLOAT_BYTES if has_delta else 0
        query = self.tile_rows * self._query_row_bytes
        ring = self.stages * (self.tile.bytes + delta)
        if self.head_dim > _LONGEST_SHARED_QUERY:  # Q moves to registers, and the ring to its place
            return max(query, ring)
        return query + ring

    @property
    def query_tile(self) -> QueryTile:
        """What a block does."""
        return QueryTile(self.tile_rows, self.packed_heads, self.split)

    @property
    def query_block_bytes(self) -> int:
        """The codes of one query block, as the quantizer writes them."""
        return TILE_MMA.q_block * self._query_row_bytes

    @property
    def _query_row_bytes(self) -> int:
        return padded_dim(self.head_dim) * _BITS[self.qk] // 8

    @property
    def tile(self) -> KeyValueTile:
        """How a tile of keys and values is packed."""
        scaled = self.tile_scales and value_is_scaled(self.dtype, self.pv)
        return KeyValueTile.of(self.head_dim, self.value_head_dim, self.qk, self.pv, scaled)

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            DTYPES[self.dtype],
            _CPP_FORMATS[self.qk],
            _CPP_FORMATS[self.pv],
            str(self.head_dim),
            str(self.value_head_dim),
            _cpp(self.window),
            _cpp(self.masked),
            _cpp(self.softcap),
            _cpp(self.accumulator is Accumulator.FP16),
            _cpp(self.tile_scales),
            _cpp(self.packed_heads),
            _cpp(self.split),
            str(self.tile_rows),
            str(self.warp_rows),
            str(self.stages),
        )


@dataclass(frozen=True, slots=True)
class HopperAttendSpec(OperandSpec):
    """The fused attention by wgmma, of INT8 and E4M3, over operands whose codes are in panels.

    Attributes:
        value_head_dim, window, masked, softcap, tile_scales: as of ``AttendSpec``.
        tiles: of keys that a step takes; 1 with ``tile_scales``.
        stages: steps in shared memory.
        packed_heads, split: as of ``QueryTile``.
        mask_places: tiles of a mask in shared memory, which the producer copies there by a tensor
            map where there can be one; 0: a mask is read where it lies, always.

    It is persistent: a grid has no more blocks than there are multiprocessors, and each goes on
    with another task until all are done.
    """

    value_head_dim: int
    window: bool
    masked: bool
    softcap: bool
    tiles: int
    stages: int
    packed_heads: bool = QUERY_BLOCK.packed_heads
    split: bool = QUERY_BLOCK.split
    tile_scales: bool = False
    mask_places: int = 0

    kind: ClassVar[str] = "attend_hopper"
    template: ClassVar[str] = "AttendHopper"
    params: ClassVar[struct.Struct] = params.ATTEND
    follows: ClassVar[bool] = True
    qk: ClassVar[Format] = Format.INT8
    pv: ClassVar[Format] = Format.FP8
    accumulator: ClassVar[Accumulator] = Accumulator.FP32
    warp_rows: ClassVar[int] = 16
    tile_rows: ClassVar[int] = QUERY_BLOCK.rows
    persistent: ClassVar[bool] = True

    @property
    def params_bytes(self) -> int:
        plain = super(HopperAttendSpec, self).params_bytes
        return plain + (params.MASK_MAP.size if self.mask_places else 0)

    @property
    def instance(self) -> str:
        return f"sage::{self.template}<{', '.join(self.arguments)}>"

    @property
    def query_tile(self) -> QueryTile:
        """What a block does."""
        return QueryTile(self.tile_rows, self.packed_heads, self.split)

    @property
    def keys(self) -> int:
        """Keys of a step."""
        return self.tiles * TILE_MMA.kv_block

    @property
    def launches_dependents(self) -> bool:
        return self.split  # of a packed batch it is the last one

    @property
    def threads(self) -> int:
        return 3 * WARPGROUP  # the producer's, and two of 64 queries each

    @property
    def shared_bytes(self) -> int:
        row = padded_dim(self.head_dim) + self.value_head_dim
        stage = self.keys * row + self.tiles * _KEY_SCALES
        if self.tile_scales:
            stage += self.value_head_dim * _FLOAT_BYTES
        mask = TILE_MMA.q_block * TILE_MMA.kv_block * _FLOAT_BYTES + 2 * _MBARRIER_BYTES
        mbarriers = (2 * _QUERIES + 4 * self.stages) * _MBARRIER_BYTES
        task = _TASK_BYTES + (_SEQUENCE_BYTES if self.varlen else 0)
        queries = _QUERIES * (self.query_block_bytes + task)
        return queries + self.stages * stage + self.mask_places * mask + mbarriers

    @property
    def query_block_bytes(self) -> int:
        """The codes of one query block."""
        return TILE_MMA.q_block * padded_dim(self.head_dim)

    @property
    def tile(self) -> KeyValueTile:
        """How a tile of keys and values is packed."""
        return KeyValueTile.of(
            self.head_dim, self.value_head_dim, self.qk, self.pv, self.tile_scales
        )

    @property
    def arguments(self) -> tuple[str, ...]:
        return (
            DTYPES[self.dtype],
            str(self.head_dim),
            str(self.value_head_dim),
            _cpp(self.window),
            _cpp(self.masked),
            _cpp(self.softcap),
            _cpp(self.tile_scales),
            _cpp(self.packed_heads),
            _cpp(self.split),
            str(self.tiles),
            str(self.stages),
            str(self.mask_places),
            _cpp(self.varlen),
        )


@dataclass(frozen=True, slots=True)
class DeltaSpec(KernelSpec):
    """What the means of a smoothed Q contribute to scores with the INT4 keys of a cache."""

    head_dim: int

    kind: ClassVar[str] = "delta"
    template: ClassVar[str] = "Delta"
    params: ClassVar[struct.Struct] = params.DELTA

    @property
    def threads(self) -> int:
        return QUANTIZER_THREADS

    @property
    def shared_bytes(self) -> int:
        return KeySpec(self.arch, "float32", self.head_dim, Format.INT4).shared_bytes

    @property
    def arguments(self) -> tuple[str, ...]:
        return (str(self.head_dim),)


def value_is_scaled(dtype: str, pv: Format) -> bool:
    """Whether a V of this dtype has scales; FP16 takes float16 as it is."""
    return pv is not Format.FP16 or dtype != "float16"


@dataclass(frozen=True, slots=True)
class MergeSpec(OperandSpec):
    """What joins the results of split keys; ``head_dim`` is V's, a ``padded_dim``."""

    kind: ClassVar[str] = "merge"
    template: ClassVar[str] = "Merge"
    params: ClassVar[struct.Struct] = params.MERGE
    follows: ClassVar[bool] = True

    @property
    def threads(self) -> int:
        return _MERGE_THREADS

    @property
    def shared_bytes(self) -> int:
        return 0

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return _MERGE_THREADS // (self.head_dim // _MERGE_CHANNELS)

    @property
    def arguments(self) -> tuple[str, ...]:
        return (DTYPES[self.dtype], str(self.head_dim))


@dataclass(frozen=True, slots=True)
class KeyValueTile:
    """A packed tile of keys and values, KeyValueTile of tile.cuh: sizes in bytes."""

    value_offset: int
    scales_offset: int
    bytes: int

    @classmethod
    @functools.cache  # of every call, and of a few dims
    def of(
        cls, head_dim: int, value_head_dim: int, qk: Format, pv: Format, value_scales: bool = False
    ) -> KeyValueTile:
        """The tile for these dims, padded or not, and whether it has scales of V."""
        key = TILE_MMA.kv_block * padded_dim(head_dim) * _BITS[qk] // 8
        value = TILE_MMA.kv_block * padded_dim(value_head_dim) * _BITS[pv] // 8
        scales_offset = key + value
        scales = padded_dim(value_head_dim) * _FLOAT_BYTES if value_scales else 0
        return cls(key, scales_offset, scales_offset + _CACHE_LINE + scales)


def _cpp(truth: bool) -> str:
    return "true" if truth else "false"
