"""Which kernels an attention launches on an architecture, or why none: one function.

What PyTorch launches (``kernel.run``), what the registry refuses (``kernel.refuse``) and what
``sagec kernels explain`` shows are answers of ``decide``, and how their products are cut into
blocks is one of ``plan``; the launch table of a pack, by which ONNX Runtime goes, holds those of
``variant``, the second half of ``decide``. ``arch.py`` and ``cut.py`` have the tables and reasons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from sage_compiler.kernels.cuda.arch import ARCHS, PORTABLE, Arch
from sage_compiler.kernels.cuda.cut import Cut, cuts
from sage_compiler.kernels.cuda.sizes import Reach, Sizes
from sage_compiler.kernels.cuda.spec import DTYPES, HEAD_DIMS, QUERY_BLOCK, QueryTile
from sage_compiler.kernels.cuda.variants import Variant, accumulators, variant
from sage_compiler.kernels.kernel import CLOSED, Gate
from sage_compiler.precision import RECIPES, Accumulator
from sage_compiler.semantics import RotaryPairs


@functools.cache
def decide(
    arch: str,
    recipe: str,
    dtype: str,
    head_dim: int,
    value_head_dim: int,
    *,
    window: bool = False,
    masked: bool = False,
    softcap: bool = False,
    varlen: bool = False,
    accumulator: Accumulator = Accumulator.FP32,
    rotary_query: RotaryPairs | None = None,
    rotary_key: RotaryPairs | None = None,
    tile: QueryTile = QUERY_BLOCK,
) -> Variant | str:
    """The kernels of one attention, or in one sentence why there are none.

    Args:
        arch: a key of ``ARCHS``, or ``PORTABLE``'s name.
        recipe: a key of ``RECIPES``.
        dtype: of Q, K, V and the output, as torch names it.
        head_dim: channels of Q and K.
        value_head_dim: channels of V and the output.
        window: whether a window hides the first keys.
        masked: whether there is an explicit mask.
        softcap: whether there is a softcap that does something.
        varlen: whether it is of a packed batch of sequences, in one set of launches.
        accumulator: of P @ V in FP8; FP16 as of SageAttention2++.
        rotary_query, rotary_key: how Q and K are rotated as they are read, if they are.
        tile: what a block of the attention kernel does; ``plan`` finds it.
    """
    lack = lacking(arch, recipe)
    if lack is not None:
        return f"no {recipe} on {arch}, but {', '.join(_table(arch).recipes)}: {lack}"
    if dtype not in DTYPES:
        return f"{dtype} is none of {', '.join(DTYPES)}"
    for name, size in (("head_dim", head_dim), ("value head_dim", value_head_dim)):
        if not 1 <= size <= HEAD_DIMS[-1]:
            return f"{name} {size} is not from 1 to {HEAD_DIMS[-1]}"
    if masked and varlen:
        return "a packed batch takes no explicit mask"
    if varlen and (rotary_query is not None or rotary_key is not None):
        return "Q and K of a packed batch are not rotated as they are read, but before"
    possible = accumulators(arch, recipe)
    if accumulator not in possible:
        return f"{recipe} on {arch} accumulates in {', '.join(possible)}, not in {accumulator}"
    return variant(
        arch,
        dtype,
        head_dim,
        recipe,
        accumulator,
        value_head_dim=value_head_dim,
        window=window,
        masked=masked,
        softcap=softcap,
        rotary_query=rotary_query,
        rotary_key=rotary_key,
        varlen=varlen,
        tile=tile,
    )


class Plan(NamedTuple):
    """What one attention launches, and how its products are cut into blocks."""

    kernels: Variant
    cut: Cut


def plan(
    arch: str,
    recipe: str,
    dtype: str,
    head_dim: int,
    value_head_dim: int,
    sizes: Sizes,
    reach: Reach,
    multiprocessors: int | None = None,
    *,
    window: bool = False,
    masked: bool = False,
    softcap: bool = False,
    accumulator: Accumulator = Accumulator.FP32,
    rotary_query: RotaryPairs | None = None,
    rotary_key: RotaryPairs | None = None,
    varlen: bool = False,
    obtainable: Callable[[Variant], bool] = lambda kernels: True,
) -> Plan | str:
    """As ``decide``, with the cut for these sizes.

    Args:
        multiprocessors: of the device; None: those of the architecture's usual board.
        obtainable: whether kernels can be had. Where those of a finer cut cannot, as with a pack
            and no compiler, it is one that packs have, or there is none.
    """

    def kernels(tile: QueryTile) -> Variant | str:
        return decide(
            arch,
            recipe,
            dtype,
            head_dim,
            value_head_dim,
            window=window,
            masked=masked,
            softcap=softcap,
            accumulator=accumulator,
            rotary_query=rotary_query,
            rotary_key=rotary_key,
            varlen=varlen,
            tile=tile,
        )

    refusal = kernels(QUERY_BLOCK)
    if isinstance(refusal, str):
        return refusal
    uncut = Plan(refusal, Cut(QUERY_BLOCK, 1))
    if varlen:  # each sequence has another number of queries
        return uncut
    possible = cuts(
        arch,
        recipe,
        dtype,
        head_dim,
        value_head_dim,
        sizes,
        reach.key_tiles,
        multiprocessors or _table(arch).multiprocessors,
        masked=masked,
    )
    for cut in possible:
        found = kernels(cut.tile)
        assert not isinstance(found, str)
        if found == uncut.kernels or obtainable(found):
            return Plan(found, cut)
    return uncut


def lacking(arch: str, recipe: str) -> str | None:
    """Why an architecture has no kernels of a recipe at all, or None where it has."""
    table = _table(arch)
    if recipe in table.recipes:
        return None
    formats = (RECIPES[recipe].qk, RECIPES[recipe].pv)
    found = [table.lacking[each] for each in formats if each in table.lacking]
    return "; ".join(found) or "it is a recipe of CPUs"


def default_recipe(arch: str) -> str:
    """What `auto` means on an architecture; whether it is taken, ``gate`` says."""
    return _table(arch).recipes[0]


def gate(arch: str, recipe: str) -> Gate | str:
    """The least sizes that `auto` gives a recipe, or in one sentence why it gives nothing."""
    measured = _table(arch).measured
    if measured is None:
        return f"{recipe} is not measured on this GPU ({arch})"
    if recipe != default_recipe(arch):
        return f"{recipe} is not the recipe that {measured.file} measured on {arch}"
    return measured.gate


def _table(arch: str) -> Arch:
    return PORTABLE if arch == PORTABLE.name else ARCHS[arch]


@functools.cache
def smallest(recipe: str) -> Gate:
    """The least sizes that any architecture's ``gate`` has for a recipe."""
    gates = [found for arch in ARCHS if isinstance(found := gate(arch, recipe), Gate)]
    if not gates:
        return CLOSED
    return Gate(
        min(each.query_length for each in gates),
        min(each.key_length for each in gates),
        min(each.products for each in gates),
    )
