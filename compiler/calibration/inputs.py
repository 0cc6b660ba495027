"""Inputs of a calibration: any iterable, gone through as often as needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sage_compiler import steps
from sage_compiler.errors import InvalidOptionError


@dataclass(frozen=True, slots=True)
class Item:
    """The arguments of one call of the model.

    Attributes:
        number: its place among the inputs, from 0.
        position: what ``set_step`` had been told when the item was drawn; None: nothing.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    position: tuple[int, int] | None

    def call(self, model: Callable[..., Any]) -> Any:
        """The model's output; the same random numbers each time, and the item is left as it was."""
        args, kwargs = _fresh((self.args, dict(self.kwargs)))
        steps.set_step(*(self.position or (None, None)))
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(self.number)
            return model(*args, **kwargs)


class Inputs:
    """The user's inputs: what can be iterated once only is kept, the rest is iterated again."""

    def __init__(self, given: Iterable[Any]) -> None:
        """Raises InvalidOptionError: no iterable, or one of the model's own arguments."""
        if isinstance(given, (torch.Tensor, Mapping, str)) or not isinstance(given, Iterable):
            raise InvalidOptionError(
                f"inputs is {type(given).__name__}; it must be an iterable whose items are tuples "
                "of positional arguments or dicts of keyword arguments: [(x,)] for one input x"
            )
        self._given = given
        self._once = iter(given) is given
        self._kept: list[Item] = []
        self._positions: list[tuple[int, int] | None] = []
        self.count: int | None = len(given) if isinstance(given, Sized) else None

    def __iter__(self) -> Iterator[Item]:
        """The items; the first time through, each with the step that was set when it was drawn."""
        if self._once:
            yield from self._kept
        for number, given in enumerate(self._given, start=len(self._kept)):
            if number == len(self._positions):
                self._positions.append(steps.position())
            args, kwargs = _arguments(given)
            item = Item(number, args, kwargs, self._positions[number])
            if self._once:
                self._kept.append(item)
            yield item


def _arguments(given: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(given, Mapping):
        return (), given
    if isinstance(given, tuple):
        match given:
            case (tuple() as args, dict() as kwargs):
                return args, kwargs
        return given, {}
    return (given,), {}


_IMMUTABLE = (torch.Tensor, int, float, complex, str, bytes, bool, type(None), torch.dtype)


def _fresh(arguments: Any) -> Any:
    """The arguments, where they hold objects that a model may change (a cache), as a copy."""
    leaves = pytree.tree_leaves(arguments)
    if all(isinstance(leaf, _IMMUTABLE) for leaf in leaves):
        return arguments
    return copy.deepcopy(arguments)
