"""The last launches of an attention: the products of quantized operands, and their merging.

They know nothing of who quantized Q, K and V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log2, nan
from typing import Final, Protocol

from torch import Tensor

from sage_compiler.kernels.cuda import params
from sage_compiler.kernels.cuda.masks import NO_FLAGS, NO_MASK, Mask, flags
from sage_compiler.kernels.cuda.sizes import Reach, Sizes
from sage_compiler.kernels.cuda.spec import AttendSpec, HopperAttendSpec, KernelSpec
from sage_compiler.kernels.cuda.tensor_map import TensorMap
from sage_compiler.kernels.cuda.variants import CacheVariant, Variant
from sage_compiler.kernels.quantize import E4M3_MAX, FP16_ACCUMULATOR_MAX, FP16_MAX, P_FACTOR
from sage_compiler.precision import Accumulator, Format
from sage_compiler.semantics import DeadRows, Semantics

_LEAST_SOFTCAP: Final = 1e-30  # what is less becomes it


class Launcher(Protocol):
    """Where kernels are launched."""

    def launch(
        self, spec: KernelSpec, blocks: int, packed: bytes, *, dependent: bool = False
    ) -> None:
        """Start one kernel, ``dependent`` on the one before it in the stream."""

    def encode(self, tensor: TensorMap) -> bytes | None:
        """What the kernels take of a tensor whose boxes they copy; None where they cannot."""


@dataclass(frozen=True, slots=True)
class Operands:
    """Addresses of what the quantizers wrote, as ``struct AttendParams`` has it; 0: there is none.

    Attributes:
        tiles: (B, Hkv, head_tiles).
        head_tiles: those of a cache; else as many as key blocks of ``Sizes``.
        value_scales: of kernels whose tiles do not have them.
        part_outputs, part_sums: memory for what parts of the keys make of each query, of kernels
            that split keys; nobody writes it before.
        taken: the counter of a persistent grid, which is 0 by then.
    """

    query_codes: int
    query_scales: int
    tiles: int
    value_scales: int
    delta: int
    row_term: int
    part_outputs: int = 0
    part_sums: int = 0
    taken: int = 0
    head_tiles: int | None = None


@dataclass(frozen=True, slots=True)
class Attending:
    """The launches of ``attend`` and ``merge`` of a variant, directly after that of a quantizer.

    Attributes:
        multiprocessors: of the device, of which a persistent grid has one block each.
        output: (B, H, Lq, Dv), the last stride 1.
        lse: float32 (B, H, Lq), dense, if it is wanted.
        sinks: float32 (H,), dense, if there are any.
        splits: parts of the keys; 1 of kernels that do not split them.
    """

    target: Launcher
    kernels: Variant | CacheVariant
    sizes: Sizes
    reach: Reach
    semantics: Semantics
    operands: Operands
    multiprocessors: int
    output: Tensor
    lse: Tensor | None
    sinks: Tensor | None = None
    mask: Mask | None = None
    splits: int = 1

    def steps(self) -> tuple[Callable[[], None], ...]:
        """Each launches one kernel."""
        return (self.attend,) if self.kernels.merge is None else (self.attend, self.merge)

    def attend(self) -> None:
        """Launch the products; the output is there, or the parts that ``merge`` joins."""
        sizes, operands, mask = self.sizes, self.operands, self.mask
        tile = self.kernels.attend.query_tile
        tasks = sizes.tiles(tile) * self.splits
        packed = params.ATTEND.pack(
            operands.query_codes,
            operands.query_scales,
            operands.tiles,
            operands.value_scales,
            operands.delta,
            operands.row_term,
            *self._results(),
            *(NO_MASK if mask is None else mask.packed()),
            *(NO_FLAGS if mask is None else flags(mask.tiles)),
            *(NO_FLAGS if mask is None else flags(mask.live)),
            operands.part_outputs,
            operands.part_sums,
            operands.taken,
            *self.output.stride()[:3],
            sizes.query_length,  # of the LSE, from head to head
            sizes.heads,
            sizes.group,
            sizes.query_length,
            sizes.key_length,
            sizes.query_blocks,
            sizes.key_blocks,
            sizes.row_blocks(tile),
            self.splits,
            self.reach.lower,
            self.reach.upper,
            self.output.shape[3],
            sizes.key_blocks if operands.head_tiles is None else operands.head_tiles,
            tasks,
            sizes.heads_at_once(self.kernels.attend),
            max(self.semantics.softcap or 0.0, _LEAST_SOFTCAP),
            nan if self.semantics.dead_rows is DeadRows.NAN else 0.0,
        )
        packed += self._mask_map()
        blocks = min(tasks, self.multiprocessors) if self.kernels.attend.persistent else tasks
        self.target.launch(self.kernels.attend, blocks, packed, dependent=True)

    def merge(self) -> None:
        """Launch what joins the parts."""
        sizes, operands, attend = self.sizes, self.operands, self.kernels.attend
        merge = self.kernels.merge
        assert merge is not None
        # Under a softcap the scores have the row term already.
        row_term = 0 if attend.softcap else operands.row_term
        packed = params.MERGE.pack(
            operands.part_outputs,
            operands.part_sums,
            operands.value_scales,
            row_term,
            *self._results(),
            *self.output.stride()[:3],
            sizes.heads,
            sizes.group,
            sizes.query_length,
            sizes.rows,
            self.splits,
            self.output.shape[3],
            self.semantics.dead_rows is DeadRows.NAN,
            log2(P_FACTOR[attend.pv]),
            _value_limit(attend),
        )
        self.target.launch(merge, -(-sizes.rows // merge.rows), packed, dependent=True)

    def _mask_map(self) -> bytes:
        """What a kernel that copies tiles of the mask takes besides; of others nothing."""
        attend = self.kernels.attend
        if not isinstance(attend, HopperAttendSpec) or attend.mask_places == 0:
            return b""
        assert self.mask is not None
        boxes = self.mask.boxes()
        encoded = None if boxes is None else self.target.encode(boxes)
        if boxes is None or encoded is None:
            return params.MASK_MAP.pack(0, b"")
        return params.MASK_MAP.pack(boxes.box[2], encoded)

    def _results(self) -> tuple[int, int, int]:
        """Sinks, output and LSE."""
        return (
            0 if self.sinks is None else self.sinks.data_ptr(),
            self.output.data_ptr(),
            0 if self.lse is None else self.lse.data_ptr(),
        )


def _value_limit(attend: AttendSpec | HopperAttendSpec) -> float:
    """The largest magnitude of V as it is summed up: quantized, or with the scales of its tiles."""
    if attend.pv is not Format.FP8:
        return inf
    if attend.tile_scales:
        return FP16_MAX if attend.dtype == "float16" else inf
    return FP16_ACCUMULATOR_MAX if attend.accumulator is Accumulator.FP16 else E4M3_MAX
