"""Into which blocks the products of an attention are cut: which rows of Q, and how many keys.

With many queries a block does 128 of one head, over all keys. With few, most of its rows would be
empty, and there would be too few blocks to read K and V as fast as the memory gives them. So

- the rows of a tile are then the queries of all heads that share K and V, and
- the keys are divided among so many blocks that all multiprocessors have one.

The kernel of wgmma has tiles of 128 rows alone. With one query of eight heads most of them are
empty, but reading a step of keys takes longer than its products even so (docs/cuda-hopper.md).

None of it changes codes or scales of Q, K and V: see "Split keys" of docs/numerics.md. Nothing here
was timed.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

from sage_compiler.kernels.cuda.arch import named
from sage_compiler.kernels.cuda.sizes import Sizes
from sage_compiler.kernels.cuda.spec import QUERY_BLOCK, QueryTile, padded_dim
from sage_compiler.kernels.cuda.variants import PACKED_ROWS, WGMMA_ROWS, decoding_tile, variant
from sage_compiler.precision import TILE_MMA

# Queries that leave at least half of a query block empty: then heads of a group are packed, and a
# group of one gets a lower tile.
_MOST_SHORT_QUERIES: Final = TILE_MMA.q_block // 2
# A lower tile is copied by 64 threads, which take less at once than what the swizzle of rows of 256
# bytes repeats after.
_LEAST_ROWS_OF_LONG_HEADS: Final = 64
_LONGEST_OF_LEAST_ROWS: Final = 128  # padded head_dim

# A part of the keys costs two floats and a row of output for each query, written and read again:
# for 16 rows about the bytes of a tile of keys. It must be small beside the part's own tiles.
_ROWS_OF_A_TILE: Final = 16
_LEAST_TILES: Final = 4
# The merging kernel goes through the parts of a query one after the other.
_MOST_SPLITS: Final = 128

_RESERVED_BYTES: Final = 1 << 10  # of shared memory, by the system for each block
_WARPS: Final = 8  # of a multiprocessor, with up to 255 registers a thread


class Cut(NamedTuple):
    """How the products are cut.

    Attributes:
        tile: what a block does; it splits keys where there is more than one split.
        splits: parts of the keys.
    """

    tile: QueryTile
    splits: int


def cuts(
    arch: str,
    recipe: str,
    dtype: str,
    head_dim: int,
    value_head_dim: int,
    sizes: Sizes,
    key_tiles: int,
    multiprocessors: int,
    *,
    masked: bool = False,
) -> tuple[Cut, ...]:
    """The cuts of one attention, the best one first, from sizes alone: the same call gets the same
    bits where the same kernels can be had.

    Behind the best one comes for few queries the one whose kernels packs have, but where it would
    read K and V more often than the last one, whole query blocks.

    Args:
        arch, recipe, dtype, head_dim, value_head_dim, masked: as of ``dispatch.decide``, which has
            kernels for them.
        key_tiles: ``Reach.key_tiles``.
        multiprocessors: of the device.
    """
    wgmma = named(arch).uses_wgmma(recipe)

    def splits(tile: QueryTile) -> int:
        resident = _resident(arch, recipe, dtype, head_dim, value_head_dim, masked, tile)
        wanted = multiprocessors * resident // sizes.tiles(tile)  # all at once, and none twice
        rows = min(tile.rows, sizes.group * sizes.query_length) if wgmma else tile.rows
        affordable = key_tiles // max(_LEAST_TILES, rows // _ROWS_OF_A_TILE)
        return max(1, min(wanted, affordable, _MOST_SPLITS))

    best = query_tile(sizes, max(head_dim, value_head_dim), wgmma=wgmma)
    found = [Cut(best._replace(split=splits(best) > 1), splits(best))]
    packed = decoding_tile(arch, recipe)
    exists = wgmma or padded_dim(max(head_dim, value_head_dim)) <= _LONGEST_OF_LEAST_ROWS
    if best.packed_heads and exists and sizes.tiles(packed) <= sizes.tiles(QUERY_BLOCK):
        found.append(Cut(packed, splits(packed)))
    return tuple(dict.fromkeys((*found, Cut(QUERY_BLOCK, 1))))


def query_tile(sizes: Sizes, longest: int, *, wgmma: bool = False) -> QueryTile:
    """The tile for so many queries, for a greater head_dim of ``longest``; of all keys.

    Args:
        wgmma: as of ``Arch.uses_wgmma``.
    """
    if sizes.query_length > _MOST_SHORT_QUERIES:
        return QUERY_BLOCK
    if wgmma:
        return QueryTile(WGMMA_ROWS, packed_heads=True)
    is_long = padded_dim(longest) > _LONGEST_OF_LEAST_ROWS
    least = _LEAST_ROWS_OF_LONG_HEADS if is_long else PACKED_ROWS[0]
    rows = max(least, sizes.group * sizes.query_length)
    fitting = next((each for each in PACKED_ROWS if each >= rows), PACKED_ROWS[-1])
    return QueryTile(fitting, packed_heads=True)


def reason(cut: Cut, sizes: Sizes, multiprocessors: int) -> str:
    """Why an attention is cut so, in one sentence."""
    blocks = sizes.tiles(cut.tile)
    if cut.tile.packed_heads and sizes.group > 1:
        rows = (
            f"a head's queries, {sizes.query_length}, leave at least half of a block of "
            f"{TILE_MMA.q_block} empty, so the {sizes.group} heads that share K and V are packed "
            f"into tiles of {cut.tile.rows}"
        )
    elif cut.tile.packed_heads:
        rows = f"a head's queries, {sizes.query_length}, fit into a tile of {cut.tile.rows}"
    else:
        rows = f"queries fill blocks of {TILE_MMA.q_block}"
    if cut.splits > 1:
        keys = (
            f"{blocks} of them would leave some of {multiprocessors} multiprocessors without work, "
            f"so the keys are split into {cut.splits} parts, which a last kernel merges"
        )
    else:
        keys = (
            f"{blocks} of them for {multiprocessors} multiprocessors: splitting the keys would not "
            "pay"
        )
    return f"{rows}; {keys}"


@functools.cache
def _resident(
    arch: str,
    recipe: str,
    dtype: str,
    head_dim: int,
    value_head_dim: int,
    masked: bool,
    tile: QueryTile,
) -> int:
    """Blocks that a multiprocessor runs at a time, by shared memory and registers."""
    attend = variant(
        arch, dtype, head_dim, recipe, value_head_dim=value_head_dim, masked=masked, tile=tile
    ).attend
    shared = named(arch).shared_bytes + _RESERVED_BYTES
    by_shared = shared // (attend.shared_bytes + _RESERVED_BYTES)
    by_registers = _WARPS * 32 // attend.threads
    return max(1, min(by_shared, by_registers))
