"""Axes against plain indexing: a view, a transpose or an expansion keeps what each entry is."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from sage_compiler.passes.axes import Axis, Layout, Sizes, arrange, axes_of, broadcast, reshape
from sage_compiler.passes.values import Apply


def test_a_view_splits_and_merges() -> None:
    batch, heads, length = Axis(2), Axis(3), Axis(5)
    merged = reshape(((batch,), (heads,), (length,)), (6, 5))
    assert merged == ((batch, heads), (length,))
    folded = Axis(6)
    split = reshape(((folded,), (length,)), (2, 3, 5))
    assert split is not None and len(folded.parts) == 2
    assert axes_of(((folded,), (length,))) == (*folded.parts, length)


def test_a_view_that_tears_axes_apart_is_refused() -> None:
    assert reshape(((Axis(4),), (Axis(6),)), (3, 8)) is None
    assert reshape(((Axis(2),), (Axis(3),)), (3, 2)) is None
    assert reshape(((Axis(0),), (Axis(3),)), (3, 0)) is None


@pytest.mark.parametrize("sizes", [(1, 2, 1, 5), (2, 5, 1), (2, 1, 1, 5)])
def test_dims_of_size_one_come_and_go(sizes: tuple[int, ...]) -> None:
    batch, length = Axis(2), Axis(5)
    layout = reshape(((batch,), (), (length,)), sizes)
    assert layout is not None
    assert [dim for dim in layout if dim] == [(batch,), (length,)]


def test_broadcasting_aligns_at_the_end() -> None:
    batch, rows, columns = Axis(2), Axis(3), Axis(4)
    layout: Layout = ((batch,), (rows,), (columns,))
    assert broadcast((3, 1), layout) == ((rows,), ())
    assert broadcast((1, 1, 1, 4), layout) == ((), (), (), (columns,))
    assert broadcast((5, 2, 3, 4), layout) is None
    assert broadcast((2, 3, 4), ((), (rows,), (columns,))) is None


@pytest.mark.parametrize("seed", range(200))
def test_arranging_is_what_indexing_says(seed: int) -> None:
    """Random axes, merged at random into dims, in random order, to other groups."""
    choice = random.Random(seed)
    axes = [Axis(choice.choice([1, 2, 3, 4])) for _ in range(choice.randint(1, 5))]
    present = [axis for axis in axes if choice.random() < 0.8] or axes[:1]
    order = choice.sample(present, len(present))
    layout = tuple(_merged(order, choice))
    target = _merged(choice.sample(axes, len(axes)), choice)
    numbers = torch.arange(_count(present)).reshape([_count(dim) for dim in layout])
    value = arrange("x", layout, target, Sizes({}))  # type: ignore[arg-type]
    assert value is not None
    _check(_evaluate(value, numbers), numbers, order, target)


def _merged(axes: list[Axis], choice: random.Random) -> list[tuple[Axis, ...]]:
    dims: list[tuple[Axis, ...]] = []
    for axis in axes:
        if dims and choice.random() < 0.4:
            dims[-1] += (axis,)
        else:
            dims.append((axis,))
    if choice.random() < 0.3:
        dims.insert(choice.randint(0, len(dims)), ())
    return dims


def _count(axes: object) -> int:
    total = 1
    for axis in axes:  # type: ignore[attr-defined]
        total *= axis.size
    return total


def _check(
    actual: Tensor, numbers: Tensor, order: list[Axis], target: list[tuple[Axis, ...]]
) -> None:
    """Every entry of the result, found by its index along each axis."""
    names = {axis: letter for axis, letter in zip(order, "abcdefg", strict=False)}
    expanded = numbers.reshape([axis.size for axis in order])
    wanted = [axis for group in target for axis in group]
    source = torch.einsum(
        "".join(names[axis] for axis in order)
        + "->"
        + "".join(names[axis] for axis in wanted if axis in names),
        expanded,
    )
    for at, axis in enumerate(wanted):
        if axis not in names:
            source = source.unsqueeze(at)
    groups = [
        group if any(axis in names for axis in group) else tuple(Axis(1) for _ in group)
        for group in target
    ]
    full = source.expand([axis.size for group in groups for axis in group])
    assert torch.equal(actual, full.reshape([_count(group) for group in groups]))


def _evaluate(value: object, numbers: Tensor) -> Tensor:
    if not isinstance(value, Apply):
        return numbers
    source, *rest = value.args
    result: Tensor = value.target(_evaluate(source, numbers), *rest)
    return result
