"""Where a diffusion model is in its schedule: what a recipe for each timestep goes by.

A compiled graph holds the tensor of ``index_tensor``, and the operator reads it in every call: so
one compiled model serves all timesteps. Positions are of this process, like torch's random seed.
"""

from __future__ import annotations

import operator
from typing import Final

import torch
from torch import Tensor

from sage_compiler.errors import InvalidAttentionError

UNSET: Final = -1

_position: tuple[int, int] | None = None  # step, of how many
_tensors: Final[dict[int, Tensor]] = {}  # number of ranges -> the range that the step is in


@torch.compiler.disable  # type: ignore[untyped-decorator]
def set_step(step: int | None, total: int | None = None) -> None:
    """Say which step of its schedule a diffusion model is about to compute.

    Call it before each call of the model, with a policy that depends on the timestep as well as
    while ``sage.calibrate`` measures one::

        for i, t in enumerate(scheduler.timesteps):
            sage.set_step(i, len(scheduler.timesteps))
            noise = model(latents, t)

    It costs microseconds and compiles nothing. Inside of compiled code it is a graph break.

    Args:
        step: from 0 for the first call (the noisiest) to total - 1; None: no schedule, as at first.
        total: how many steps the schedule has.

    Raises:
        InvalidAttentionError: a step outside of its schedule.
    """
    global _position
    _position = None if step is None and total is None else _checked(step, total)
    for ranges, tensor in _tensors.items():
        tensor.fill_(_index(ranges))


def _checked(step: object, total: object) -> tuple[int, int]:
    """Both as integers: a timestep, as schedulers have it, is often a float, and no step."""
    try:
        at, end = operator.index(step), operator.index(total)  # type: ignore[arg-type]
    except TypeError:
        at, end = 0, 0  # refused like any other
    if not 0 <= at < end:
        raise InvalidAttentionError(
            f"set_step({step}, {total}); it needs integers 0 <= step < total, or set_step(None)"
        )
    return at, end


def position() -> tuple[int, int] | None:
    """What ``set_step`` was told last: (step, total); None when there is no schedule."""
    return _position


def range_of(ranges: int) -> int:
    """The range, of that many equal ones, that the step is in; ``UNSET`` without a schedule."""
    return _index(ranges)


def index_tensor(ranges: int) -> Tensor:
    """The tensor that always holds ``range_of(ranges)``: 0-d, int64, on the CPU."""
    if ranges not in _tensors:
        with torch.inference_mode(False):  # else set_step could not change it outside of it
            _tensors[ranges] = torch.tensor(_index(ranges), dtype=torch.int64, device="cpu")
    return _tensors[ranges]


def _index(ranges: int) -> int:
    if _position is None:
        return UNSET
    step, total = _position
    return step * ranges // total
