"""The time of one attention on a GPU that is not here, from its instruction rates.

It orders recipes for calibration, so ratios between the times of one target matter, absolute times
less. The model, the source of every number and how far it is from published speeds are in
docs/precision.md, "Predicted times". CPUs are here always: their times are measured.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from torch import Tensor

from sage_compiler.errors import InvalidOptionError
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.sizes import FAR, Sizes
from sage_compiler.kernels.cuda.spec import HEAD_DIMS, KeyValueTile
from sage_compiler.kernels.cuda.variants import variant
from sage_compiler.precision import EXACT, RECIPES, TILE_MMA, Format
from sage_compiler.semantics import Semantics
from sage_compiler.traffic import Account, account

CPU: Final = "cpu"
TARGETS: Final[tuple[str, ...]] = tuple(ARCHS)
"""The GPU architectures that there are kernels for."""

_CPU_RECIPES: Final = ("int8_int8", "int8_int16")  # one pass of products, and two


@dataclass(frozen=True, slots=True)
class Work:
    """The sizes of one attention.

    Attributes:
        batch, heads, kv_heads, query_length, key_length: of Q (batch, heads, query_length,
            head_dim), K (batch, kv_heads, key_length, head_dim) and V.
        head_dim, value_head_dim: channels of Q and K, and of V and the output.
        itemsize: bytes of an element of Q, K, V and the output.
        visible: the fraction of query-key pairs that are computed, from 0 to 1: 0.5 for causal of
            equal lengths, 1.0 without a band.
        mask_bytes: bytes of an explicit mask that are read per query-key pair; 0 without a mask.
    """

    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_head_dim: int
    itemsize: int
    visible: float
    mask_bytes: int = 0

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        attn_mask: Tensor | None = None,
    ) -> Work:
        """That of a call of ``sage::attention``; only shapes and dtypes are looked at."""
        batch, heads, query_length, head_dim = query.shape
        key_length = key.shape[2]
        band, visible = semantics.band(query_length, key_length), 1.0
        if band is not None and query_length * key_length:
            visible = band.pairs(query_length, key_length) / (query_length * key_length)
        return cls(
            batch=batch,
            heads=heads,
            kv_heads=key.shape[1],
            query_length=query_length,
            key_length=key_length,
            head_dim=head_dim,
            value_head_dim=value.shape[3],
            itemsize=query.element_size(),
            visible=visible,
            mask_bytes=0 if attn_mask is None else attn_mask.element_size(),  # each head reads it
        )

    @property
    def pairs(self) -> int:
        """Query-key pairs of all heads, computed or not."""
        return self.batch * self.heads * self.query_length * self.key_length


@dataclass(frozen=True, slots=True)
class _Board:
    """The board that a target stands for. docs/precision.md has the sources, field by field.

    Attributes:
        document: where the vendor publishes the numbers.
        multiprocessors: how many are enabled.
        clock: boost clock, Hz.
        products: dense operations per second of the tensor cores, a multiply-add being two; FP8 and
            FP16 with FP32 accumulation.
        float_lanes: FP32 instructions per clock and multiprocessor.
        bandwidth: of device memory, bytes per second.
        efficiency: FlashAttention-2's published speed over what the model makes of full rates.
        measured_on: the board which that speed was measured on.
        mma_sync: the share of ``products`` that mma.sync reaches; the rest needs wgmma or tcgen05,
            which SDPA's flash kernel does not use, nor do our kernels but those of ``wgmma``.
        wgmma: recipes whose kernels use wgmma.
    """

    name: str
    document: str
    multiprocessors: int
    clock: float
    products: Mapping[Format, float]
    float_lanes: int
    bandwidth: float
    efficiency: float
    measured_on: str
    mma_sync: float = 1.0
    wgmma: tuple[str, ...] = ()


def _tera(
    *, int8: float, fp16: float, int4: float | None = None, fp8: float | None = None
) -> Mapping[Format, float]:
    """A table of dense rates, given in 10^12 operations per second."""
    rates = {Format.INT4: int4, Format.INT8: int8, Format.FP8: fp8, Format.FP16: fp16}
    return MappingProxyType({f: rate * 1e12 for f, rate in rates.items() if rate is not None})


_A100: Final = _Board(
    "A100 SXM 80GB",
    "NVIDIA's A100 whitepaper",
    multiprocessors=108,
    clock=1.41e9,
    products=_tera(int4=1248, int8=624, fp16=312),
    float_lanes=64,
    bandwidth=2039e9,
    efficiency=0.85,
    measured_on="A100",
)
_RTX_4090: Final = _Board(
    "RTX 4090",
    "NVIDIA's Ada whitepaper",
    multiprocessors=128,
    clock=2.52e9,
    products=_tera(int4=1321.2, int8=660.6, fp8=330.3, fp16=165.2),
    float_lanes=128,
    bandwidth=1008e9,
    efficiency=1.05,
    measured_on="RTX 4090",
)
# Boards with no published speed in the same setting have the efficiency of their nearest relative.
_RTX_3090: Final = replace(
    _RTX_4090,
    name="RTX 3090",
    document="NVIDIA's GA102 whitepaper",
    multiprocessors=82,
    clock=1.695e9,
    products=_tera(int4=568, int8=284, fp16=71),
    bandwidth=936e9,
)
_RTX_5090: Final = replace(
    _RTX_4090,
    name="RTX 5090",
    document="NVIDIA's RTX Blackwell whitepaper",
    multiprocessors=170,
    clock=2.407e9,
    products=_tera(int8=838, fp8=419, fp16=209.5),
    bandwidth=1792e9,
)
_H100: Final = _Board(
    "H100 SXM",
    "NVIDIA's H100 whitepaper",
    multiprocessors=132,
    clock=1.83e9,
    products=_tera(int8=1979, fp8=1979, fp16=989.5),
    float_lanes=128,
    bandwidth=3350e9,
    efficiency=0.7,
    measured_on="H100",
    mma_sync=0.62,
    wgmma=("int8_fp8",),
)
_B200: Final = replace(
    _H100,
    name="B200",
    document="NVIDIA's B200 data sheet",
    multiprocessors=148,
    clock=1.86e9,
    products=_tera(int8=4500, fp8=4500, fp16=2250),
    bandwidth=8000e9,
    mma_sync=0.31,
    wgmma=(),
)

_BOARDS: Final[Mapping[str, _Board]] = MappingProxyType(
    {
        "sm_80": _A100,
        "sm_86": _RTX_3090,
        "sm_89": _RTX_4090,
        "sm_90a": _H100,
        "sm_100a": _B200,
        "sm_120a": _RTX_5090,
    }
)

_EXP2_LANES: Final = 16  # MUFU.EX2 per clock and multiprocessor, on all targets
_EXPOSED: Final = 0.5  # of the softmax: the rest hides behind other warps' products (assumed)
_FP32_SLOWDOWN: Final = 6  # SDPA in float32 makes 3 products of TF32, at half the rate of FP16
_LAUNCH: Final = 5e-6  # seconds a kernel; docs/cuda-kernels.md: 26 us of Python for five
_LAUNCHES_BESIDE: Final = 2  # what quantizes: a memset of its counters before, attend behind it
_DELTA_BYTES: Final = 4  # INT4: a float for each key and query block
_MASK_KERNELS: Final = 50  # what looks through an explicit mask first (docs/cuda-kernels.md) ...
_MASK_BYTES: Final = 9  # ... and the bytes it passes for each element
# What recipes are ordered by.
_USUAL: Final = Work(1, 32, 32, 8192, 8192, 128, 128, itemsize=2, visible=1.0)


def parse_target(name: str) -> str:
    """The target that ``name`` means: itself, or with the suffix "a" that it lacks ("sm_90").

    Raises:
        InvalidOptionError: it means none; with the list of known ones.
    """
    for target in (*TARGETS, CPU):
        if name in (target, target.removesuffix("a")):
            return target
    raise InvalidOptionError(f"unknown target {name!r}; known: {', '.join((*TARGETS, CPU))}")


@functools.cache
def candidates(target: str) -> tuple[str, ...]:
    """The recipes that the package has kernels for on this target, the cheapest first.

    Raises:
        InvalidOptionError: an unknown target.
    """
    target = parse_target(target)
    if target == CPU:
        return _CPU_RECIPES
    return tuple(
        sorted(ARCHS[target].recipes, key=lambda r: _attention_seconds(_BOARDS[target], r, _USUAL))
    )


def seconds(target: str, recipe: str, work: Work) -> float | None:
    """The predicted time of a whole call: quantization, launches, attention.

    Args:
        target: as ``parse_target`` takes it.
        recipe: a recipe, or "exact": scaled_dot_product_attention by its flash kernel, in float32
            by its memory-efficient one.

    Returns:
        Seconds; None where there is no such kernel: a recipe that the target has no instructions
        for, a head_dim or a length above those of the kernels, an itemsize other than 2 and 4; and
        on "cpu", where times are measured.

    Raises:
        InvalidOptionError: an unknown target or recipe.
    """
    attention = attention_seconds(target, recipe, work)
    if attention is None:
        return None
    if recipe == EXACT:
        return _LAUNCH + attention
    bandwidth = _BOARDS[parse_target(target)].bandwidth
    if not work.pairs:
        return _LAUNCH + attention
    quantizing = _quantizing(parse_target(target), recipe, work)
    launches = quantizing.launches + _LAUNCHES_BESIDE
    passed = quantizing.inputs + quantizing.unfit + quantizing.stored
    if work.mask_bytes:
        # One mask for all heads of a batch item: the usual case.
        launches += _MASK_KERNELS
        passed += _MASK_BYTES * work.batch * work.query_length * work.key_length
    return launches * _LAUNCH + passed / bandwidth + attention


@dataclass(frozen=True, slots=True)
class PerClock:
    """What a multiprocessor of a target's board does in a clock.

    Attributes:
        products: multiply-adds of tensor cores, of FP8 and FP16 into FP32.
        floats: FP32 instructions of a thread.
        exp2: the same of exp2.
    """

    products: Mapping[Format, float]
    floats: int
    exp2: int


def per_clock(target: str, *, wgmma: bool = False) -> PerClock:
    """The rates that times are predicted from, per clock and multiprocessor.

    Args:
        wgmma: of products by ``wgmma``; else by ``mma.sync``.

    Raises:
        InvalidOptionError: an unknown target, or the CPU.
    """
    target = parse_target(target)
    if target == CPU:
        raise InvalidOptionError(f"{CPU} has no rates: its times are measured")
    board = _BOARDS[target]
    # A multiply-add counts as two operations.
    share = (1.0 if wgmma else board.mma_sync) / (2 * board.multiprocessors * board.clock)
    products = {format_: share * rate for format_, rate in board.products.items()}
    return PerClock(MappingProxyType(products), board.float_lanes, _EXP2_LANES)


def attention_seconds(target: str, recipe: str, work: Work) -> float | None:
    """The part of ``seconds`` that published speeds count: the attention kernel's own.

    Arguments, result and errors are those of ``seconds``.
    """
    if recipe != EXACT and recipe not in RECIPES:
        raise InvalidOptionError(f"no time of {recipe!r}; known: {', '.join((EXACT, *RECIPES))}")
    target = parse_target(target)
    if target == CPU or work.itemsize not in (2, 4):
        return None
    longest = max(work.head_dim, work.value_head_dim)
    if recipe != EXACT and (
        recipe not in ARCHS[target].recipes
        or longest > HEAD_DIMS[-1]
        or max(work.query_length, work.key_length) >= FAR
    ):
        return None
    return _attention_seconds(_BOARDS[target], recipe, work)


def explanation(target: str) -> str:
    """Where times on this target come from, in one sentence.

    Raises:
        InvalidOptionError: an unknown target.
    """
    target = parse_target(target)
    if target == CPU:
        return "measured on the CPU at hand; docs/precision.md"
    board = _BOARDS[target]
    return (
        f"table of instruction rates: {board.document} for the {board.name}, efficiency of "
        f"FlashAttention-2 on the {board.measured_on}; docs/precision.md"
    )


def _attention_seconds(board: _Board, recipe: str, work: Work) -> float:
    """What is slower: arithmetic on the busiest multiprocessor, or device memory."""
    key_tiles = -(-work.key_length // TILE_MMA.kv_block)
    blocks = work.batch * work.heads * -(-work.query_length // TILE_MMA.q_block)
    is_flash = recipe == EXACT and work.itemsize == 2 and not work.mask_bytes
    if is_flash and blocks < board.multiprocessors:  # it splits keys where queries are too few
        tiles_of_busiest = -(-blocks * key_tiles // board.multiprocessors)
    else:
        tiles_of_busiest = -(-blocks // board.multiprocessors) * key_tiles
    pairs = tiles_of_busiest * TILE_MMA.q_block * TILE_MMA.kv_block * work.visible
    arithmetic = pairs * board.multiprocessors * _pair_seconds(board, recipe, work)
    return max(arithmetic / board.efficiency, _attention_bytes(recipe, work) / board.bandwidth)


def _pair_seconds(board: _Board, recipe: str, work: Work) -> float:
    """A query-key pair's share of a board that is fully busy, at full rates."""
    if recipe == EXACT:
        slowdown = _FP32_SLOWDOWN if work.itemsize == 4 else 1
        qk_rate = pv_rate = board.products[Format.FP16] / slowdown
        key_dim = _product_dim(work.head_dim)
        floats = 3.5  # maximum, scale and subtract, row sum; two are rounded at once
    else:
        qk, pv = RECIPES[recipe].qk, RECIPES[recipe].pv
        qk_rate, pv_rate = board.products[qk], board.products[pv]
        key_dim = _product_dim(work.head_dim)
        floats = 4.5  # and from integer to float
        if qk is Format.INT4:
            key_dim = -(-key_dim // 64) * 64  # the 32 bytes of one step of mma
            floats += 1  # delta
    value_dim = _product_dim(work.value_head_dim)
    share = 1.0 if recipe in board.wgmma else board.mma_sync
    products = (2 * key_dim / qk_rate + 2 * value_dim / pv_rate) / share
    # Per query and tile of keys, one instruction for each channel of the output decays it.
    floats += value_dim / TILE_MMA.kv_block
    softmax = (1 / _EXP2_LANES + floats / board.float_lanes) / (board.multiprocessors * board.clock)
    return products + _EXPOSED * softmax


def _product_dim(head_dim: int) -> int:
    """The channels that products are made for; above ``HEAD_DIMS`` (exact only) multiples of 32."""
    return next((dim for dim in HEAD_DIMS if dim >= head_dim), -(-head_dim // 32) * 32)


def _attention_bytes(recipe: str, work: Work) -> float:
    """What the attention kernel reads and writes; K and V are read again from the L2 cache."""
    queries = work.batch * work.heads * work.query_length
    mask = work.pairs * work.visible * work.mask_bytes
    output = queries * work.value_head_dim * work.itemsize
    if recipe == EXACT:
        keys = work.batch * work.kv_heads * work.key_length
        operands = queries * work.head_dim + keys * (work.head_dim + work.value_head_dim)
        return mask + output + operands * work.itemsize
    return mask + output + _code_bytes(recipe, work)


def _quantizing(target: str, recipe: str, work: Work) -> Account:
    """What the quantizers launch, read and write, of the channels that kernels have."""
    dtype = "float32" if work.itemsize == 4 else "bfloat16"  # float16 may have a V without scales
    kernels = variant(target, dtype, work.head_dim, recipe, value_head_dim=work.value_head_dim)
    sizes = Sizes.of(work.batch, work.heads, work.kv_heads, work.query_length, work.key_length)
    return account(ARCHS[target], kernels, sizes)


def _code_bytes(recipe: str, work: Work) -> int:
    """Quantized Q, K and V and the delta of INT4, which the attention kernel reads."""
    qk, pv = RECIPES[recipe].qk, RECIPES[recipe].pv
    tile = KeyValueTile.of(work.head_dim, work.value_head_dim, qk, pv)
    tiles = work.batch * work.kv_heads * -(-work.key_length // TILE_MMA.kv_block)
    queries = work.batch * work.heads * work.query_length
    row_bytes = tile.value_offset // TILE_MMA.kv_block  # a query's codes take what a key's do
    delta = 0
    if qk is Format.INT4:
        query_blocks = work.batch * work.heads * -(-work.query_length // TILE_MMA.q_block)
        delta = _DELTA_BYTES * query_blocks * work.key_length
    return queries * row_bytes + tiles * tile.bytes + delta
