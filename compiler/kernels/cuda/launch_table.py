"""The launch table of a kernel pack: what a host without Python needs to know of its kernels.

Which kernels serve an attention, and how they are laid out, is decided by ``variants`` and ``spec``
alone. The table holds their answers, so that a library in C++ only looks them up. It is text, one
record a line, words separated by one space:

    sage-launches FORMAT TEMPLATES
    arch NAME MAJOR MINOR RECIPES ROWS KEYS COUNTS SINKS
    kernel ARCH SYMBOL THREADS SHARED_BYTES PARAMS_BYTES IMAGE_BYTES SHA256
    attention ARCH DTYPE RECIPE LEAST MOST VALUE_LEAST VALUE_MOST WINDOW MASKED SOFTCAP
        QUANTIZE ATTEND SMOOTHS SCALES COPIES_MASK PERSISTENT DEPENDENT QUERY_TASKS SLICES
        PADDED PADDED_VALUE QUERY_BYTES VALUE_OFFSET SCALES_OFFSET TILE_BYTES  (all in one line)
    end SHA256

TEMPLATES is ``templates_digest()`` of the templates that the kernels are made of; a library reads
the packs of those that it was built beside.

An ``arch`` comes before what names it. RECIPES are separated by commas, the device's default first.
ROWS to SINKS, QUANTIZE and ATTEND are kernels, by their position among the ``kernel`` lines from 0
on; -1 is one that the pack does not have. An ``attention`` serves every head_dim from LEAST to
MOST, of V from VALUE_LEAST to VALUE_MOST; WINDOW to DEPENDENT are 0 or 1, as of ``AttendSpec``,
whether Q is smoothed, whether V has scales, and so statistics, whether ATTEND can copy tiles of its
mask, and takes ``MaskedAttendParams`` for it, whether it has at most one block for each
multiprocessor, and whether it may be launched dependent on QUANTIZE. QUERY_TASKS are those of
``QuantizeSpec`` for a query block. PADDED are the channels of quantized operands, QUERY_BYTES the
codes of a query block, the others are ``KeyValueTile``. The SHA256 in the last line is of all lines
before it, that of a kernel of its image, both in hexadecimal.

A kernel's image is ``ARCH/SYMBOL.cubin`` beside the table. FORMAT is raised whenever a kernel means
something else by its parameters, or is launched otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from sage_compiler.kernels.cuda.arch import ARCHS, Arch
from sage_compiler.kernels.cuda.manifest import Entry, digest
from sage_compiler.kernels.cuda.preparation import preparation_specs
from sage_compiler.kernels.cuda.render import templates_digest
from sage_compiler.kernels.cuda.spec import (
    DTYPES,
    HEAD_DIMS,
    HopperAttendSpec,
    KernelSpec,
    padded_dim,
)
from sage_compiler.kernels.cuda.variants import Variant, variant
from sage_compiler.precision import Format

NAME: Final = "launches.txt"
FORMAT: Final = 8

_ABSENT: Final = -1
_Word = str | int


def launch_table(specs: Sequence[KernelSpec], entries: Sequence[Entry]) -> str:
    """The table of a pack with these kernels, each with its entry."""
    # Hosts load cubins alone: PTX takes a device for which the table has no architecture.
    listed = [each for each in zip(specs, entries, strict=True) if each[0].arch in ARCHS]
    at = {spec: position for position, (spec, _) in enumerate(listed)}
    used = [arch for arch in ARCHS.values() if any(spec.arch == arch.name for spec in specs)]
    records: list[Sequence[_Word]] = [
        ("sage-launches", FORMAT, templates_digest()),
        *(_arch(arch, at) for arch in used),
        *(_kernel(spec, entry) for spec, entry in listed),
        *(record for arch in used for record in _attentions(arch, at)),
    ]
    return signed("".join(" ".join(map(str, record)) + "\n" for record in records))


def signed(records: str) -> str:
    """The lines before the last one, and the last one."""
    return f"{records}end {digest(records.encode())}\n"


def _arch(arch: Arch, at: Mapping[KernelSpec, int]) -> Sequence[_Word]:
    preparing = (at.get(spec, _ABSENT) for spec in preparation_specs(arch.name))
    return ("arch", arch.name, *arch.capability, ",".join(arch.recipes), *preparing)


def _kernel(spec: KernelSpec, entry: Entry) -> Sequence[_Word]:
    geometry = (spec.threads, spec.shared_bytes, spec.params_bytes)
    return ("kernel", spec.arch, spec.symbol, *geometry, entry.size, entry.sha256)


def _attentions(arch: Arch, at: Mapping[KernelSpec, int]) -> Iterator[Sequence[_Word]]:
    """A record for every attention whose kernels are all there."""
    switches = (False, True)
    for dtype, recipe, most, value_most, window, masked, softcap in itertools.product(
        DTYPES, arch.recipes, HEAD_DIMS, HEAD_DIMS, switches, switches, switches
    ):
        kernels = variant(
            arch.name,
            dtype,
            most,
            recipe,
            value_head_dim=value_most,
            window=window,
            masked=masked,
            softcap=softcap,
        )
        if all(spec in at for spec in kernels.specs()):
            yield (
                *("attention", arch.name, dtype, recipe),
                *(_least(most), most, _least(value_most), value_most),
                *(int(window), int(masked), int(softcap)),
                *(at[spec] for spec in kernels.specs()),
                *_layout(kernels, arch),
            )


def _least(most: int) -> int:
    """The least head_dim that is served by the kernels for ``most``."""
    below = HEAD_DIMS.index(most) - 1
    return HEAD_DIMS[below] + 1 if below >= 0 else 1


def _layout(kernels: Variant, arch: Arch) -> tuple[int, ...]:
    attend, quantize = kernels.attend, kernels.quantize
    assert quantize is not None
    tile = attend.tile
    return (
        int(attend.qk is Format.INT4),
        int(quantize.scales_value),
        int(isinstance(attend, HopperAttendSpec) and attend.mask_places > 0),
        int(attend.persistent),
        int(arch.overlaps_launches and attend.awaits_prerequisites),
        quantize.tasks_of_query_block,
        quantize.slices,
        padded_dim(attend.head_dim),
        padded_dim(attend.value_head_dim),
        attend.query_block_bytes,
        tile.value_offset,
        tile.scales_offset,
        tile.bytes,
    )
