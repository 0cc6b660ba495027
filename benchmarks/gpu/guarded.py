"""One attention with garbage in everything that the kernels must write, and around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.gpu.device import Device, target
from benchmarks.gpu.matrix import Subject, dtype_name
from sage_compiler.kernels.cuda import dispatch, kernel
from sage_compiler.kernels.cuda.sizes import Reach, Sizes
from sage_compiler.kernels.layout import empty_output
from sage_compiler.semantics import UNBOUNDED
from tests.compiler.kernels.dense import Call

GARBAGE: Final = (0xC5, 0x3A)  # bytes: large numbers in every format, of both signs
_FENCE: Final = 256  # bytes before and after a piece of memory


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one attention left behind.

    Attributes:
        problem: what was written where nothing may be, or None.
        splits: parts that the keys were cut into.
    """

    output: Tensor
    lse: Tensor
    problem: str | None
    splits: int = 1


class Fenced:
    """Memory that holds a byte of garbage everywhere, within fences of the same."""

    def __init__(self, size: int, garbage: int, device: torch.device) -> None:
        self._end = _FENCE + size
        self._garbage = garbage
        total = self._end + _FENCE
        self._memory = torch.full((total,), garbage, dtype=torch.uint8, device=device)

    def view(self, like: Tensor) -> Tensor:
        """The memory as a dense tensor of the shape, strides and dtype of another."""
        inside = self._memory[_FENCE : self._end].view(like.dtype)
        return inside.as_strided(like.shape, like.stride())

    def address(self) -> int:
        """Where it begins, aligned as the memory of PyTorch's allocator."""
        return self._memory.data_ptr() + _FENCE

    def is_intact(self) -> bool:
        """Whether the fences hold what they held."""
        outside = (self._memory[:_FENCE], self._memory[self._end :])
        return all(bool((part == self._garbage).all()) for part in outside)


def plan(place: kernel.Target, subject: Subject, call: Call) -> dispatch.Plan:
    """The kernels of a call, and how they are cut, as ``kernel.run`` has them."""
    batch, heads, query_length, head_dim = call.query.shape
    lengths = (query_length, call.key.shape[2])
    planned = dispatch.plan(
        place.arch,
        subject.recipe,
        dtype_name(call.query.dtype),
        head_dim,
        call.value.shape[3],
        Sizes.of(batch, heads, call.key.shape[1], *lengths),
        Reach.of(call.semantics, *lengths),
        place.multiprocessors,
        window=call.semantics.window_left != UNBOUNDED,
        masked=call.attn_mask is not None,
        softcap=kernel.has_softcap(call.semantics),
        accumulator=subject.accumulator,
    )
    assert not isinstance(planned, str), planned
    return planned


def attend(device: Device, subject: Subject, call: Call, garbage: int = GARBAGE[0]) -> Outcome:
    """Run one attention by a subject's kernels on the current stream, and wait for it.

    Args:
        call: its tensors on the device.
    """
    place = call.query.device
    like = {
        "output": empty_output(call.query, call.value),
        "LSE": call.query.new_empty(call.query.shape[:3], dtype=torch.float32),
    }
    fences = {name: Fenced(x.nbytes, garbage, place) for name, x in like.items()}
    output, lse = (fences[name].view(x) for name, x in like.items())

    def scratch(sizes: Sequence[int], _: torch.device) -> tuple[list[int], object]:
        pieces = [Fenced(size, garbage, place) for size in sizes]
        fences.update({f"scratch {i}": piece for i, piece in enumerate(pieces)})
        return [piece.address() for piece in pieces], pieces

    place_of_call = target(device, scratch)
    planned = plan(place_of_call, subject, call)
    kernel.Call(
        place_of_call,
        planned.kernels,
        call.query,
        call.key,
        call.value,
        call.semantics,
        output,
        lse,
        call.sinks,
        call.attn_mask,
        splits=planned.cut.splits,
    ).run()
    device.synchronize()
    broken = [name for name, fence in fences.items() if not fence.is_intact()]
    splits = planned.cut.splits
    return Outcome(output, lse, f"written beside {', '.join(broken)}" if broken else None, splits)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, NaN included."""
    a, b = one.contiguous(), other.contiguous()
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
