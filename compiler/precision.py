"""The vocabulary of precision: number formats, quantization granularity, tiles and recipes.

A recipe is written ``<QK format>_<PV format>``. The numerics follow SageAttention2
(arXiv 2411.10958) and SageAttention (arXiv 2410.02367); ``kernels/reference.py`` is their
executable definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from sage_compiler.errors import InvalidOptionError


class Format(StrEnum):
    """A number format of a matrix operand."""

    INT4 = "int4"  # symmetric, [-7, 7]
    INT8 = "int8"  # symmetric, [-127, 127]; as P: unsigned, [0, 255]
    INT16 = "int16"  # as P only: unsigned, [0, 65535], with V in INT8
    FP8 = "fp8"  # E4M3, finite maximum 448
    FP16 = "fp16"


class Granularity(StrEnum):
    """Which tokens of Q, and which of K, share one quantization scale; coarse to fine."""

    TENSOR = "tensor"  # all tokens of one head
    BLOCK = "block"  # one tile of tokens
    WARP = "warp"  # Q: the rows of one warp; K: one tile
    THREAD = "thread"  # the rows (Q) and columns (K) of one thread's mma accumulator
    TOKEN = "token"


class Statistics(StrEnum):
    """Which keys share a mean of K, a scale and offset of V, and the maximum that P is relative to.

    HEAD: all keys of the head, and P is relative to the running maximum of its row. What smoothing
    takes from the scores of a row is one number, which only the LSE and a softcap notice, and the
    scale and offset of V are applied once, to the normalized output.

    KV_BLOCK: the ``kv_block`` keys of a tile, and P is relative to the maximum of its row in the
    tile. The tile is self-contained: smoothing gives back to its scores what it took, its P @ V has
    its own scale and offset, and only then joins the other tiles. So P has all the levels of its
    format in every tile, however low the tile's scores are. Combines with all other options.
    """

    HEAD = "head"
    KV_BLOCK = "kv_block"


class Accumulator(StrEnum):
    """The accumulator of one K tile's P @ V, before it is added to the FP32 output."""

    FP32 = "fp32"
    FP22 = "fp22"  # 13 mantissa bits: what the FP8 tensor cores of Ada and Hopper keep
    FP16 = "fp16"  # SageAttention2++: V is scaled so that a tile's sum stays in range


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens per tile: of Q per block and per warp, and of K per block.

    Attributes:
        softmax_blocks: blocks of K that one step of the online softmax takes, with one maximum.
    """

    q_block: int
    q_warp: int
    kv_block: int
    softmax_blocks: int = 1


TILE_MMA: Final = Tile(q_block=128, q_warp=32, kv_block=64)  # mma.sync: sm_80, 86, 89, 120
TILE_WGMMA: Final = Tile(q_block=64, q_warp=16, kv_block=128)  # wgmma: sm_90
TILE_CPU: Final = Tile(q_block=64, q_warp=64, kv_block=256)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one attention is quantized. Frozen: it is a key of caches and policies.

    Raises:
        InvalidOptionError: a format that Q and K, or P and V, cannot have.
    """

    name: str
    qk: Format
    pv: Format
    smooth_q: bool
    smooth_k: bool
    granularity: Granularity
    tile: Tile
    statistics: Statistics = Statistics.HEAD
    smooth_v: bool = False
    accumulator: Accumulator = Accumulator.FP32

    def __post_init__(self) -> None:
        for operands, chosen, possible in (
            ("Q and K", self.qk, (Format.INT4, Format.INT8)),
            ("P and V", self.pv, (Format.FP8, Format.FP16, Format.INT8, Format.INT16)),
        ):
            if chosen not in possible:
                raise InvalidOptionError(
                    f"recipe {self.name!r}: {operands} in {chosen}; possible: {', '.join(possible)}"
                )


def _recipes() -> Mapping[str, Recipe]:
    found: dict[str, Recipe] = {}
    for qk in (Format.INT4, Format.INT8):
        for pv in (Format.FP8, Format.FP16):
            # The mean of a Q block matters where few bits are left for what differs from it.
            recipe = Recipe(
                name=f"{qk}_{pv}",
                qk=qk,
                pv=pv,
                smooth_q=qk is Format.INT4,
                smooth_k=True,
                granularity=Granularity.THREAD,
                tile=TILE_MMA,
            )
            found[recipe.name] = recipe
    for pv in (Format.INT8, Format.INT16):
        recipe = Recipe(
            name=f"{Format.INT8}_{pv}",
            qk=Format.INT8,
            pv=pv,
            smooth_q=False,
            smooth_k=True,
            granularity=Granularity.TOKEN,
            tile=TILE_CPU,
            statistics=Statistics.KV_BLOCK,
        )
        found[recipe.name] = recipe
    return MappingProxyType(found)


RECIPES: Final[Mapping[str, Recipe]] = _recipes()

EXACT: Final = "exact"  # the unquantized operator
AUTO: Final = "auto"  # the device's default, where it has a real kernel
PRECISIONS: Final[tuple[str, ...]] = (AUTO, EXACT, *RECIPES)


def check_precision(name: object) -> str:
    """Return ``name`` if it is ``"auto"``, ``"exact"`` or a recipe's name.

    Raises:
        InvalidOptionError: otherwise, with the list of known names.
    """
    if not isinstance(name, str) or name not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise InvalidOptionError(f"unknown precision {name!r}; known: {known}")
    return name
