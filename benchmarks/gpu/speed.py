"""How fast the kernels are, beside the attention of PyTorch in 16 bits, on the same inputs.

The total is the call with everything that it needs: memory, statistics, quantization, attention,
started from Python; the kernel is its last launch alone, over operands that are quantized already.
Inputs rotate through sets that together are larger than the device's cache. How times are taken:
see ``timing``.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.device import Device, target
from benchmarks.gpu.guarded import same_bits
from benchmarks.gpu.matrix import Subject, dtype_name
from benchmarks.gpu.timing import Candidate, interleave
from benchmarks.measure import Spread, ratio
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.spec import AttendSpec, HopperAttendSpec, KernelSpec
from sage_compiler.kernels.layout import empty_output
from sage_compiler.semantics import MaskClass, Semantics
from tests.compiler.kernels.dense import Call
from tests.tolerances import TOLERANCES, cosine

PEERS: Final[Mapping[str, SDPBackend]] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DTYPE: Final = torch.float16  # the one that all GPUs and peers have, and that papers compare in

_SETS_OF_CACHE: Final = 4  # the inputs of all sets together, in sizes of the cache
_MOST_OF_MEMORY: Final = 0.5
# Bytes of an element of Q beside it: K and V, the output, the quantized operands, and the peers'
# outputs.
_BYTES_AN_ELEMENT: Final = 6 + 2 + 5 + 4
_CHECKED_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Grid:
    """What is timed.

    Attributes:
        head_dims, lengths: all combinations, causal or not.
        heads: as many for K and V as for Q.
        batch: up to ``batch_until`` tokens, and 1 beyond.
        seconds: how long each cell is measured, about.
    """

    head_dims: Sequence[int] = (64, 128)
    lengths: Sequence[int] = tuple(1024 << i for i in range(6))
    heads: int = 32
    batch: int = 4
    batch_until: int = 16384
    seconds: float = 2.0


QUICK: Final = Grid(lengths=(1024, 4096, 16384), seconds=0.7)


@dataclass(frozen=True, slots=True)
class Cell:
    """Self-attention of (batch, heads, seq_len, head_dim)."""

    head_dim: int
    seq_len: int
    causal: bool
    batch: int
    heads: int

    def flops(self) -> float:
        """4 B H L L D, half of it if causal, as papers count."""
        pairs = self.seq_len * self.seq_len / (2 if self.causal else 1)
        return 4.0 * self.batch * self.heads * pairs * self.head_dim

    def is_of(self, subject: Subject) -> bool:
        """Whether these kernels serve it."""
        has_dims = set(subject.head_dims) == {self.head_dim}
        return has_dims and subject.dtype is DTYPE and subject.is_plain

    def elements(self) -> int:
        """Of one tensor."""
        return self.batch * self.heads * self.seq_len * self.head_dim

    @property
    def semantics(self) -> Semantics:
        return Semantics(MaskClass.CAUSAL if self.causal else MaskClass.NONE)

    @property
    def label(self) -> str:
        mask = "causal" if self.causal else "no mask"
        return f"B={self.batch} H={self.heads} L={self.seq_len} D={self.head_dim} {mask}"


def cells(grid: Grid, free_bytes: int, cache_bytes: int) -> Iterator[Cell | str]:
    """The cells of a grid, with as many batches and heads as memory has room for.

    Instead of a cell for which a single head is too much: why it is left out, in one sentence.
    """
    for head_dim, length, causal in itertools.product(grid.head_dims, grid.lengths, (False, True)):
        batch = grid.batch if length <= grid.batch_until else 1
        cell = Cell(head_dim, length, causal, batch, grid.heads)
        while _bytes(cell, cache_bytes) > _MOST_OF_MEMORY * free_bytes:
            if cell.batch * cell.heads == 1:
                yield f"{cell.label}: more than half of the {free_bytes >> 20} MiB that are free"
                break
            if cell.batch > 1:
                cell = replace(cell, batch=cell.batch // 2)
            else:
                cell = replace(cell, heads=cell.heads // 2)
        else:
            yield cell


def _sets(cell: Cell, cache_bytes: int) -> int:
    """Sets of inputs: enough that none is in the cache when its turn comes again."""
    return max(2, -(-_SETS_OF_CACHE * cache_bytes // (6 * cell.elements())))


def _bytes(cell: Cell, cache_bytes: int) -> int:
    """What a cell takes, the term of smoothed Q of INT4 included."""
    delta = 4 * cell.batch * cell.heads * -(-cell.seq_len // 128) * cell.seq_len
    one = cell.elements() * _BYTES_AN_ELEMENT + delta
    return one * _sets(cell, cache_bytes)


@dataclass(frozen=True)
class _Recorder(kernel.Target):
    """A target that notes what is launched."""

    launches: list[tuple[KernelSpec, int, bytes]] = field(default_factory=list)

    def launch(self, spec: KernelSpec, blocks: int, packed: bytes) -> None:
        self.launches.append((spec, blocks, packed))
        super().launch(spec, blocks, packed)


class Prepared:
    """An attention whose operands are quantized, so that its last kernel can be run alone."""

    def __init__(self, device: Device, subject: Subject, call: Call) -> None:
        place = target(device)
        recorder = _Recorder(place.arch, place.device, place.stream, place.loader, place.allocate)
        self.output = empty_output(call.query, call.value)
        tensors = (call.query, call.key, call.value)
        # Kept: it owns the operands.
        self._call = kernel.Call(
            recorder, subject.kernels, *tensors, call.semantics, self.output, None
        )
        self._call.run()
        ((spec, self._blocks, self._packed),) = (
            launch
            for launch in recorder.launches
            if isinstance(launch[0], (AttendSpec, HopperAttendSpec))
        )
        self._stream = place.stream
        self._launch = place.loader.loaded(spec, place.device, place.stream)

    def attend(self) -> None:
        """Launch the fused attention."""
        self._launch(self._blocks, self._stream, self._packed)


def make_calls(device: Device, cell: Cell) -> list[Call]:
    """Sets of inputs on the device: gaussian, a channel offset on K as models have it."""
    generator = torch.Generator(device.place).manual_seed(0)
    shape = (cell.batch, cell.heads, cell.seq_len, cell.head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DTYPE, device=device.place, generator=generator)

    found = []
    for _ in range(_sets(cell, device.cache_bytes())):
        bias = 2 * normal(1, cell.heads, 1, cell.head_dim)
        key = normal(*shape).add_(bias)
        found.append(Call(normal(*shape), key, normal(*shape), cell.semantics))
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
        accumulator=subject.accumulator,
    )
    return output


def sdpa(calls: Sequence[Call], number: int) -> Tensor:
    """PyTorch's attention of one set."""
    call = calls[number]
    causal = call.semantics.mask_class is MaskClass.CAUSAL
    return F.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=causal)


def peers(device: Device, calls: Sequence[Call]) -> tuple[dict[str, Candidate], dict[str, str]]:
    """PyTorch's kernels that take these calls, and why the others do not."""
    found, refused = {}, {}
    for name, backend in PEERS.items():
        candidate = Candidate(partial(sdpa, calls), partial(sdpa_kernel, backend))
        with warnings.catch_warnings(record=True) as told, candidate.context():
            warnings.simplefilter("always")
            try:
                candidate.call(0)
                device.synchronize()
            except RuntimeError as error:  # PyTorch says in warnings why no kernel is available
                if isinstance(error, torch.AcceleratorError):
                    raise
                reasons = [str(error), *(str(warning.message) for warning in told)]
                refused[name] = " ".join(reasons).replace("\n", " ")[:300]
            else:
                found[name] = candidate
    return found, refused


def accuracy(call: Call, output: Tensor) -> float:
    """Cosine to float32, over some rows of the first head and of the last."""
    length = call.query.shape[2]
    rows = torch.linspace(0, length - 1, min(_CHECKED_ROWS, length), device=output.device)
    rows = rows.round().long()
    found, expected = [], []
    for at in (0, -1):  # the last is where the largest offsets are
        query, key, value = (x[at, at].float() for x in (call.query, call.key, call.value))
        mask = None
        if call.semantics.mask_class is MaskClass.CAUSAL:
            mask = torch.arange(length, device=output.device) <= rows.view(-1, 1)
        with sdpa_kernel(SDPBackend.MATH):
            exact = F.scaled_dot_product_attention(
                query[None, rows], key[None], value[None], attn_mask=mask
            )
        expected.append(exact[0])
        found.append(output[at, at][rows])
    return cosine(torch.stack(found), torch.stack(expected))


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
    prepared = [Prepared(device, subject, call) for call in calls]
    output = total(device, subject, calls[0])
    found_cosine = accuracy(calls[0], output)
    least = TOLERANCES[subject.recipe].cosine
    if not found_cosine >= least:
        return Measured([], {}, f"{cell.label}: cosine {found_cosine:.6f}, at least {least}")
    others, refused = peers(device, calls)
    candidates = {
        "kernel": Candidate(lambda number: prepared[number].attend()),
        "total": Candidate(lambda number: total(device, subject, calls[number])),
        **others,
    }
    prepared[0].output.fill_(torch.nan)
    samples = interleave(device, candidates, len(calls), seconds)
    device.synchronize()
    if not same_bits(prepared[0].output, output):
        return Measured([], {}, f"{cell.label}: the kernel alone gives other bits than the call")
    rows = [_row(subject, cell, samples, peer, found_cosine) for peer in others or [None]]
    return Measured(rows, refused)


def _row(
    subject: Subject, cell: Cell, samples: Mapping[str, list[float]], peer: str | None, found: float
) -> dict[str, Any]:
    def tflops(name: str) -> float:
        return cell.flops() / Spread.of(samples[name]).median / 1e9

    against = ratio(samples, peer, "total").fields("ratio_total") if peer else {"ratio_total": None}
    return {
        "kernel": subject.kernel,
        "peer": peer,
        "head_dim": cell.head_dim,
        "seq_len": cell.seq_len,
        "causal": cell.causal,
        "batch": cell.batch,
        "heads": cell.heads,
        "dtype": dtype_name(subject.dtype),
        "rounds": len(samples["total"]),
        "tflops_kernel": tflops("kernel"),
        "tflops_total": tflops("total"),
        "tflops_peer": tflops(peer) if peer else None,
        **against,
        "cosine": found,
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
) -> Results:
    """Time the cells of a grid, giving rows to ``tell`` as they come.

    Args:
        deadline: no cell is begun after it, on the clock of ``time.monotonic``.
    """
    results = Results()
    for cell in cells(grid, device.free_bytes(), device.cache_bytes()):
        if isinstance(cell, str):
            results.left_out.append(cell)
            continue
        for subject in subjects:
            if not cell.is_of(subject):
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
    return results
