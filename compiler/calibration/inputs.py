"""Inputs of a calibration: any iterable, gone through as often as needed."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
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
        """The model's output; the same random numbers each time, and the item is left as it was.

        Raises:
            InvalidOptionError: an argument that cannot be copied.
        """
        copies: dict[int, Any] = {}  # shared, so that what is one object stays one
        args = [_copied(each, f"number {at}", copies) for at, each in enumerate(self.args)]
        kwargs = {name: _copied(each, repr(name), copies) for name, each in self.kwargs.items()}
        steps.set_step(*(self.position or (None, None)))
        with _Random.seeded(self.number), torch.no_grad():
            return model(*args, **kwargs)


class Inputs:
    """The user's inputs: what can be iterated once only is kept, the rest is iterated again.

    What draws its items from torch's, NumPy's or Python's random numbers (a shuffling DataLoader)
    draws the same ones each time.
    """

    def __init__(self, given: Iterable[Any], keep: int | None = None) -> None:
        """Take the inputs; none is drawn yet.

        Args:
            keep: how many items are kept of what can be iterated once only; None: all.

        Raises:
            InvalidOptionError: no iterable, or one of the model's own arguments.
        """
        if isinstance(given, (torch.Tensor, Mapping, str)) or not isinstance(given, Iterable):
            raise InvalidOptionError(
                f"inputs is {type(given).__name__}; it must be an iterable whose items are tuples "
                "of positional arguments or dicts of keyword arguments: [(x,)] for one input x"
            )
        self._given = given
        self._once = isinstance(given, Iterator)
        self._keep = keep
        self._random: _Random | None = None  # when the first item was drawn
        self._kept: list[Item] = []
        self._positions: list[tuple[int, int] | None] = []
        self.count: int | None = len(given) if isinstance(given, Sized) else None

    def __iter__(self) -> Iterator[Item]:
        """The items; the first time through, each with the step that was set when it was drawn."""
        if self._once:
            yield from self._kept
            yield from self._drawn(start=len(self._positions))
        elif self._random is None:
            self._random = _Random.now()
            yield from self._drawn(start=0)
        else:
            with self._random.again():
                yield from self._drawn(start=0)

    def _drawn(self, start: int) -> Iterator[Item]:
        for number, given in enumerate(self._given, start):
            if number == len(self._positions):
                self._positions.append(steps.position())
            args, kwargs = _arguments(given)
            item = Item(number, args, kwargs, self._positions[number])
            if self._once and (self._keep is None or number < self._keep):
                self._kept.append(item)
            yield item


def _arguments(given: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    match given:
        case Mapping():
            return (), given
        case (tuple() as args, dict() as kwargs) if isinstance(given, tuple):
            return args, kwargs
        case tuple() | list():  # a DataLoader makes lists of the tuples of its dataset
            return tuple(given), {}
        case _:
            return (given,), {}


@dataclass(frozen=True, slots=True)
class _Random:
    """The state of the random numbers that programs draw without a generator of their own."""

    cpu: torch.Tensor
    cuda: list[torch.Tensor]
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def now(cls) -> _Random:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        numpy_state = np.random.get_state(legacy=False)
        assert isinstance(numpy_state, dict)
        return cls(torch.get_rng_state(), cuda, numpy_state, random.getstate())

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw the numbers that followed this state; afterwards go on as before."""
        before = self.now()
        self._set()
        try:
            yield
        finally:
            before._set()

    @classmethod
    @contextlib.contextmanager
    def seeded(cls, seed: int) -> Iterator[None]:
        """Draw the numbers of a seed; afterwards go on as before."""
        before = cls.now()
        # Not torch.manual_seed: it would also seed, later, devices that are not in use yet.
        torch.default_generator.manual_seed(seed)
        if before.cuda:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            before._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def _copied(argument: Any, name: str, copies: dict[int, Any]) -> Any:
    """An argument with all that a model may change (lists, a cache) copied; not its tensors."""
    leaves = pytree.tree_leaves(argument, is_leaf=lambda each: type(each) not in _CONTAINERS)
    for leaf in leaves:
        if isinstance(leaf, (torch.Tensor, torch.nn.Module)):
            copies[id(leaf)] = leaf
    try:
        return copy.deepcopy(argument, copies)
    except (TypeError, RuntimeError, copy.Error) as error:
        raise InvalidOptionError(
            f"argument {name} of an input holds what cannot be copied ({error}), and the model, "
            "which runs several times, may change it; leave it out, or give the model a wrapper "
            "that adds it"
        ) from None


_CONTAINERS: Final = (tuple, list, dict)
