"""The cells that the presets of benchmarks/kernels.py time, and what they must reach."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from benchmarks.cells import Cell
from sage_compiler.precision import AUTO

LENGTHS: Final = tuple(sorted({*(2**i for i in range(14)), 48, 96}))  # 1 .. 8192

# Never slower: where SDPA takes long enough for a ratio to mean something, a ratio; else a sum.
LONG_ENOUGH: Final = 200.0  # us of SDPA
LEAST_RATIO: Final = 0.97
MOST_ADDED: Final = 8.0  # us


@dataclass(frozen=True, slots=True)
class Preset:
    """A grid of cells.

    Attributes:
        help: for the command line.
        cells: in the order in which they run.
        precisions: what is timed against SDPA.
        seconds: about how long each cell is measured.
        verdict: whether each cell passes or fails ``passed``.
        every_isa: run once for each instruction set, in a process of its own.
    """

    help: str
    cells: tuple[Cell, ...]
    precisions: tuple[str, ...] = ("int8_int8",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    seconds: float = 3.0
    verdict: bool = False
    every_isa: bool = False


def _reach() -> tuple[Cell, ...]:
    """How far it goes: long enough to be worth it, all kinds of masks."""
    grid = product((1, 2), (64, 128), (512, 1024, 4096), ("none", "causal", "bool", "float"))
    return tuple(
        Cell(length, length, head_dim, mask, threads) for threads, head_dim, length, mask in grid
    )


def _grid() -> tuple[Cell, ...]:
    """Every length, and everything else that decides who is faster, but not all combinations."""
    cells: list[Cell] = []
    for length in LENGTHS:
        masks = ("none", "causal", "bool_padding")
        cells += (Cell(length, length, 64, mask, 2) for mask in masks)
        # One head: fewer pieces of work than threads, or just one.
        cells.append(Cell(length, length, 64, "none", 2, heads=1, kv_heads=1))
        if length < 8192:
            cells.append(Cell(length, length, 64, "none", 1))
            cells += (Cell(length, length, head_dim, "none", 2) for head_dim in (32, 128))
        # Decoding and chunks of a prompt.
        contexts = (context for context in (64, 1024, 8192) if context != length)
        cells += (Cell(length, context, 64, "none", 2) for context in contexts)
    cells += (
        Cell(length, length, 64, mask, 2)
        for length in (48, 64, 96, 256, 1024, 4096)
        for mask in ("bool", "float")
    )
    cells += (Cell(4096, context, 64, "none", 2) for context in (1, 16, 77))
    cells += (Cell(length, 2048, 128, "none", 2, heads=32) for length in (1, 16, 64, 512))
    return tuple(dict.fromkeys(cells))


def _recipes() -> tuple[Cell, ...]:
    """Small: the portable kernel, far slower than the others, has to end too."""
    grid = product((64, 128), ("none", "causal"))
    return tuple(Cell(1024, 1024, head_dim, mask) for head_dim, mask in grid)


PRESETS: Final = {
    "reach": Preset("lengths from 512 to 4096, all masks, 1 and 2 threads", _reach()),
    "grid": Preset(
        "never slower: lengths from 1 to 8192 through precision 'auto', pass or fail",
        _grid(),
        precisions=(AUTO,),
        seconds=0.7,
        verdict=True,
    ),
    "recipes": Preset(
        "both INT8 recipes with every instruction set that this machine has",
        _recipes(),
        precisions=("int8_int8", "int8_int16"),
        seconds=1.5,
        every_isa=True,
    ),
}


def passed(row: dict[str, Any]) -> bool:
    """Whether a row is never slower than SDPA, as the grid means it."""
    if row["sdpa_us"] >= LONG_ENOUGH:
        return bool(row["ratio"] >= LEAST_RATIO)
    return bool(row["added_us"] <= MOST_ADDED)
