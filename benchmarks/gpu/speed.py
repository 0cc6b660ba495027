"""How fast the kernels are, beside the attention of others in 16 bits, on the same inputs.

The total is the call with everything that it needs: memory, statistics, quantization, attention,
started from Python; the kernel is what comes after the operands are quantized, alone. Of a cache
the total is a step of decoding, and the kernel that without the append: see ``decoding``.
Inputs rotate through sets that together are larger than the device's cache. How times are taken:
see ``timing``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.decoding import Decoding, length_of
from benchmarks.gpu.device import Device, target
from benchmarks.gpu.guarded import plan, same_bits
from benchmarks.gpu.matrix import Subject, dtype_name
from benchmarks.gpu.peers import PEERS, candidates
from benchmarks.gpu.timing import Candidate, interleave
from benchmarks.measure import Spread, ratio
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.spec import AttendSpec, HopperAttendSpec, KernelSpec
from sage_compiler.kernels.layout import empty_output
from sage_compiler.precision import Accumulator
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.kernels.dense import Call
from tests.tolerances import TOLERANCES, cosine, rel_l1

DTYPE: Final = torch.float16  # the one that all GPUs and peers have, and that papers compare in

_SETS_OF_CACHE: Final = 4  # the inputs of all sets together, in sizes of the cache
_MOST_OF_MEMORY: Final = 0.5
# Bytes of an element of Q beside it: K and V, the output, the quantized operands, and the peers'
# outputs.
_BYTES_AN_ELEMENT: Final = 6 + 2 + 5 + 4
_CHECKED_ROWS: Final = 256
_COUNTER_BYTES: Final = 4


class Mask(StrEnum):
    """An explicit mask."""

    NONE = "none"
    PADDING = "padding"  # bool (B, 1, 1, L): the last quarter of the keys is hidden
    BIAS = "bias"  # float (1, 1, Lq, L), of gaussian numbers


@dataclass(frozen=True, slots=True)
class Grid:
    """What is timed, what matters most first: time may run out.

    Attributes:
        head_dims, lengths: all combinations, causal or not.
        masked_lengths: with each explicit mask, at the first head_dim.
        decode_lengths: of one query to so many keys, at the first head_dim: quantized in the call,
            and in a cache.
        heads: as many for K and V as for Q, but a ``decode_group`` th part in decoding.
        batch: up to ``batch_until`` tokens, and 1 beyond.
        seconds: how long each cell is measured, about.
    """

    head_dims: Sequence[int] = (128, 64, 256)
    lengths: Sequence[int] = (4096, 16384, 1024, 32768, 8192, 2048)
    masked_lengths: Sequence[int] = (4096, 16384)
    decode_lengths: Sequence[int] = (4096, 32768)
    heads: int = 32
    decode_group: int = 4
    batch: int = 4
    batch_until: int = 16384
    seconds: float = 2.0


QUICK: Final = Grid(
    lengths=(4096, 16384, 1024), masked_lengths=(4096,), decode_lengths=(32768,), seconds=0.7
)


@dataclass(frozen=True, slots=True)
class Cell:
    """Attention to (batch, heads / group, seq_len, head_dim).

    Attributes:
        queries: of each head; None: self-attention.
        group: heads of Q for one of K and V.
        cached: whether keys and values are in a cache, which is appended to.
    """

    head_dim: int
    seq_len: int
    causal: bool
    batch: int
    heads: int
    queries: int | None = None
    group: int = 1
    mask: Mask = Mask.NONE
    cached: bool = False

    @property
    def query_length(self) -> int:
        return self.seq_len if self.queries is None else self.queries

    def flops(self) -> float:
        """4 B H Lq L D, half of it if causal, as papers count; an explicit mask is not counted."""
        pairs = self.query_length * self.seq_len / (2 if self.causal else 1)
        return 4.0 * self.batch * self.heads * pairs * self.head_dim

    def is_of(self, subject: Subject) -> bool:
        """Whether these kernels serve it."""
        spec = subject.kernels.attend
        has_dims = set(subject.head_dims) == {self.head_dim}
        has_form = spec.masked == (self.mask is not Mask.NONE) and not (spec.window or spec.softcap)
        if self.cached and subject.accumulator is not Accumulator.FP32:
            return False
        return has_dims and has_form and subject.dtype is DTYPE

    def elements(self) -> int:
        """Of K, or of V."""
        return self.batch * self.heads // self.group * self.seq_len * self.head_dim

    @property
    def semantics(self) -> Semantics:
        return Semantics(MaskClass.CAUSAL if self.causal else MaskClass.NONE)

    @property
    def label(self) -> str:
        heads = f"{self.heads}" if self.group == 1 else f"{self.heads}/{self.heads // self.group}"
        lengths = "" if self.queries is None else f"{self.queries}x"
        lengths += str(self.seq_len)
        cache = " cache" * self.cached
        return f"B={self.batch} H={heads} L={lengths} D={self.head_dim} {self.mask_name}{cache}"

    @property
    def mask_name(self) -> str:
        """As tables have it."""
        if self.mask is not Mask.NONE:
            return str(self.mask)
        return "causal" if self.causal else "no mask"


def cells(grid: Grid, free_bytes: int, cache_bytes: int) -> Iterator[Cell | str]:
    """The cells of a grid, with as many batches and heads as memory has room for.

    Instead of a cell for which a single head is too much: why it is left out, in one sentence.
    """
    for cell in _wanted(grid):
        while _bytes(cell, cache_bytes) > _MOST_OF_MEMORY * free_bytes:
            if cell.batch * cell.heads == cell.group:
                yield f"{cell.label}: more than half of the {free_bytes >> 20} MiB that are free"
                break
            if cell.batch > 1:
                cell = replace(cell, batch=cell.batch // 2)
            else:
                cell = replace(cell, heads=cell.heads // 2)
        else:
            yield cell


def _wanted(grid: Grid) -> Iterator[Cell]:
    """The cells of a grid, however much memory they take."""

    def batch(length: int) -> int:
        return grid.batch if length <= grid.batch_until else 1

    first, *others = grid.head_dims
    for length, causal in itertools.product(grid.lengths, (False, True)):
        yield Cell(first, length, causal, batch(length), grid.heads)
    for length in grid.decode_lengths:
        cell = Cell(
            first, length, False, grid.batch, grid.heads, queries=1, group=grid.decode_group
        )
        yield cell
        yield replace(cell, seq_len=length_of(length), cached=True)
    for length, mask in itertools.product(grid.masked_lengths, (Mask.PADDING, Mask.BIAS)):
        yield Cell(first, length, False, batch(length), grid.heads, mask=mask)
    for head_dim, length, causal in itertools.product(others, grid.lengths, (False, True)):
        yield Cell(head_dim, length, causal, batch(length), grid.heads)


def _sets(cell: Cell, cache_bytes: int) -> int:
    """Sets of inputs: enough that none is in the cache when its turn comes again."""
    return max(2, -(-_SETS_OF_CACHE * cache_bytes // (6 * cell.elements())))


def _bytes(cell: Cell, cache_bytes: int) -> int:
    """What a cell takes, the term of smoothed Q of INT4 included."""
    delta = 4 * cell.batch * cell.heads * -(-cell.query_length // 128) * cell.seq_len
    one = cell.elements() * _BYTES_AN_ELEMENT + delta
    # Looked through, a mask takes several times its elements.
    mask = 0 if cell.mask is Mask.NONE else 10 * cell.query_length * cell.seq_len
    return one * _sets(cell, cache_bytes) + mask


@dataclass(frozen=True)
class _Recorder(kernel.Target):
    """A target that notes what is launched."""

    launches: list[tuple[KernelSpec, int, bytes]] = field(default_factory=list)

    def launch(
        self, spec: KernelSpec, blocks: int, packed: bytes, *, dependent: bool = False
    ) -> None:
        self.launches.append((spec, blocks, packed))
        super().launch(spec, blocks, packed, dependent=dependent)


class Prepared:
    """An attention whose operands are quantized, so that what follows can be run alone."""

    def __init__(self, device: Device, subject: Subject, call: Call) -> None:
        place = target(device)
        recorder = _Recorder(
            place.arch,
            place.device,
            place.stream,
            place.loader,
            place.allocate,
            place.multiprocessors,
        )
        self.output = empty_output(call.query, call.value)
        planned = plan(recorder, subject, call)
        self._whole = lambda: total(device, subject, call)
        # Kept: it owns the operands.
        self._call = kernel.Call(
            recorder,
            planned.kernels,
            call.query,
            call.key,
            call.value,
            call.semantics,
            self.output,
            None,
            attn_mask=call.attn_mask,
            splits=planned.cut.splits,
        )
        self._call.run()
        is_attention = [
            isinstance(spec, (AttendSpec, HopperAttendSpec)) for spec, *_ in recorder.launches
        ]
        is_first = is_attention.index(True)
        self._place = place
        self._launches = recorder.launches[is_first:]

    def attend(self) -> None:
        """Launch the fused attention, and what may follow it."""
        taken = self._call.taken
        if taken:  # the counter of a persistent grid, which Q's quantizer would set to zero
            self._place.clear(taken, _COUNTER_BYTES)
        for index, launch in enumerate(self._launches):
            self._place.launch(*launch, dependent=index > 0)

    def total(self) -> Tensor:
        """The whole call."""
        return self._whole()


def make_calls(device: Device, cell: Cell) -> list[Call]:
    """Sets of inputs on the device: gaussian, a channel offset on K as models have it."""
    generator = torch.Generator(device.place).manual_seed(0)
    shape = (cell.batch, cell.heads, cell.query_length, cell.head_dim)
    key_shape = (cell.batch, cell.heads // cell.group, cell.seq_len, cell.head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DTYPE, device=device.place, generator=generator)

    mask = None
    if cell.mask is Mask.PADDING:
        mask = torch.arange(cell.seq_len, device=device.place) < -(-3 * cell.seq_len // 4)
        mask = mask.expand(cell.batch, 1, 1, -1).contiguous()
    elif cell.mask is Mask.BIAS:
        mask = normal(1, 1, cell.query_length, cell.seq_len)
    found = []
    for _ in range(_sets(cell, device.cache_bytes())):
        bias = 2 * normal(1, key_shape[1], 1, cell.head_dim)
        key = normal(*key_shape).add_(bias)
        found.append(Call(normal(*shape), key, normal(*key_shape), cell.semantics, mask))
    return found


def total(device: Device, subject: Subject, call: Call) -> Tensor:
    """The whole call, as the operator makes it."""
    output, _ = kernel.run(
        target(device),
        call.query,
        call.key,
        call.value,
        call.semantics,
        want_lse=False,
        recipe=subject.recipe,
        attn_mask=call.attn_mask,
        accumulator=subject.accumulator,
    )
    return output


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How near an output is to float32: cosine similarity, relative L1."""

    cosine: float
    rel_l1: float


def accuracy(call: Call, output: Tensor) -> Accuracy:
    """Over some rows of the first head and of the last."""
    length, key_length = call.query.shape[2], call.key.shape[2]
    rows = torch.linspace(0, length - 1, min(_CHECKED_ROWS, length), device=output.device)
    rows = rows.round().long()
    found, expected = [], []
    for at in (0, -1):  # the last is where the largest offsets are
        query, key, value = (x[at, at].float() for x in (call.query, call.key, call.value))
        mask = None
        if call.semantics.mask_class is MaskClass.CAUSAL:
            mask = torch.arange(key_length, device=output.device) <= rows.view(-1, 1)
        elif call.attn_mask is not None:
            full = (*call.query.shape[:3], key_length)
            mask = call.attn_mask.expand(full)[at, at][rows]
            mask = mask if mask.dtype == torch.bool else mask.float()
        with sdpa_kernel(SDPBackend.MATH):
            exact = F.scaled_dot_product_attention(
                query[None, rows], key[None], value[None], attn_mask=mask
            )
        expected.append(exact[0])
        found.append(output[at, at][rows])
    actual, exact_rows = torch.stack(found), torch.stack(expected)
    return Accuracy(cosine(actual, exact_rows), rel_l1(actual, exact_rows))


@dataclass(frozen=True)
class Measured:
    """One cell of one subject.

    Attributes:
        rows: of the results, one for each peer, or one without a peer.
        refused: why a peer is missing.
        failure: what was wrong with the outputs; then there are no rows.
    """

    rows: list[dict[str, Any]]
    refused: dict[str, str]
    failure: str | None = None


def measure(device: Device, subject: Subject, cell: Cell, seconds: float) -> Measured:
    """Time one cell; nothing whose output is wrong."""
    calls = make_calls(device, cell)
    kind = Decoding if cell.cached else Prepared
    prepared = [kind(device, subject, call) for call in calls]
    output = prepared[0].total().clone()
    ours = accuracy(calls[0], output)
    least = TOLERANCES[subject.recipe].cosine
    if not ours.cosine >= least:
        return Measured([], {}, f"{cell.label}: cosine {ours.cosine:.6f}, at least {least}")
    others, refused = candidates(device, calls, PEERS)
    theirs = {name: _accuracy_of(other, calls[0]) for name, other in others.items()}
    timed = {
        "kernel": Candidate(lambda number: prepared[number].attend()),
        "total": Candidate(lambda number: prepared[number].total()),
        **others,
    }
    prepared[0].output.fill_(torch.nan)
    samples = interleave(device, timed, len(calls), seconds)
    device.synchronize()
    if not same_bits(prepared[0].output, output):
        return Measured([], {}, f"{cell.label}: the kernel alone gives other bits than the call")
    rows = [
        _row(subject, cell, samples, ours, peer, theirs.get(peer or ""))
        for peer in others or [None]
    ]
    return Measured(rows, refused)


def _accuracy_of(candidate: Candidate, call: Call) -> Accuracy:
    with candidate.context():
        output = candidate.call(0)
    assert isinstance(output, Tensor)
    return accuracy(call, output)


def _row(
    subject: Subject,
    cell: Cell,
    samples: Mapping[str, list[float]],
    ours: Accuracy,
    peer: str | None,
    theirs: Accuracy | None,
) -> dict[str, Any]:
    def milliseconds(name: str) -> float:
        return Spread.of(samples[name]).median

    def tflops(name: str) -> float:
        return cell.flops() / milliseconds(name) / 1e9

    against = ratio(samples, peer, "total").fields("ratio_total") if peer else {"ratio_total": None}
    return {
        "kernel": subject.kernel + "_cache" * cell.cached,
        "peer": peer,
        "head_dim": cell.head_dim,
        "seq_len": cell.seq_len,
        "queries": cell.query_length,
        "causal": cell.causal,
        "mask": cell.mask_name,
        "batch": cell.batch,
        "heads": cell.heads,
        "kv_heads": cell.heads // cell.group,
        "dtype": dtype_name(subject.dtype),
        "rounds": len(samples["total"]),
        "ms_kernel": milliseconds("kernel"),
        "ms_total": milliseconds("total"),
        "ms_peer": milliseconds(peer) if peer else None,
        "tflops_kernel": tflops("kernel"),
        "tflops_total": tflops("total"),
        "tflops_peer": tflops(peer) if peer else None,
        **against,
        "cosine": ours.cosine,
        "rel_l1": ours.rel_l1,
        "cosine_peer": None if theirs is None else theirs.cosine,
        "rel_l1_peer": None if theirs is None else theirs.rel_l1,
    }


@dataclass
class Results:
    """What ``run`` found.

    Attributes:
        rows: of the results.
        left_out: what was not timed, and why.
        failures: outputs that were wrong.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run(
    device: Device,
    subjects: Sequence[Subject],
    grid: Grid,
    deadline: float,
    tell: Callable[[dict[str, Any]], None],
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Time the cells of a grid.

    Args:
        deadline: no cell is begun after it, on the clock of ``time.monotonic``.
        tell: gets rows as they come.
        keep: gets all that there is after each cell.
    """
    results = Results()
    for cell in cells(grid, device.free_bytes(), device.cache_bytes()):
        if isinstance(cell, str):
            results.left_out.append(cell)
            continue
        for subject in subjects:
            if not cell.is_of(subject):
                continue
            if cell.cached and (reason := device.no_compiler()) is not None:
                results.left_out.append(f"{subject.kernel} {cell.label}: {reason}")
                continue
            if time.monotonic() > deadline:
                results.left_out.append(f"{subject.kernel} {cell.label}: out of time")
                continue
            measured = measure(device, subject, cell, grid.seconds)
            results.rows += measured.rows
            results.left_out += (
                f"{peer} {cell.label}: {reason}" for peer, reason in measured.refused.items()
            )
            if measured.failure is not None:
                results.failures.append(f"{subject.label} {measured.failure}")
            for row in measured.rows:
                tell(row)
            keep(results)
    return results
