"""The CUDA kernels, launched as on a GPU, executed on the CPU: cutlass_templates/host/.

Inputs, outputs and scratch are registered with the driver look-alike one by one, so that any access
outside of them fails.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.arch import named as named_arch
from sage_compiler.kernels.cuda.driver import Driver
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.render import render
from sage_compiler.kernels.cuda.spec import QUERY_BLOCK, KernelSpec, QueryTile
from sage_compiler.kernels.cuda.variants import WGMMA_ROWS, Variant, variant
from sage_compiler.kernels.cuda.varlen import Lengths
from sage_compiler.kernels.layout import empty_output
from sage_compiler.kernels.rotary import Rotary
from sage_compiler.precision import RECIPES, Accumulator, Recipe
from sage_compiler.semantics import UNBOUNDED
from tests.compiler.kernels.dense import Call
from tests.cutlass_templates import host

ARCH = "sm_89"  # the one with all recipes
GARBAGE = 0xC5  # what scratch holds before: large numbers, in every format

_QUANTIZERS = ("statistics", "query", "key", "value")  # what one launch does

# (recipe, accumulator of P @ V) of all attention kernels by mma.sync.
RECIPE_VARIANTS = [
    ("int4_fp8", Accumulator.FP32),
    ("int4_fp8", Accumulator.FP16),
    ("int8_fp8", Accumulator.FP32),
    ("int8_fp8", Accumulator.FP16),
    ("int4_fp16", Accumulator.FP32),
    ("int8_fp16", Accumulator.FP32),
]


@functools.cache
def the_host() -> host.Host:
    """The driver look-alike of this process."""
    return host.Host()


def build(spec: KernelSpec) -> bytes:
    """A ``Builder`` for the look-alike."""
    return host.compile_kernel(render(spec), spec.symbol)


@functools.cache
def loader() -> Loader:
    """Kernels as they are."""
    return Loader(Driver(str(host.driver())), build)


class Way(NamedTuple):
    """How an attention is computed: a recipe, and the architecture whose kernels do it."""

    recipe: str
    arch: str = ARCH
    accumulator: Accumulator = Accumulator.FP32

    def __str__(self) -> str:
        return "-".join(self)

    def attend(self, call: Call, tile: QueryTile = QUERY_BLOCK, **options: Any) -> Result:
        """As ``attend``, with the rows of a tile that there are."""
        rows = WGMMA_ROWS if self.is_wgmma else tile.rows
        return attend(
            call,
            self.recipe,
            self.accumulator,
            arch=self.arch,
            tile=tile._replace(rows=rows),
            **options,
        )

    @property
    def is_wgmma(self) -> bool:
        """Whether its products are those of warpgroups."""
        return named_arch(self.arch).uses_wgmma(self.recipe)


WGMMA = Way("int8_fp8", "sm_90a")
"""The kernel of wgmma."""


def broken(kind: str, change: Callable[[str], str], *headers: str) -> Loader:
    """Kernels of which those of one kind have a header changed; their images are not kept.

    Args:
        kind: of kernels; empty: all, whose templates include the header. One that quantizes is
            also broken where it is launched with the others.
        headers: the last one is changed; it is included by the one before, and that of the kind's
            template, which it is by default, includes the first.
    """
    *_, header = headers or (kind,)
    changed = change(_header(header))
    assert changed != _header(header), "there is nothing to break"

    def build_broken(spec: KernelSpec) -> bytes:
        source = render(spec)
        if kind in ("", spec.kind) or (spec.kind == "quantize" and kind in _QUANTIZERS):
            included = {header: changed}
            source = source.replace(_include(spec.kind), _in_place(spec.kind, included, set()))
        return host.compile_kernel(source, spec.symbol)

    return Loader(Driver(str(host.driver())), build_broken)


def _include(name: str) -> str:
    return f"#include <sage/{name}.cuh>"


def _header(name: str) -> str:
    return (host.TEMPLATES / "include" / "sage" / f"{name}.cuh").read_text()


def _in_place(name: str, changed: Mapping[str, str], seen: set[str]) -> str:
    """The text of a header and of all that it includes, each once, with some of them changed."""
    seen.add(name)

    def included(found: re.Match[str]) -> str:
        other = found[1]
        return "" if other in seen else _in_place(other, changed, seen)

    text = changed.get(name, _header(name)).replace("#pragma once", "")
    text = re.sub(r"#include <sage/(\w+)\.cuh>", included, text)
    return text


def replacing(old: str, new: str) -> Callable[[str], str]:
    """A change that replaces a text, which is there once; white space does not count."""
    pattern = re.compile(r"\s+".join(re.escape(word) for word in old.split()))

    def change(header: str) -> str:
        changed, count = pattern.subn(lambda _: new, header)
        assert count == 1, f"{old!r} is there {count} times"
        return changed

    return change


def named(recipe: str, accumulator: Accumulator, softmax_blocks: int = 1) -> Recipe:
    """The recipe that the reference computes."""
    found = RECIPES[recipe]
    tile = replace(found.tile, softmax_blocks=softmax_blocks)
    return replace(found, accumulator=accumulator, tile=tile)


@dataclass(frozen=True)
class Result:
    """What one attention left behind.

    Attributes:
        output, lse: as of ``kernel.run``.
        call: its scratch memory's addresses and sizes.
        scratch: the memory itself, uint8, in the order of ``kernel.Call``.
    """

    output: Tensor
    lse: Tensor | None
    call: kernel.Call
    scratch: list[Tensor]


def attend(
    call: Call,
    recipe: str,
    accumulator: Accumulator = Accumulator.FP32,
    *,
    want_lse: bool = True,
    kernels: Loader | None = None,
    change: Callable[[Variant], Variant] = lambda same: same,
    tile: QueryTile = QUERY_BLOCK,
    splits: int = 1,
    lengths: Lengths | None = None,
    seed: int = 0,
    arch: str = ARCH,
    rotary: Rotary | None = None,
    launches: int | None = None,
    count_bytes: bool = False,
    cache: int = 0,
    multiprocessors: int | None = None,
) -> Result:
    """Run one attention.

    Args:
        kernels: other than ``loader()``.
        change: of what is launched.
        tile, splits: how the products are cut.
        lengths: of a packed batch.
        seed: of the order in which threads and blocks run.
        arch: the one whose kernels run.
        rotary: how Q and K are rotated.
        launches: how many of its kernels to run, the first ones; by default all.
        count_bytes: of global memory, for the log of launches.
        cache: bytes of a cache that is followed then.
        multiprocessors: of the device; by default those of the architecture's usual board.

    Raises:
        DriverError: a check failed.
    """
    here = the_host()
    here.reset()
    here.seed(seed)
    here.library.sage_host_count_bytes(count_bytes)
    here.library.sage_host_follow_cache(ctypes.c_int64(cache))
    here.set_capability(*ARCHS[arch].capability)
    for tensor in (call.query, call.key, call.value, call.sinks):
        if tensor is not None:
            here.allow(tensor, writable=False)
    for tables in () if rotary is None else (rotary.query, rotary.key):
        for table in () if tables is None else (tables.cosine, tables.sine):
            here.allow(table, writable=False)
    if lengths is not None:
        here.allow(lengths.queries, writable=False)
        if lengths.keys is not lengths.queries:
            here.allow(lengths.keys, writable=False)
    scratch: list[Tensor] = []

    def allocate(sizes: Sequence[int], device: torch.device) -> tuple[list[int], object]:
        for size in sizes:
            scratch.append(_aligned(size))
            here.allow(scratch[-1], writable=True)
        return [memory.data_ptr() for memory in scratch], scratch

    output = empty_output(call.query, call.value).fill_(torch.nan)
    lse = torch.full(call.query.shape[:3], torch.nan) if want_lse else None
    for tensor in (output, lse):
        if tensor is not None:
            here.allow(tensor, writable=True)
    target = kernel.Target(arch, 0, 0, kernels or loader(), allocate, multiprocessors)
    dtype = str(call.query.dtype).removeprefix("torch.")
    kernels_of_call = variant(
        arch,
        dtype,
        call.query.shape[3],
        recipe,
        accumulator,
        value_head_dim=call.value.shape[3],
        window=call.semantics.window_left != UNBOUNDED,
        masked=call.attn_mask is not None,
        softcap=kernel.has_softcap(call.semantics),
        rotary_query=None if rotary is None or rotary.query is None else rotary.pairs,
        rotary_key=None if rotary is None or rotary.key is None else rotary.pairs,
        tile=tile,
        varlen=lengths is not None,
    )
    running = kernel.Call(
        target,
        change(kernels_of_call),
        call.query,
        call.key,
        call.value,
        call.semantics,
        output,
        lse,
        call.sinks,
        call.attn_mask,
        rotary,
        splits,
        lengths,
    )
    if running.mask is not None:
        mask = running.mask
        for read in (mask.values, mask.tiles, mask.live, mask.keys, mask.counts):
            here.allow(read, writable=False)
    for step in running.steps()[:launches]:
        step()
    return Result(output, lse, running, scratch)


def _aligned(size: int) -> Tensor:
    """``size`` bytes of garbage with a storage of their own, which torch aligns to 64."""
    return torch.full((size,), GARBAGE, dtype=torch.uint8)
