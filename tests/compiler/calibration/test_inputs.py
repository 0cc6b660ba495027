"""Inputs of any kind, gone through as often as needed, and left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sage_compiler as sage
from sage_compiler import steps
from sage_compiler.calibration.inputs import Inputs, Item
from sage_compiler.errors import InvalidOptionError

X, Y = torch.arange(3.0), torch.arange(4.0)


@pytest.fixture(autouse=True)
def _no_step() -> Iterator[None]:
    yield
    sage.set_step(None)


def arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with for the single input ``given``."""
    (item,) = Inputs([given])
    args, kwargs = item.call(lambda *args, **kwargs: (args, kwargs))
    return args, kwargs


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, Y), (X, Y), {}),
        ([X, Y], (X, Y), {}),
        ({"x": X}, (), {"x": X}),
        (((X,), {"y": Y}), (X,), {"y": Y}),
        (((), {"y": Y}), (), {"y": Y}),
        (([X], {"y": Y}), ([X], {"y": Y}), {}),  # a list is no tuple of arguments
        ((), (), {}),
        ("text", ("text",), {}),
    ],
    ids=repr,
)
def test_an_item_is_the_arguments_of_a_call(
    given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert arguments(given) == (args, kwargs)


@pytest.mark.parametrize("given", [X, {"x": X}, "text", 3, None, nn.Identity()], ids=repr)
def test_what_is_no_iterable_of_inputs_is_refused(given: Any) -> None:
    with pytest.raises(InvalidOptionError, match=r"must be an iterable.*\[\(x,\)\]"):
        Inputs(given)


def numbers(inputs: Inputs) -> list[float]:
    return [float(item.args[0]) for item in inputs]


def test_a_generator_is_drawn_once_and_kept() -> None:
    drawn = []

    def generate() -> Iterator[Tensor]:
        for number in range(4):
            drawn.append(number)
            yield torch.tensor(float(number))

    inputs = Inputs(generate())
    assert inputs.count is None and drawn == []
    first = next(iter(inputs))
    assert first.number == 0 and drawn == [0]
    for _ in range(2):
        assert numbers(inputs) == [0, 1, 2, 3]
        assert [item.number for item in inputs] == [0, 1, 2, 3]
    assert drawn == [0, 1, 2, 3]


def test_only_so_many_of_a_generator_are_kept_as_are_needed() -> None:
    inputs = Inputs(iter(torch.arange(5.0)), keep=2)
    assert numbers(inputs) == [0, 1, 2, 3, 4]
    assert numbers(inputs) == [0, 1]


def test_what_can_be_iterated_again_is_not_kept() -> None:
    passes = []

    class Again:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[Tensor]:
            passes.append(len(passes))
            return iter(torch.arange(3.0))

    inputs = Inputs(Again(), keep=1)
    assert passes == []
    assert inputs.count == 3
    assert numbers(inputs) == numbers(inputs) == [0, 1, 2]
    assert passes == [0, 1]


def test_empty() -> None:
    assert list(Inputs([])) == [] and Inputs([]).count == 0


def test_a_data_loader_of_tuples() -> None:
    loader = DataLoader(TensorDataset(torch.arange(6.0), -torch.arange(6.0)), batch_size=2)
    inputs = Inputs(loader)
    assert inputs.count == 3
    for item, start in zip(inputs, (0.0, 2.0, 4.0), strict=True):
        a, b = item.args
        assert a.tolist() == [start, start + 1] and b.tolist() == (-a).tolist()


# --- random numbers


def shuffled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(100.0)), batch_size=1, shuffle=True)


class Drawn:
    """Other items in each pass, from the generators that programs share."""

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(5):
            yield torch.rand(()) + random.random() + float(np.random.rand())


@pytest.mark.parametrize("make", [shuffled, Drawn], ids=["DataLoader", "generator"])
def test_random_inputs_are_the_same_in_each_pass(make: Any) -> None:
    given = make()
    inputs = Inputs(given)
    first = numbers(inputs)
    for item, expected in zip(inputs, first, strict=True):
        item.call(lambda _: torch.rand(7))  # noise in the model is beside the point
        assert float(item.args[0]) == expected
    next(iter(inputs))  # a pass that ends early
    assert numbers(inputs) == first
    assert [
        float(torch.as_tensor(each[0] if make is shuffled else each)) for each in given
    ] != first


def test_the_users_random_numbers_go_on_as_after_one_pass() -> None:
    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    def drawn_after(inputs: Any, passes: int) -> list[tuple[float, float, float]]:
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        first = list(inputs)
        between = drawn()
        for _ in range(passes - 1):
            assert len(list(inputs)) == len(first)
        return [between, drawn()]

    assert drawn_after(Inputs(Drawn()), passes=3) == drawn_after(Drawn(), passes=1)


def test_noise_in_the_model_repeats_for_an_item_and_differs_between_items() -> None:
    dropout = nn.Dropout(0.5)
    ones = torch.ones(64)
    first, second = Inputs([ones, ones])
    again = first.call(dropout)
    torch.rand(5)
    assert torch.equal(first.call(dropout), again)
    assert not torch.equal(second.call(dropout), again)


def test_a_call_leaves_the_random_state_alone_and_records_no_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)
    (item,) = Inputs([X])
    state = torch.get_rng_state()
    output = item.call(lambda x: x * weight * torch.rand(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not output.requires_grad


# --- steps


def stepping(total: int) -> Iterator[Tensor]:
    for step in range(total):
        sage.set_step(step, total)
        yield torch.tensor(float(step))


class Stepping:
    def __iter__(self) -> Iterator[Tensor]:
        return stepping(3)


@pytest.mark.parametrize("make", [lambda: stepping(3), Stepping], ids=["once", "again"])
def test_steps_are_recorded_when_drawn_and_set_in_every_call(make: Any) -> None:
    inputs = Inputs(make())
    for _ in range(2):
        seen = []
        for item in inputs:
            sage.set_step(0, 77)  # whatever happened meanwhile
            seen.append(item.call(lambda _: steps.position()))
        assert seen == [(0, 3), (1, 3), (2, 3)]


def test_without_a_step_there_is_none_in_the_call() -> None:
    (item,) = Inputs([X])
    sage.set_step(1, 2)
    assert item.call(lambda _: steps.position()) is None


# --- the item is left as it was


class Cache:
    """Grows with each call, as a cache of keys and values does."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = [torch.zeros(1)]


def test_a_cache_is_copied_for_every_call_and_tensors_are_not() -> None:
    cache = Cache()
    (item,) = Inputs([((X,), {"cache": cache, "again": [cache]})])

    def model(x: Tensor, cache: Cache, again: list[Cache]) -> int:
        assert x is X
        assert again[0] is cache  # what was one object is one
        cache.seen[0].add_(1)
        cache.seen.append(x)
        return len(cache.seen)

    assert [item.call(model) for _ in range(3)] == [2, 2, 2]
    assert len(cache.seen) == 1 and cache.seen[0] == 0


@pytest.mark.parametrize("container", [[], {}, ([],), {"past": []}], ids=repr)
def test_a_container_that_the_model_fills_is_empty_again(container: Any) -> None:
    item = Item(0, (container,), {}, None)

    def fill(given: Any) -> None:
        given = given[0] if isinstance(given, tuple) else given
        given = given.get("past", given) if isinstance(given, dict) else given
        if isinstance(given, dict):
            given["x"] = X
        else:
            given.append(X)

    before = repr(container)
    item.call(fill)
    assert repr(container) == before


def test_tensors_with_a_history_beside_a_cache() -> None:
    """PyTorch refuses to copy them."""
    x = torch.ones(2, requires_grad=True) * 2
    (item,) = Inputs([(x, Cache())])
    assert item.call(lambda given, _: given is x)


def test_modules_are_passed_as_they_are() -> None:
    module = nn.Linear(1, 1)
    (item,) = Inputs([(module, X)])
    assert item.call(lambda given, _: given is module)


def test_a_cache_of_transformers_is_copied() -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    cache = cache_utils.DynamicCache()
    key = torch.ones(1, 1, 2, 4)
    cache.update(key, key, 0)
    (item,) = Inputs([{"past_key_values": cache}])

    def model(past_key_values: Any) -> int:
        past_key_values.update(key, key, 0)
        return int(past_key_values.get_seq_length())

    assert [item.call(model), item.call(model)] == [4, 4]
    assert cache.get_seq_length() == 2
