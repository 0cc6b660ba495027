"""The CUDA kernels as the registry knows them: attention on tensors of a GPU.

An attention is two launches on the caller's stream: Q, K and V quantized, then the fused attention;
and one more where that splits the keys. Of a packed batch statistics of K and V, then Q, K and V
are launches of their own. Nothing is copied: inputs are read with their strides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import log
from typing import Final, Literal

import torch
from torch import Tensor

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import dispatch, params
from sage_compiler.kernels.cuda.arch import ARCHS, arch_of, named
from sage_compiler.kernels.cuda.attending import Attending, Operands
from sage_compiler.kernels.cuda.driver import Driver
from sage_compiler.kernels.cuda.images import default_images
from sage_compiler.kernels.cuda.loader import Loader, default_loader
from sage_compiler.kernels.cuda.masks import KINDS, NO_FLAGS, Mask, flags
from sage_compiler.kernels.cuda.sizes import ALIGNMENT, Reach, Sizes, arrange
from sage_compiler.kernels.cuda.spec import KernelSpec, KeyValueTile
from sage_compiler.kernels.cuda.tensor_map import TensorMap
from sage_compiler.kernels.cuda.variants import CacheVariant, Variant
from sage_compiler.kernels.cuda.varlen import Lengths
from sage_compiler.kernels.kernel import Gate, Kernel, Problem
from sage_compiler.kernels.layout import empty_output
from sage_compiler.kernels.rotary import Rotary
from sage_compiler.packed import join, sequences
from sage_compiler.precision import RECIPES, TILE_MMA, Accumulator, Format
from sage_compiler.semantics import UNBOUNDED, Semantics

LOG2_E: Final = 1.0 / log(2.0)
_GREATEST_SOFTCAP: Final = 1e30  # what is more does nothing
_LARGE_DELTA: Final = 1 << 30  # bytes of scratch memory that nobody may need

Allocate = Callable[[Sequence[int], torch.device], tuple[list[int], object]]
"""Sizes in bytes to addresses, aligned to 256, and what keeps them alive."""


def allocate(sizes: Sequence[int], device: torch.device) -> tuple[list[int], object]:
    """Scratch memory on a device, in one piece."""
    offsets, size = arrange(sizes)
    arena = torch.empty(size, dtype=torch.uint8, device=device)
    start = -(-arena.data_ptr() // ALIGNMENT) * ALIGNMENT
    return [start + offset for offset in offsets], arena


def _everything(kernels: Variant | CacheVariant) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Target:
    """Where the kernels run.

    Attributes:
        arch: a key of ``arch.ARCHS``, or the name of ``arch.PORTABLE``.
        device: the index of the device.
        stream: a CUstream of it, as torch gives it.
        loader: where the kernels come from.
        allocate: where scratch memory comes from.
        multiprocessors: of the device; None: those of the architecture's usual board.
        sequences: what kernels of a packed batch take behind their own parameters, ``varlen.py``.
        obtainable: whether kernels are in a pack or can be compiled. Those of ``dispatch.decide``
            without more ado are; where the special ones of a call are not, it does without.
    """

    arch: str
    device: int
    stream: int
    loader: Loader
    allocate: Allocate = allocate
    multiprocessors: int | None = None
    sequences: bytes = b""
    obtainable: Callable[[Variant | CacheVariant], bool] = _everything

    @property
    def processors(self) -> int:
        """How many multiprocessors there are to fill."""
        return self.multiprocessors or named(self.arch).multiprocessors

    def launch(
        self, spec: KernelSpec, blocks: int, packed: bytes, *, dependent: bool = False
    ) -> None:
        """Start one kernel.

        Args:
            dependent: it comes directly after another kernel of the same call, so that it may begin
                before that has ended, if it is one that waits itself.
        """
        overlaps = named(self.arch).overlaps_launches and spec.awaits_prerequisites
        self.loader.loaded(spec, self.device, self.stream)(
            blocks, self.stream, packed + self.sequences, dependent=dependent and overlaps
        )

    def encode(self, tensor: TensorMap) -> bytes | None:
        """As ``Driver.encode``."""
        return self.loader.driver.encode(tensor)

    def clear(self, address: int, size: int) -> None:
        """Set scratch memory to zero."""
        self.loader.driver.clear(address, size, self.device, self.stream)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    *,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    want_lse: bool,
    recipe: str,
    rotary: Rotary | None = None,
    lengths: Lengths | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.attention``, on the current stream of the tensors' device.

    Args:
        query, key, value: float16, bfloat16 or float32, any strides.
        attn_mask: any strides; read as it lies.
        want_lse: without it the LSE is empty.
        recipe: one of those of the device's ``arch.Arch``.
        rotary: how query and key are rotated, in float32, as they are read.
        lengths: of a packed batch, whose tensors are (1, heads, total, channels).

    Raises:
        KernelUnavailableError: ``dispatch.decide`` has none for the call; or the kernels can be
            neither found nor compiled here, or would have to be loaded while a CUDA graph is
            captured.
    """
    with on_device(query.device) as target:
        return run(
            target,
            query,
            key,
            value,
            semantics,
            want_lse=want_lse,
            recipe=recipe,
            attn_mask=attn_mask,
            sinks=sinks,
            rotary=rotary,
            lengths=lengths,
        )


@contextmanager
def on_device(device: torch.device) -> Iterator[Target]:
    """The current stream of a device, which is the current device meanwhile.

    Raises:
        KernelUnavailableError: there are no kernels for it, or no driver.
    """
    with torch.cuda.device(device):
        index = device.index or 0
        loader = default_loader()
        yield Target(
            _arch(index),
            index,
            torch.cuda.current_stream(device).cuda_stream,
            loader,
            multiprocessors=_multiprocessors(loader.driver, index),
            obtainable=lambda kernels: _missing(kernels) is None,
        )


def attention_of_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    sinks: Tensor | None,
    want_lse: bool,
    recipe: str,
) -> tuple[Tensor, Tensor]:
    """As ``attention``, of a packed batch: see ``kernel.RunPacked``.

    Offsets on the device are not read by the host, so that a CUDA graph can be captured. There is
    two exceptions: where Q is smoothed, the kernels keep a float for each pair of a query block and
    a key of one sequence, and where that would be more than 1 GiB if one sequence had all keys,
    the longest one is looked for; and where there are no kernels for packed batches, each sequence
    is a call of its own.

    Raises:
        InvalidAttentionError: offsets that the host reads are wrong.
        KernelUnavailableError: as ``attention``.
    """
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    delta = heads * (queries // TILE_MMA.q_block + cu_seqlens_q.shape[0]) * keys * 4
    read = RECIPES[recipe].qk is Format.INT4 and delta > _LARGE_DELTA
    lengths = Lengths.of(cu_seqlens_q, cu_seqlens_k, query, key, read=read)
    with on_device(query.device) as target:
        if has_packed_kernels(target, query, value, semantics, recipe):
            return run(
                target,
                query,
                key,
                value,
                semantics,
                want_lse=want_lse,
                recipe=recipe,
                sinks=sinks,
                lengths=lengths,
            )
        if not cu_seqlens_q.is_cpu and target.loader.driver.is_capturing(target.stream):
            raise KernelUnavailableError(
                f"{recipe} has no kernel for a packed batch on {target.arch} here, and the host "
                "cannot read where its sequences begin while a CUDA graph is captured; use another "
                "recipe, or cu_seqlens on the CPU"
            )
        parts = [
            run(target, *part, semantics, want_lse=want_lse, recipe=recipe, sinks=sinks)
            for part in sequences(query, key, value, cu_seqlens_q, cu_seqlens_k)
        ]
        return join(parts, query, value)


def has_packed_kernels(
    target: Target, query: Tensor, value: Tensor, semantics: Semantics, recipe: str
) -> bool:
    """Whether a packed batch need not be taken apart, which takes reading its offsets."""
    kernels = dispatch.decide(
        target.arch,
        recipe,
        _dtype_name(query.dtype),
        query.shape[3],
        value.shape[3],
        window=semantics.window_left != UNBOUNDED,
        softcap=has_softcap(semantics),
        varlen=True,
    )
    return isinstance(kernels, Variant) and target.obtainable(kernels)


def run(
    target: Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    *,
    want_lse: bool,
    recipe: str,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    lengths: Lengths | None = None,
    accumulator: Accumulator = Accumulator.FP32,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``attention``, on a target; ``accumulator`` as of ``dispatch.decide``."""
    output = empty_output(query, value)
    lse = query.new_empty(query.shape[:3] if want_lse else 0, dtype=torch.float32)
    nothing = lengths is not None and lengths.queries.shape[0] == 1  # no sequence
    if nothing or min(*query.shape[:3], key.shape[2]) == 0:  # no query, or no key to see
        lse.fill_(-torch.inf)
        if sinks is not None and want_lse:
            lse.copy_(sinks[:, None])
        return output.zero_(), lse
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length = key.shape[1:3]
    planned = dispatch.plan(
        target.arch,
        recipe,
        _dtype_name(query.dtype),
        head_dim,
        value.shape[3],
        Sizes.of(batch, heads, kv_heads, query_length, key_length),
        Reach.of(semantics, query_length, key_length),
        target.multiprocessors,
        obtainable=target.obtainable,
        window=semantics.window_left != UNBOUNDED,
        masked=attn_mask is not None,
        softcap=has_softcap(semantics),
        varlen=lengths is not None,
        accumulator=accumulator,
        rotary_query=None if rotary is None or rotary.query is None else rotary.pairs,
        rotary_key=None if rotary is None or rotary.key is None else rotary.pairs,
    )
    if isinstance(planned, str):
        raise KernelUnavailableError(f"{planned}; use precision='exact'")
    if rotary is not None and not target.obtainable(planned.kernels):
        query, key = rotary.rotated(query, key)  # by torch, as for kernels that cannot
        return run(
            target,
            query,
            key,
            value,
            semantics,
            want_lse=want_lse,
            recipe=recipe,
            attn_mask=attn_mask,
            sinks=sinks,
            lengths=lengths,
            accumulator=accumulator,
        )
    wanted = lse if want_lse else None
    Call(
        target,
        planned.kernels,
        query,
        key,
        value,
        semantics,
        output,
        wanted,
        sinks,
        attn_mask,
        rotary,
        planned.cut.splits,
        lengths,
    ).run()
    return output, lse


def has_softcap(semantics: Semantics) -> bool:
    """Whether there is a softcap that does something."""
    return semantics.softcap is not None and semantics.softcap < _GREATEST_SOFTCAP


class Call:
    """One attention: its sizes, its scratch memory, its launches."""

    def __init__(
        self,
        target: Target,
        kernels: Variant,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        output: Tensor,
        lse: Tensor | None,
        sinks: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rotary: Rotary | None = None,
        splits: int = 1,
        lengths: Lengths | None = None,
    ) -> None:
        """Look at the sizes, and take the scratch memory; no length is zero.

        Args:
            output: (B, H, Lq, Dv), the last stride 1.
            lse: float32 (B, H, Lq), dense, if it is wanted.
            sinks: (H,), if there are any.
            attn_mask: bool or float, broadcastable to (B, H, Lq, Lk), if there is one.
            rotary: what ``kernels`` rotate by, if they do.
            splits: parts of the keys, of kernels that split them; else 1.
            lengths: of a packed batch; then ``kernels`` are for one, and what depends on lengths
                here they find themselves, for each sequence.

        Raises:
            InvalidAttentionError: a length that positions in the kernels do not hold.
        """
        self.target, self.kernels = target, kernels
        self.query, self.key, self.value = query, key, value
        self.output, self.lse = output, lse
        self.sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
        self.semantics = semantics
        self.rotary = rotary
        batch, heads, query_length, head_dim = query.shape
        self.splits = splits
        self._is_packed = lengths is not None
        if lengths is None:
            sizes = Sizes.of(batch, heads, key.shape[1], query_length, key.shape[2])
        else:
            sizes = lengths.sizes(heads, key.shape[1], query_length, key.shape[2])
            self.target = replace(target, sequences=lengths.packed(sizes, semantics))
        self.sizes = sizes
        (
            self.batch,
            self.heads,
            self.kv_heads,
            self.query_length,
            self.key_length,
            self.query_blocks,
            self.key_blocks,
            self.chunks,
            self.chunk_tokens,
            _,
            _,
        ) = sizes
        self.group = sizes.group
        self.scale = semantics.scale_for(head_dim)

        self.mask = None
        if attn_mask is not None:
            self.mask = Mask.of(
                attn_mask,
                semantics.band(self.query_length, self.key_length),
                self.batch,
                self.kv_heads,
                self.group,
                self.query_length,
                self.key_length,
            )
        self.reach = Reach.of(semantics, self.query_length, self.key_length)
        (
            self.lower,
            self.upper,
            self.first_key,
            self.end_key,
            self.first_live,
            self.end_live,
        ) = self.reach
        self._blocks = sizes.blocks(kernels, splits, target.processors)

        self.tile: KeyValueTile = kernels.attend.tile
        row_term = lse is not None or sinks is not None or kernels.attend.softcap
        parts = sizes.scratch(kernels, row_term=row_term, splits=splits)
        addresses, self._scratch = target.allocate(parts, query.device)
        present = [address if size else 0 for address, size in zip(addresses, parts, strict=True)]
        (
            self.key_sums,
            self.value_amax,
            self.query_codes,
            self.query_scales,
            self.means,
            self.row_term,
            self.tiles,
            self.value_scales,
            self.delta,
            self.part_outputs,
            self.part_sums,
            self.counters,
            self.key_totals,
            self.value_totals,
            self.taken,
        ) = present
        self._counter_bytes, *_, self._taken_bytes = parts[-4:]

    def run(self) -> None:
        """Start the kernels."""
        for step in self.steps():
            step()

    def steps(self) -> tuple[Callable[[], None], ...]:
        """Each launches one kernel, in the order of what they need: K's mean, then Q's."""
        if self.kernels.quantize is not None:
            return (self._quantize, *self._attending().steps())
        quantizing = (self._statistics, self._query, self._key, self._value)
        return (*quantizing, *self._attending().steps())

    def _quantize(self) -> None:
        quantize = self.kernels.quantize
        assert quantize is not None
        packed = self._statistics_params() + self._query_params(self.key_totals, 1)
        packed += self._key_params(self.key_totals, 1) + self._value_params(self.value_totals, 1)
        packed += params.SCHEDULE.pack(
            self.counters,
            self.key_totals,
            self.value_totals,
            self.batch * self.kv_heads,
            self.sizes.ahead(self.kernels, self.target.processors, row_term=self.row_term != 0),
        )
        self.target.clear(self.counters, self._counter_bytes)
        self.target.launch(quantize, self._blocks[0], packed)

    def _statistics(self) -> None:
        if self._is_packed and self.taken:  # no sequence's Q is sure to be quantized
            self.target.clear(self.taken, self._taken_bytes)
        self.target.launch(self.kernels.statistics, self._blocks[0], self._statistics_params())

    def _query(self) -> None:
        packed = self._query_params(self.key_sums, self.chunks)
        self.target.launch(self.kernels.query, self._blocks[1], packed, dependent=True)

    def _key(self) -> None:
        packed = self._key_params(self.key_sums, self.chunks)
        self.target.launch(self.kernels.key, self._blocks[2], packed, dependent=True)

    def _value(self) -> None:
        packed = self._value_params(self.value_amax, self.chunks)
        self.target.launch(self.kernels.value, self._blocks[3], packed, dependent=True)

    def _statistics_params(self) -> bytes:
        packed = params.STATISTICS.pack(
            *strided(self.key),
            *strided(self.value),
            self.key_sums,
            self.value_amax,
            *self._key_flags(),
            self.kv_heads,
            self.first_key,
            self.end_key,
            self.chunks,
            self.chunk_tokens,
            self.batch * self.kv_heads * self.chunks,
        )
        return packed + self._rotary("key")

    def _query_params(self, key_sums: int, chunks: int) -> bytes:
        packed = params.QUERY.pack(
            *strided(self.query),
            key_sums,
            self.query_codes,
            self.query_scales,
            self.means,
            self.row_term,
            self._counts(),
            0 if self._is_packed else self.taken,
            *(NO_FLAGS if self.mask is None else flags(self.mask.live)),
            self.heads,
            self.group,
            self.query_length,
            self.query_blocks,
            self.first_live,
            self.end_live,
            self.first_key,
            self.end_key,
            chunks,
            abs(self.scale) * (1.0 if self.kernels.attend.softcap else LOG2_E),
            self.scale,
        )
        return packed + self._rotary("query")

    def _key_params(self, key_sums: int, chunks: int) -> bytes:
        packed = params.KEY.pack(
            *strided(self.key),
            key_sums,
            self.means,
            self.tiles,
            self.tiles + self.tile.scales_offset,
            self.delta,
            self._counts(),
            *self._key_flags(),
            self.tile.bytes,
            self.kv_heads,
            self.key_blocks,
            self.group * self.query_blocks,
            self.first_key,
            self.end_key,
            chunks,
        )
        return packed + self._rotary("key")

    def _value_params(self, value_amax: int, chunks: int) -> bytes:
        return params.VALUE.pack(
            *strided(self.value),
            value_amax,
            self.tiles + self.tile.value_offset,
            self.value_scales,
            *self._key_flags(),
            self.tile.bytes,
            self.kv_heads,
            self.key_blocks,
            self.first_key,
            self.end_key,
            chunks,
        )

    def _attending(self) -> Attending:
        operands = Operands(
            self.query_codes,
            self.query_scales,
            self.tiles,
            self.value_scales,
            self.delta,
            self.row_term,
            self.part_outputs,
            self.part_sums,
            self.taken,
        )
        return Attending(
            self.target,
            self.kernels,
            self.sizes,
            self.reach,
            self.semantics,
            operands,
            self.target.processors,
            self.output,
            self.lse,
            self.sinks,
            self.mask,
            self.splits,
        )

    def _rotary(self, side: Literal["query", "key"]) -> bytes:
        """What a kernel on Q or K takes besides, where it rotates."""
        rotary = self.rotary
        tables = None if rotary is None else rotary.query if side == "query" else rotary.key
        if rotary is None or tables is None:
            return b""
        return params.ROTARY.pack(
            tables.cosine.data_ptr(),
            *rotary.strides(tables.cosine),
            tables.sine.data_ptr(),
            *rotary.strides(tables.sine),
            rotary.channels,
            KINDS[tables.cosine.dtype],
        )

    def _key_flags(self) -> tuple[int, ...]:
        return NO_FLAGS if self.mask is None else flags(self.mask.keys)

    def _counts(self) -> int:
        return 0 if self.mask is None else self.mask.counts.data_ptr()


def strided(tensor: Tensor) -> tuple[int, ...]:
    """``struct Strided`` of a tensor of 4 dims."""
    return (tensor.data_ptr(), *tensor.stride(), tensor.shape[3])


@functools.cache
def _arch(device: int) -> str:
    """The architecture whose kernels a device runs; KernelUnavailableError where there are none."""
    if torch.version.hip is not None:  # whose capabilities are other numbers
        raise KernelUnavailableError(
            "the CUDA kernels are for GPUs of NVIDIA, and this PyTorch is built for ROCm"
        )
    return arch_of(torch.cuda.get_device_capability(device)).name


@functools.cache
def _multiprocessors(driver: Driver, device: int) -> int:
    return driver.multiprocessors(device)


def _arch_of(problem: Problem) -> str:
    """As ``_arch``, of the GPU that a problem is about."""
    if problem.capability is not None:
        return arch_of(problem.capability).name
    return _arch(problem.device_index)


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def default_recipe(problem: Problem) -> str:
    """What `auto` means on the GPU of a problem.

    Raises:
        KernelUnavailableError: there are no kernels for it.
    """
    return dispatch.default_recipe(_arch_of(problem))


def _refuse(recipe: str, problem: Problem) -> str | None:
    try:
        arch = _arch_of(problem)
    except KernelUnavailableError as error:
        return str(error)
    return refuse(recipe, problem, arch) or unobtainable(recipe, problem)


def refuse(recipe: str, problem: Problem, arch: str) -> str | None:
    """Why the kernels of an architecture do not take a problem, in one sentence, or None."""
    kernels = _decide(recipe, problem, arch)
    return kernels if isinstance(kernels, str) else None


def unobtainable(recipe: str, problem: Problem) -> str | None:
    """Why the kernels that take a problem can be neither found nor compiled here, or None.

    Not asked of a GPU that need not be here.

    Raises:
        KernelUnavailableError: there are no kernels for the GPU.
    """
    if problem.capability is not None:
        return None
    kernels = _decide(recipe, problem, _arch_of(problem))
    return None if isinstance(kernels, str) else _missing(kernels)


def _decide(recipe: str, problem: Problem, arch: str) -> Variant | str:
    return dispatch.decide(
        arch,
        recipe,
        _dtype_name(problem.dtype),
        problem.head_dim,
        problem.value_head_dim,
        window=problem.window,
        masked=problem.has_mask,
        softcap=problem.softcap,
    )


@functools.cache
def _missing(kernels: Variant | CacheVariant) -> str | None:
    reasons = map(default_images().missing, kernels.specs())
    return next((reason for reason in reasons if reason is not None), None)


def _gate(recipe: str, problem: Problem) -> Gate | str:
    return dispatch.gate(_arch_of(problem), recipe)


NAME: Final = "cuda-mma"
KERNELS: Final = tuple(
    Kernel(
        name=lambda: NAME,
        device_type="cuda",
        recipe=recipe,
        refuse=functools.partial(_refuse, recipe),
        gate=functools.partial(_gate, recipe),
        run=functools.partial(attention, recipe=recipe),
        run_packed=functools.partial(attention_of_sequences, recipe=recipe),
        smallest=functools.partial(dispatch.smallest, recipe),
        run_rotary=functools.partial(attention, recipe=recipe),
    )
    for recipe in dict.fromkeys(recipe for arch in ARCHS.values() for recipe in arch.recipes)
)
