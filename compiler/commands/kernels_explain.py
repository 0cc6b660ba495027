"""The command ``sagec kernels explain``: which CUDA kernels an attention gets, or why none.

It asks what a call asks when it runs, ``registry.choose`` and ``dispatch.decide``, of a GPU that
need not be here, with tensors that have no data.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from enum import StrEnum
from textwrap import wrap
from typing import Any, Final

from sage_compiler import rates
from sage_compiler.commands import options
from sage_compiler.commands.kernels_cache import of_cache
from sage_compiler.commands.kernels_question import Question, add_question, dtype_name, parse
from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels import registry
from sage_compiler.kernels.cuda import dispatch, kernel
from sage_compiler.kernels.cuda.arch import ARCHS, PORTABLE, Arch, arch_of
from sage_compiler.kernels.cuda.cut import Cut
from sage_compiler.kernels.cuda.cut import reason as reason_of_cut
from sage_compiler.kernels.cuda.pack import find_packs
from sage_compiler.kernels.cuda.sizes import Reach, Sizes, arrange
from sage_compiler.kernels.cuda.spec import HopperAttendSpec, KernelSpec
from sage_compiler.kernels.cuda.variants import CacheVariant, Variant, all_specs
from sage_compiler.kernels.kernel import Kernel
from sage_compiler.kernels.triton import kernel as triton
from sage_compiler.ops import SHIPPED_GATE
from sage_compiler.precision import AUTO, EXACT
from sage_compiler.semantics import UNBOUNDED, MaskClass
from sage_compiler.text import columns, duration
from sage_compiler.traffic import Traffic, traffic

_WIDTH: Final = 100  # of prose
_SHIPPED: Final = "on first use; release wheels have it"
_EXPLAIN: Final = """\
Say which CUDA kernels an attention gets on a GPU, and why, or why it gets none. Neither that GPU
nor a compiler is needed. The shape is that of the query: batch, heads, length, head_dim.

    sagec kernels explain 1x32x4096x128 --arch sm_89 --kv 1x8x4096x128 --mask causal"""


_SEQUENCES: Final = (
    "one set of launches serves all sequences of a recipe that is asked for by name, and reads "
    "their offsets on the device; blocks and scratch are the most that lengths of these sums can "
    f"need. With {AUTO}, a least length or a guard, each sequence is a call of its own"
)


class Server(StrEnum):
    """Who serves an attention."""

    KERNELS = "kernels"
    EXACT = "exact"  # scaled_dot_product_attention, or float arithmetic
    REFERENCE = "reference"  # emulates a recipe


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of a question.

    Attributes:
        recipe: what is computed: a recipe, or "exact".
        reason: why, in one sentence.
        arch: the architecture; None where there are no kernels for the GPU.
        shown: the recipe whose kernels are shown, though nobody may take them: for `auto` the one
            that it means; None for "exact" and what is refused.
        kernels: the kernels of ``shown``.
        launches: those that are launched, in order, and their blocks.
        sizes: how tokens are cut into blocks.
        cut: how the products are.
        scratch_bytes: the memory that they share; an explicit mask takes more to look through.
        traffic: what quantizing moves; None of packed sequences, and of a GPU whose cache is not
            known.
        seconds: the predicted time of the whole call, by recipe of the architecture and "exact";
            None where the kernels do not take it, left out where there is no prediction, as of
            sequences whose lengths are not known, and of a cache.
        cache_bytes: what a cache of these tokens takes; None: there is none.
    """

    served_by: Server
    recipe: str
    reason: str
    arch: Arch | None
    shown: str | None
    kernels: Variant | CacheVariant | None
    launches: tuple[tuple[KernelSpec, int], ...]
    sizes: Sizes
    cut: Cut | None
    scratch_bytes: int | None
    traffic: Traffic | None
    seconds: dict[str, float | None]
    cache_bytes: int | None = None


def add_command(actions: options.Commands) -> None:
    """Give ``sagec kernels`` the command."""
    parser = options.add_command(
        actions,
        "explain",
        _explain,
        summary="which kernels an attention gets on a GPU, or why none",
        description=_EXPLAIN,
    )
    add_question(parser)
    options.add_json(parser)


def answer(question: Question) -> Answer:
    """What a call does, by the functions that it asks.

    Raises:
        InvalidAttentionError: a length that positions in the kernels do not hold.
        InvalidOptionError: a recipe that a cache cannot have.
        KernelUnavailableError: a cache on a GPU that there are no kernels for.
    """
    if question.cache:
        return _of_cache(question)
    recipe, problem = question.recipe, question.problem
    batch, heads, length, head_dim = question.query.shape
    key_length = question.key.shape[2]
    sizes = Sizes.of(batch, heads, problem.kv_heads, length, key_length)
    if question.sequences is not None:
        sizes = Sizes.of_sequences(
            question.sequences, heads, problem.kv_heads, length, key_length, key_length
        )
    products = question.query.numel() * key_length
    least = SHIPPED_GATE if recipe == AUTO else 0  # as in sage.attention
    chosen = registry.choose(recipe, problem, least, length, key_length, products)
    served_by, computed, reason = _served(question, chosen)
    try:
        arch = arch_of(question.capability)
    except KernelUnavailableError:
        return Answer(
            served_by, computed, reason, None, None, None, (), sizes, None, None, None, {}
        )

    shown = dispatch.default_recipe(arch.name) if recipe == AUTO else recipe
    kernels = cut = None
    if shown != EXACT:
        semantics = question.semantics
        # Those of a packed batch are rotated before, by torch.
        rotary = question.rotary if question.sequences is None else None
        planned = dispatch.plan(
            arch.name,
            shown,
            dtype_name(problem.dtype),
            head_dim,
            problem.value_head_dim,
            sizes,
            Reach.of(semantics, length, key_length),
            window=semantics.window_left != UNBOUNDED,
            masked=problem.has_mask,
            softcap=kernel.has_softcap(semantics),
            rotary_query=rotary,
            rotary_key=rotary,
            varlen=question.sequences is not None,
        )
        if not isinstance(planned, str):
            kernels, cut = planned
    scratch_bytes = moved = None
    launches: tuple[tuple[KernelSpec, int], ...] = ()
    if kernels is not None and cut is not None:
        blocks = sizes.blocks(kernels, cut.splits, arch.multiprocessors)
        launches = tuple(zip(kernels.specs(), blocks, strict=True))
        row_term = question.sinks is not None or kernels.attend.softcap
        if question.sequences is None and arch is not PORTABLE:
            moved = traffic(arch, kernels, sizes, row_term=row_term)
        parts = sizes.scratch(kernels, row_term=row_term, splits=cut.splits)
        scratch_bytes = arrange(parts)[1]
    work = rates.Work.of(
        question.query, question.key, question.value, question.semantics, question.attn_mask
    )
    return Answer(
        served_by,
        computed,
        reason,
        arch,
        None if kernels is None else shown,
        kernels,
        launches,
        sizes,
        cut,
        scratch_bytes,
        moved,
        {
            name: rates.seconds(arch.name, name, work)
            for name in (() if arch is PORTABLE else (*arch.recipes, EXACT))
            if question.sequences is None and (name != EXACT or _has_exact_time(question))
        },
    )


def _of_cache(question: Question) -> Answer:
    """The answer of a cache, which takes what it is asked for or raises."""
    arch = arch_of(question.capability)
    found = of_cache(question, arch)
    names = [spec.kind for spec, _ in found.appending]
    verb = "packs" if len(names) == 1 else "pack"
    reason = f"kernel {kernel.NAME}; {' and '.join(names)} {verb} the queries' tokens"
    return Answer(
        Server.KERNELS,
        found.recipe,
        reason,
        arch,
        found.recipe,
        found.kernels,
        (*found.appending, *found.attending),
        found.sizes,
        found.cut,
        found.scratch_bytes,
        None,
        {},
        found.cache_bytes,
    )


def _served(
    question: Question, chosen: Kernel | registry.Unavailable | None
) -> tuple[Server, str, str]:
    """Who serves, what is computed, and why."""
    recipe = question.recipe
    if isinstance(chosen, Kernel):
        return Server.KERNELS, chosen.recipe, f"kernel {chosen.name()}"
    if isinstance(chosen, registry.Unavailable):
        return Server.REFERENCE, recipe, chosen.reason
    if recipe == EXACT:
        return Server.EXACT, EXACT, "it is asked for"
    default = registry.default(question.problem)
    if default.kernel is None:
        return Server.EXACT, EXACT, default.reason
    gate = default.gate
    return (
        Server.EXACT,
        EXACT,
        f"{default.recipe} was measured to gain from {gate.query_length} queries, "
        f"{gate.key_length} keys and {gate.products} products on",
    )


def _explain(arguments: argparse.Namespace) -> int:
    question = parse(arguments)
    found = answer(question)
    if arguments.json:
        options.print_json(to_dict(question, found))
    else:
        print("\n".join(_lines(question, found)))
    return options.OK


def to_dict(question: Question, found: Answer) -> dict[str, Any]:
    """Plain data; sizes in bytes, times in seconds."""
    about: dict[str, Any] = {
        "attention": str(question),
        "sequences": question.sequences,
        "rotary": question.rotary,
        "cache_bytes": found.cache_bytes,
        "capability": list(question.capability),
        "arch": None if found.arch is None else found.arch.name,
        "asked": question.recipe,
        "served_by": found.served_by,
        "recipe": found.recipe,
        "reason": found.reason,
        "shown": found.shown,
        "launches": [],
        "tile": None,
        "cut": None,
        "scratch_bytes": found.scratch_bytes,
        "quantization": None,
        "recipes": [],
        "exact_seconds": found.seconds.get(EXACT),
        "times": None,
    }
    if found.arch is None:
        return about
    about["recipes"] = [
        {"recipe": name, "offered": offered, "reason": reason, "seconds": found.seconds.get(name)}
        for name, offered, reason in _recipes(found.arch)
    ]
    about["times"] = _caveat(found.arch)
    if found.kernels is not None and found.cut is not None:
        attend = found.kernels.attend
        about["launches"] = [
            {
                "symbol": spec.symbol,
                "blocks": blocks,
                "threads": spec.threads,
                "shared_bytes": spec.shared_bytes,
                "packed": packed,
                "shipped": shipped,
            }
            for spec, blocks, packed, shipped in _launches(found)
        ]
        if found.traffic is not None:
            about["quantization"] = {
                "launches": found.traffic.launches,
                "loaded_bytes": found.traffic.loaded,
                "stored_bytes": found.traffic.stored,
                "least_bytes": found.traffic.bound,
                "memory_ratio": found.traffic.ratio,
                "least_bytes_of_cache": found.traffic.bound_of_cache,
                "memory_ratio_of_cache": found.traffic.ratio_of_cache,
            }
        about["tile"] = {
            "queries": attend.tile_rows,
            "keys": attend.keys,
            "warp_rows": attend.warp_rows,
            "stages": attend.stages,
            "reason": _geometry_reason(found.arch, found.kernels),
        }
        about["cut"] = {
            "packed_heads": found.sizes.group if attend.packed_heads else 1,
            "splits": found.cut.splits,
            "multiprocessors": found.arch.multiprocessors,
            "reason": _cut_reason(question, found),
        }
    return about


def _lines(question: Question, found: Answer) -> list[str]:
    """The answer for people."""
    major, minor = question.capability
    where = f"compute capability {major}.{minor}"
    if found.arch is PORTABLE:
        where += f", by PTX of {found.arch.name}"
    elif found.arch is not None:
        where = found.arch.name
    lines = [f"{question}; on {where}", _decision(question, found)]
    if found.arch is None:
        return lines
    if found.kernels is not None and found.cut is not None:
        assert found.scratch_bytes is not None
        attend = found.kernels.attend
        named = "" if found.served_by == Server.KERNELS else ", where it is asked for by name,"
        lines += ["", f"{found.shown}{named} launches"]
        heading = ("kernel", "blocks", "threads", "shared bytes", "built")
        rows = [
            (
                spec.symbol,
                str(blocks),
                str(spec.threads),
                str(spec.shared_bytes),
                "in the pack" if packed else _SHIPPED if shipped else "on first use",
            )
            for spec, blocks, packed, shipped in _launches(found)
        ]
        lines += columns([heading, *rows], indent="  ")
        lines.append(
            f"tile: {attend.tile_rows} queries and {attend.keys} keys, {attend.warp_rows} "
            f"queries a warp, {attend.stages} stages"
        )
        lines += _prose(_geometry_reason(found.arch, found.kernels))
        heads = f"heads packed by {found.sizes.group}" if attend.packed_heads else "a head a tile"
        splits = found.cut.splits
        lines.append(f"cut: {heads}, {f'keys in {splits} parts' if splits > 1 else 'all keys'}")
        lines += _prose(_cut_reason(question, found))
        also = ", and what it takes to look through the mask" if attend.masked else ""
        if found.traffic is not None:
            least = found.traffic.bound / 1e6
            lines.append(
                f"quantization: {found.traffic.ratio:.2f} times {least:.1f} MB, the least that "
                "memory has to move, by a model of the cache"
            )
            if found.traffic.unfit:
                lines += _prose(
                    f"a head of K or V is larger than what of the cache can be counted on: "
                    f"{found.traffic.ratio_of_cache:.2f} times what it takes to read these twice"
                )
        lines.append(f"scratch: {found.scratch_bytes} bytes{also}")
    if found.cache_bytes is not None:
        lines.append(f"cache: {found.cache_bytes} bytes for {found.sizes.key_length} tokens")
    if found.shown == triton.RECIPE and not question.cache:
        lines.append(
            "where these are in no pack and nothing compiles them, Triton's serve, if it is there"
        )
    lines += ["", f"recipes on {found.arch.name}, in order of preference"]
    cells = [
        (name, _duration(found.seconds.get(name)), reason)
        for name, _, reason in _recipes(found.arch)
    ]
    exact = (EXACT, _duration(found.seconds.get(EXACT)), _exact(question))
    lines += columns([("recipe", "predicted", "reason"), *cells, exact], indent="  ")
    return [*lines, _caveat(found.arch)]


def _decision(question: Question, found: Answer) -> str:
    match found.served_by:
        case Server.KERNELS:
            return f"{question.recipe}: {found.recipe}, {found.reason}"
        case Server.EXACT:
            return f"{question.recipe}: {_exact(question)} serves: {found.reason}"
        case Server.REFERENCE:
            return (
                f"{question.recipe}: no kernel: {found.reason}. The reference emulates it, slowly; "
                f"with fallback='sdpa', {_exact(question)} serves"
            )


def _exact(question: Question) -> str:
    """What exact attention is here: see ``kernels.exact``."""
    return "scaled_dot_product_attention" if _is_plain(question) else "float arithmetic"


def _has_exact_time(question: Question) -> bool:
    """Whether scaled_dot_product_attention serves, and skips what a band hides."""
    windows = (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)
    return _is_plain(question) and question.semantics.mask_class not in windows


def _is_plain(question: Question) -> bool:
    return question.semantics.softcap is None and question.sinks is None


def _recipes(arch: Arch) -> list[tuple[str, bool, str]]:
    """Recipes of CUDA kernels, whether an architecture offers them, and the reason."""
    offered = [(offer.recipe, True, offer.reason) for offer in arch.offers]
    anywhere = dict.fromkeys(name for each in ARCHS.values() for name in each.recipes)
    return offered + [
        (name, False, reason)
        for name in anywhere
        if (reason := dispatch.lacking(arch.name, name)) is not None
    ]


def _prose(sentence: str) -> list[str]:
    return wrap(sentence, width=_WIDTH, initial_indent="  ", subsequent_indent="  ")


def _launches(found: Answer) -> list[tuple[KernelSpec, int, bool, bool]]:
    """Each kernel, its blocks, whether a pack here has it, and whether release wheels do."""
    assert found.arch is not None
    packs, shipped = find_packs(), set(all_specs(found.arch.name))
    return [
        (spec, blocks, any(pack.has(spec) for pack in packs), spec in shipped)
        for spec, blocks in found.launches
    ]


def _cut_reason(question: Question, found: Answer) -> str:
    if question.sequences is not None:
        rotated = "" if question.rotary is None else "; Q and K are rotated before, by torch"
        return _SEQUENCES + rotated
    assert found.cut is not None and found.arch is not None
    return reason_of_cut(found.cut, found.sizes, found.arch.multiprocessors)


def _geometry_reason(arch: Arch, kernels: Variant | CacheVariant) -> str:
    attend = kernels.attend
    longest = max(attend.head_dim, attend.value_head_dim)
    if isinstance(attend, HopperAttendSpec):
        if attend.tile_scales:
            return "V has scales of its own in each tile, by which P V of a step is multiplied"
        return arch.ring(longest).reason
    if attend.packed_heads:
        return (
            "each packed row has a scale of its own to keep, and few rows want many warps: 16 rows "
            "a warp; stages as for many queries"
        )
    return arch.geometry(longest).reason


def _caveat(arch: Arch) -> str:
    if arch is PORTABLE:
        return "times are predicted of none: whose they would be is not known"
    return f"times are predicted, none is measured: {rates.explanation(arch.name)}"


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)
