"""What each GPU architecture has of these kernels: one table for each, with the reasons.

``dispatch.py`` answers from here, and it alone decides, for PyTorch, for ONNX Runtime by way of the
launch table, and for ``sagec kernels explain``. The tile of 128 queries and 64 keys is no choice of
an architecture: its tokens share scales, so it belongs to the recipes (``precision.TILE_MMA``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.kernel import Gate
from sage_compiler.precision import Format


@dataclass(frozen=True, slots=True)
class Offer:
    """A recipe that there are kernels for, and why it stands where it does."""

    recipe: str
    reason: str


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the attention kernel is cut for a class of head_dims, and why.

    Attributes:
        longest: the class: the greater of both head_dims is at most this, and above the class
            before.
        warp_rows: queries of a warp, 16 or 32.
        masked_warp_rows: the same where an explicit mask is read.
        stages: tiles of K and V in shared memory.
    """

    longest: int
    warp_rows: int
    masked_warp_rows: int
    stages: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ring:
    """How the attention kernel of wgmma is cut for a class of head_dims, and why.

    Attributes:
        longest: as of ``Geometry``.
        tiles: of 64 keys that a step takes.
        masked_tiles: the same where an explicit mask is read.
        stages: steps in shared memory.
        mask_places: tiles of a mask in shared memory beside them, with 32 KiB each, for float.
    """

    longest: int
    tiles: int
    masked_tiles: int
    stages: int
    mask_places: int
    reason: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """Where the first recipe of an architecture gains, as it was measured on a GPU of it.

    Attributes:
        file: the result, in benchmarks/results.
        gate: the least sizes at which it was faster than scaled_dot_product_attention,
            quantization included.
    """

    file: str
    gate: Gate


@dataclass(frozen=True, slots=True)
class Arch:
    """What a GPU architecture offers to these kernels.

    Attributes:
        capability: major and minor.
        shared_bytes: shared memory that a block can have.
        multiprocessors: of the usual board, for who asks about a GPU that is not here: those of
            A100, RTX 3090, RTX 4090, H100, B200 and RTX 5090. A launch asks its device.
        offers: recipes in the order of preference; the first is what `auto` means.
        lacking: formats whose products are no single instruction of mma.sync here, and what is
            instead; recipes of them are refused for this reason.
        geometries: by class of head_dims, ascending; the last one is for the greatest.
        rings: the same of the kernel of wgmma, which has INT8 and E4M3; none where there is none.
        measured: the switch of `auto`. None: nobody has measured a gain, and `auto` is exact.
    """

    name: str
    capability: tuple[int, int]
    shared_bytes: int
    multiprocessors: int
    offers: tuple[Offer, ...]
    lacking: Mapping[Format, str]
    geometries: tuple[Geometry, ...]
    rings: tuple[Ring, ...] = ()
    measured: Measurement | None = None

    @property
    def overlaps_launches(self) -> bool:
        """Whether a kernel can wait itself for the launches before it, as from sm_90 on."""
        return self.capability >= (9, 0)

    @property
    def recipes(self) -> tuple[str, ...]:
        """Those that there are kernels for, the preferred one first."""
        return tuple(offer.recipe for offer in self.offers)

    def geometry(self, longest: int) -> Geometry:
        """That of the class of a head_dim, which is at most the last of ``spec.HEAD_DIMS``."""
        return next(each for each in self.geometries if longest <= each.longest)

    def uses_wgmma(self, recipe: str) -> bool:
        """Whether the products of a recipe are those of warpgroups."""
        return bool(self.rings) and recipe == _INT8_FP8.recipe

    def ring(self, longest: int) -> Ring:
        """As ``geometry``, of an architecture with rings."""
        return next(each for each in self.rings if longest <= each.longest)


# --- recipes --------------------------------------------------------------------------------

# How accurate they are: SageAttention2 (arXiv 2411.10958), where INT8 with E4M3 takes Llama 3.1's
# perplexity from 6.013 to 6.019, and INT4 to 6.256. Rates: docs/precision.md.
_INT8_FP16: Final = Offer(
    "int8_fp16", "INT8 Q K^T at twice the rate of FP16, next to lossless, and FP16 P V"
)
_INT4_FP16: Final = Offer(
    "int4_fp16",
    "INT4 Q K^T at twice the rate of INT8, with several times its error: for layers that a policy "
    "found to bear it",
)
_INT8_FP8: Final = Offer(
    "int8_fp8", "both products in 8 bits, next to lossless: E4M3 costs P V hardly more than FP16"
)
_INT4_FP8: Final = Offer(
    "int4_fp8",
    "the quickest, by INT4 Q K^T at twice the rate of INT8, with several times its error: for "
    "layers that a policy found to bear it",
)
_INT8_FP16_AFTER_FP8: Final = Offer(
    "int8_fp16", "FP16 P V takes twice the time of FP8: for layers that do not bear E4M3"
)
_INT4_FP16_AFTER_FP8: Final = Offer(
    "int4_fp16", "quicker than int8_fp16, slower and less accurate than int8_fp8"
)

_INT8_FP8_BY_WGMMA: Final = Offer(
    "int8_fp8", "both products in 8 bits, by wgmma, next to lossless: twice the rate of FP16"
)
_INT8_FP16_AFTER_WGMMA: Final = Offer(
    "int8_fp16", "by mma.sync, which has less than the full rate: for layers that do not bear E4M3"
)

_FP8_IS_YOUNGER: Final = "tensor cores multiply FP8 from sm_89 on"
_FP8_IS_NOT_IN_PTX: Final = (
    "this GPU has no kernels of its own but PTX for all from compute capability 8.0 on, which has "
    "no FP8 products"
)
_INT4_IS_NOT_IN_PTX: Final = (
    "this GPU has no kernels of its own but PTX for all from compute capability 8.0 on, and INT4 "
    "products are emulated on those from 9.0 on, slower than INT8"
)
_FP8_IS_CONVERTED: Final = (
    "mma.sync converts E4M3 to half here, which is slower than FP16 itself, and no kernel uses "
    "tcgen05"
)
_INT4_IS_EMULATED: Final = (
    "INT4 products are emulated from sm_90 on, slower than INT8 and less accurate"
)

# --- geometries -----------------------------------------------------------------------------

# Registers and spills are those of the cubins in bfloat16 without window and softcap, and without
# a mask where none is named (NVRTC 13.0). A multiprocessor has 65536 registers and at least 100 KiB
# of shared memory for all of its blocks: two blocks of 4 warps have up to 255 registers a thread,
# two of 8 warps 128. Nothing was timed.
_UP_TO_SM_89: Final = (
    Geometry(
        longest=64,
        warp_rows=32,
        masked_warp_rows=16,
        stages=3,
        reason="warps of 32 rows read K and V half as often as of 16, and take 147 to 210 "
        "registers without spills, so that two blocks of 4 warps fit, with 45 KiB of shared memory "
        "each at most; where a mask is read, 16 rows take 118 to 128 registers, and two blocks "
        "of 8 warps fit, where 32 would take 190 to 203",
    ),
    Geometry(
        longest=128,
        warp_rows=16,
        masked_warp_rows=16,
        stages=2,
        reason="16 rows take 130 to 188 registers, one block of 8 warps; 32 would take all 255 and "
        "spill up to 44 bytes with INT4 or FP8. A third stage would fit into shared memory beside "
        "the one block: to be tried where it can be timed",
    ),
    Geometry(
        longest=256,
        warp_rows=16,
        masked_warp_rows=16,
        stages=2,
        reason="Q moves to registers and the tiles to its place, 96 KiB for two of them with FP16; "
        "195 to 255 registers, with FP8 spills of up to 48 bytes at 192 and 472 at 256",
    ),
)
_FROM_SM_90: Final = (
    Geometry(
        longest=64,
        warp_rows=32,
        masked_warp_rows=16,
        stages=3,
        reason="warps of 32 rows read K and V half as often as of 16, and take 155 to 214 "
        "registers without spills, so that two blocks of 4 warps fit, with 45 KiB of shared memory "
        "each at most; where a mask is read, 16 rows take 135 to 144 registers, one block of 8 "
        "warps, and 32 would take 204 to 221 without spills: to be tried where it can be timed",
    ),
    Geometry(
        longest=128,
        warp_rows=16,
        masked_warp_rows=16,
        stages=2,
        reason="16 rows take 142 to 208 registers, one block of 8 warps; 32 would take all 255 and "
        "spill 40 to 56 bytes, but none on sm_90a. A third stage would fit into shared memory "
        "beside the one block: to be tried where it can be timed",
    ),
    Geometry(
        longest=256,
        warp_rows=16,
        masked_warp_rows=16,
        stages=2,
        reason="Q moves to registers and the tiles to its place, 96 KiB for two of them with FP16; "
        "206 to 255 registers, with FP8 spills of up to 100 bytes at 192 and 24 at 256",
    ),
)

# Of the kernel of wgmma: two warpgroups of 64 queries with up to 240 registers a thread, and one
# block on a multiprocessor, which has 227 KiB for it. Nothing was timed.
_RINGS: Final = (
    Ring(
        longest=64,
        tiles=2,
        masked_tiles=2,
        stages=4,
        mask_places=4,
        reason="products of 128 keys read Q half as often as of 64; four stages take 73 KiB, and "
        "beside them there is room for the masks of two steps",
    ),
    Ring(
        longest=128,
        tiles=2,
        masked_tiles=1,
        stages=4,
        mask_places=4,
        reason="products of 128 keys read Q half as often as of 64, and scores, P, P V and output "
        "take 208 registers, of 240; with a mask they would spill up to 252 "
        "bytes, so there a step is 64 keys; four stages take 145 KiB at most, but 64 with a mask, "
        "which leaves room for four tiles of it",
    ),
    Ring(
        longest=256,
        tiles=1,
        masked_tiles=1,
        stages=4,
        mask_places=1,
        reason="the output takes up to 128 registers, so scores are of 64 keys, and P V is made of "
        "16 to 96 channels at a time; four stages take 128 KiB at most and Q 64, which leaves room "
        "for one tile of a mask: it is read as soon as there are scores, and then the next comes",
    ),
)

# --- architectures --------------------------------------------------------------------------

ARCHS: Final[Mapping[str, Arch]] = MappingProxyType(
    {
        arch.name: arch
        for arch in (
            Arch(
                "sm_80",
                capability=(8, 0),
                shared_bytes=163 << 10,
                multiprocessors=108,
                offers=(_INT8_FP16, _INT4_FP16),
                lacking={Format.FP8: _FP8_IS_YOUNGER},
                geometries=_UP_TO_SM_89,
            ),
            Arch(
                "sm_86",
                capability=(8, 6),
                shared_bytes=99 << 10,
                multiprocessors=82,
                offers=(_INT8_FP16, _INT4_FP16),
                lacking={Format.FP8: _FP8_IS_YOUNGER},
                geometries=_UP_TO_SM_89,
            ),
            Arch(
                "sm_89",
                capability=(8, 9),
                shared_bytes=99 << 10,
                multiprocessors=128,
                offers=(_INT8_FP8, _INT4_FP8, _INT8_FP16_AFTER_FP8, _INT4_FP16_AFTER_FP8),
                lacking={},
                geometries=_UP_TO_SM_89,
            ),
            Arch(
                "sm_90a",
                capability=(9, 0),
                shared_bytes=227 << 10,
                multiprocessors=132,
                offers=(_INT8_FP8_BY_WGMMA, _INT8_FP16_AFTER_WGMMA),
                lacking={Format.INT4: _INT4_IS_EMULATED},
                geometries=_FROM_SM_90,
                rings=_RINGS,
            ),
            Arch(
                "sm_100a",
                capability=(10, 0),
                shared_bytes=227 << 10,
                multiprocessors=148,
                offers=(_INT8_FP16,),
                lacking={Format.INT4: _INT4_IS_EMULATED, Format.FP8: _FP8_IS_CONVERTED},
                geometries=_FROM_SM_90,
            ),
            Arch(
                "sm_120a",
                capability=(12, 0),
                shared_bytes=99 << 10,
                multiprocessors=170,
                offers=(_INT8_FP8, _INT8_FP16_AFTER_FP8),
                lacking={Format.INT4: _INT4_IS_EMULATED},
                geometries=_FROM_SM_90,
            ),
        )
    }
)


PORTABLE: Final = Arch(
    "compute_80",
    capability=(8, 0),
    shared_bytes=99 << 10,
    multiprocessors=48,
    offers=(_INT8_FP16,),
    lacking={Format.INT4: _INT4_IS_NOT_IN_PTX, Format.FP8: _FP8_IS_NOT_IN_PTX},
    geometries=_UP_TO_SM_89,
)
"""PTX, which the driver compiles for the GPU that is there: for all that have a compute capability
above this one and no entry in ``ARCHS``, such as 8.7, 10.3, 11.0 and 12.1.

int8_fp16 alone, whose products all of them have: INT8 and FP16 with mma.sync. The kernels are those
of sm_80, with at most 99 KiB of shared memory, which all of them have too. The multiprocessors are
those of GB10.
"""


def named(name: str) -> Arch:
    """The architecture of a spec: one of ``ARCHS``, or ``PORTABLE``."""
    return PORTABLE if name == PORTABLE.name else ARCHS[name]


def arch_of(capability: tuple[int, int]) -> Arch:
    """The architecture whose kernels a device of this compute capability runs.

    Raises:
        KernelUnavailableError: there is none.
    """
    for arch in ARCHS.values():
        if arch.capability == capability:
            return arch
    if capability > PORTABLE.capability:
        return PORTABLE
    major, minor = capability
    known = ", ".join(f"{a}.{b}" for a, b in (arch.capability for arch in ARCHS.values()))
    raise KernelUnavailableError(
        f"compute capability {major}.{minor}: there are kernels for {known} and others from 8.0 "
        "on; use precision='exact' on this device"
    )
