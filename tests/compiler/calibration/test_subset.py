"""A subset of a call is the call: exact attention of it is a slice of the whole output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sage_compiler.calibration.probe import Call
from sage_compiler.calibration.subset import Subset
from sage_compiler.errors import InvalidOptionError
from sage_compiler.precision import EXACT
from sage_compiler.semantics import DeadRows, MaskClass, Semantics
from tests.compiler.kernels.dense import random_call
from tests.tolerances import rel_l1

BLOCK = 128


def random(seed: int) -> Call:
    call = random_call(seed, longest=700)
    return made(
        query=call.query.float(),
        key=call.key.float(),
        value=call.value.float(),
        attn_mask=call.attn_mask,
        sinks=call.sinks,
        semantics=call.semantics,
    )


def made(heads: int = 4, kv_heads: int = 4, length: int = 600, **other: Any) -> Call:
    query, key, value = (
        torch.randn(1, number, length, 16) for number in (heads, kv_heads, kv_heads)
    )
    return replace(Call("layer", "", query, key, value, None, None, Semantics()), **other)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def origin(part: Call, call: Call) -> tuple[list[int], list[int]]:
    """Which heads and queries of a call are in a part of it; no two queries are the same."""
    first = part.query[0, :, None, :1] == call.query[0, None]  # (heads of part, heads, Lq, D)
    heads = first.all(-1).any(-1).int().argmax(1)
    rows = part.query[0, 0, :, None] == call.query[0, heads[0], None]  # (Lq of part, Lq, D)
    return heads.tolist(), rows.all(-1).int().argmax(1).tolist()


def check(call: Call, subset: Subset) -> tuple[list[int], list[int]]:
    """Exact attention of the part is the slice of exact attention of the whole."""
    part = subset.of(call)
    heads, rows = origin(part, call)
    expected = call.run(EXACT)[:, heads][:, :, rows]
    torch.testing.assert_close(part.run(EXACT), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    return heads, rows


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_calls(first: int) -> None:
    for seed in range(first, first + 10):
        heads, queries = seed % 5 or None, (1, 130, 300, None)[seed % 4]
        check(random(seed), Subset(heads, queries))


@pytest.mark.parametrize("mask_class", MaskClass)
@pytest.mark.parametrize("lengths", [(600, 600), (600, 200), (300, 700)], ids=str)
@pytest.mark.parametrize("dead_rows", DeadRows)
def test_bands(mask_class: MaskClass, lengths: tuple[int, int], dead_rows: DeadRows) -> None:
    window = {"window_left": 20, "window_right": 3} if "window" in mask_class else {}
    call = made(
        query=torch.randn(1, 2, lengths[0], 16),
        key=torch.randn(1, 2, lengths[1], 16),
        value=torch.randn(1, 2, lengths[1], 16),
        semantics=Semantics(mask_class=mask_class, dead_rows=dead_rows, **window),
    )
    _, rows = check(call, Subset(queries=200))
    assert len(rows) >= 2 * BLOCK - (BLOCK - 1) and rows[0] == 0


@pytest.mark.parametrize(
    "shape",
    [
        (600,),
        (1, 600),
        (600, 1),
        (600, 600),
        (4, 1, 600),
        (4, 600, 600),
        (1, 600, 600),
        (1, 4, 600, 1),
        (1, 1, 1, 600),
        (1, 4, 600, 600),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("mask_class", [MaskClass.NONE, MaskClass.CAUSAL])
def test_masks_of_any_broadcast(
    shape: tuple[int, ...], is_float: bool, mask_class: MaskClass
) -> None:
    hidden = torch.rand(shape) < 0.3
    mask = torch.randn(shape).masked_fill(hidden, -torch.inf) if is_float else ~hidden
    call = made(attn_mask=mask, semantics=Semantics(mask_class=mask_class))
    check(call, Subset(heads=2, queries=BLOCK))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 8), (6, 1), (8, 4)])
@pytest.mark.parametrize("wanted", [1, 3, 5, 7])
def test_heads_are_whole_groups_about_as_many_as_wanted(
    heads: int, kv_heads: int, wanted: int
) -> None:
    call = made(heads, kv_heads, length=40, sinks=torch.randn(heads))
    kept, _ = check(call, Subset(heads=wanted))
    group = heads // kv_heads
    assert len(kept) == max(group, wanted // group * group)
    assert [head // group for head in kept[::group]] == sorted({head // group for head in kept})


@pytest.mark.parametrize("queries", [1, 128, 129, 300, 512])
def test_queries_are_whole_blocks(queries: int) -> None:
    """Those that a recipe smooths and scales together stay together."""
    _, rows = check(made(length=1000), Subset(queries=queries))
    starts = rows[::BLOCK]
    assert all(start % BLOCK == 0 for start in starts) and len(set(starts)) == len(starts)
    assert len(starts) == -(-queries // BLOCK)
    expected = [row for start in starts for row in range(start, min(start + BLOCK, 1000))]
    assert rows == expected


@pytest.mark.parametrize("subset", [Subset(), Subset(4, 600), Subset(9, 9999)], ids=str)
def test_all_of_a_call_is_the_call_itself(subset: Subset) -> None:
    call = made()
    assert subset.of(call) is call


def test_softcap_scale_and_sinks_stay() -> None:
    semantics = Semantics(softcap=2.0, scale=0.7, mask_class=MaskClass.CAUSAL)
    check(made(semantics=semantics, sinks=torch.randn(4)), Subset(2, BLOCK))


def test_quantized_blocks_of_queries_are_as_in_the_whole_call() -> None:
    """Without a band: which keys are seen, and so their statistics, is the same."""
    call = made(length=700)
    part = Subset(queries=200).of(call)
    _, rows = origin(part, call)
    whole = call.run("int4_fp8")[:, :, rows]
    assert rel_l1(part.run("int4_fp8"), whole) < 1e-5  # of several percent; sums round


@pytest.mark.parametrize("value", [0, -3, True, 1.5, "2"])
@pytest.mark.parametrize("name", ["heads", "queries"])
def test_what_is_no_number_of_them_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidOptionError, match=f"{name}={value!r}"):
        Subset(**{name: value})
