"""Errors of outputs, against the definitions computed in float64 without this project's code."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from sage_compiler.metrics import EXACT_ERRORS, Errors, compare, output_rel_l1, tensors

SHAPE = (2, 3, 5, 8)


def definition(actual: list[float], expected: list[float]) -> tuple[float, float, float]:
    """Cosine, relative L1 and RMSE of two flat lists, as the documentation has them."""
    pairs = []
    for a, e in zip(actual, expected, strict=True):
        if a == e or (a != a and e != e):
            pairs.append((a, e) if math.isfinite(e) else (0.0, 0.0))
        elif math.isfinite(a) and math.isfinite(e):
            pairs.append((a, e))
        else:
            return -1.0, inf, inf
    difference = math.fsum(abs(a - e) for a, e in pairs)
    if not difference:
        return 1.0, 0.0, 0.0
    size = math.fsum(abs(e) for _, e in pairs)
    lengths = math.hypot(*(a for a, _ in pairs)), math.hypot(*(e for _, e in pairs))
    cosine = 0.0
    if all(lengths):
        cosine = math.fsum(a / lengths[0] * (e / lengths[1]) for a, e in pairs)
    rmse = math.hypot(*(a - e for a, e in pairs)) / math.sqrt(len(pairs))
    return max(-1.0, min(1.0, cosine)), difference / size if size else inf, rmse


def by_definition(actual: Tensor, expected: Tensor) -> Errors:
    def flat(tensor: Tensor) -> list[float]:
        return [float(value) for value in tensor.double().flatten()]

    cosine, rel_l1, rmse = definition(flat(actual), flat(expected))
    heads = [
        definition(flat(a), flat(e))
        for a, e in zip(actual.flatten(0, 1), expected.flatten(0, 1), strict=True)
    ]
    return Errors(
        cosine=cosine,
        rel_l1=rel_l1,
        rmse=rmse,
        head_cosine=min(head[0] for head in heads),
        head_rel_l1=max(head[1] for head in heads),
        mean_cosine=cosine,
        mean_rel_l1=rel_l1,
    )


def assert_errors(found: Errors, wanted: Errors) -> None:
    for name, value in dataclasses.asdict(wanted).items():
        # A cosine of 1 - 1e-12 is 1 to anyone: absolute. The rest is relative, down to nothing.
        limits = {"abs": 1e-9} if "cosine" in name else {"rel": 1e-6, "abs": 0.0}
        assert getattr(found, name) == pytest.approx(value, **limits), name


def random(scale: float = 1.0) -> Tensor:
    return torch.randn(SHAPE) * scale


def put(value: float, *, head: int = 1, row: int | slice = 2) -> Callable[[Tensor], Tensor]:
    """A copy with this value in one row, or all, of one head of the second sequence."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[1, head, row] = value
        return changed

    return change


def keep(tensor: Tensor) -> Tensor:
    return tensor


EVERYWHERE = slice(None)

# name -> (what becomes of the quantized output, what of the exact one)
HOSTILE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "nothing special": (keep, keep),
    "a row is NaN in both": (put(nan), put(nan)),
    "a row is NaN in one": (put(nan), keep),
    "a row is NaN in the other": (keep, put(nan)),
    "the same infinity": (put(inf), put(inf)),
    "infinities of two signs": (put(inf), put(-inf)),
    "an infinity and a number": (put(-inf), keep),
    "a number and an infinity": (keep, put(inf)),
    "an infinity and NaN": (put(inf), put(nan)),
    "a head of zeros in both": (put(0, row=EVERYWHERE), put(0, row=EVERYWHERE)),
    "a head of zeros in one": (put(0, row=EVERYWHERE), keep),
    "a head of zeros in the other": (keep, put(0, row=EVERYWHERE)),
    "dead rows are zero": (put(0), put(0)),
    "all zeros in both": (torch.zeros_like, torch.zeros_like),
    "all zeros in one": (torch.zeros_like, keep),
    "all zeros in the other": (keep, torch.zeros_like),
    "all NaN in both": (lambda x: x * nan, lambda x: x * nan),
    "of opposite sign": (torch.neg, keep),
    "one head is wrong": (put(3.0, row=EVERYWHERE), keep),
    "one head is tiny, and wrong": (
        lambda x: put(0, row=EVERYWHERE)(x) + put(2e-30, row=EVERYWHERE)(x * 0),
        lambda x: put(0, row=EVERYWHERE)(x) + put(-1e-30, row=EVERYWHERE)(x * 0),
    ),
    "scaled": (lambda x: 0.5 * x, keep),
}


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30], ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_errors_are_those_of_the_definition(name: str, scale: float) -> None:
    torch.manual_seed(0)
    of_actual, of_expected = HOSTILE[name]
    exact = random(scale)
    actual, expected = of_actual(exact + random(0.01 * scale)), of_expected(exact)
    assert_errors(compare(actual, expected), by_definition(actual, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_of_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expected = random(1000.0).to(dtype)  # a square is beyond float16
    actual = (expected.float() + random(10.0)).to(dtype)
    assert_errors(compare(actual, expected), by_definition(actual, expected))


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 1), (3, 1, 7, 2), (1, 4, 1, 8)], ids=str)
def test_errors_do_not_depend_on_strides(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch, heads, length, dim = shape
    expected = torch.randn(batch, length, heads, 2 * dim)[..., ::2].transpose(1, 2)
    actual = (expected + 0.1 * torch.randn(shape)).transpose(-1, -2).contiguous().mT
    assert_errors(compare(actual, expected), by_definition(actual, expected))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)], ids=str)
def test_empty_outputs_agree(shape: tuple[int, ...]) -> None:
    assert compare(torch.empty(shape), torch.empty(shape)) == EXACT_ERRORS


def test_equal_outputs_have_no_error_at_all() -> None:
    output = random()
    assert compare(output, output.clone()) == EXACT_ERRORS


def test_one_wrong_head_shows_among_many() -> None:
    torch.manual_seed(0)
    expected = torch.randn(1, 100, 4, 8)
    actual = expected.clone()
    actual[0, 17] = -actual[0, 17]
    found = compare(actual, expected)
    assert found.head_cosine == -1.0 and found.head_rel_l1 == pytest.approx(2.0)
    assert found.cosine > 0.97 and found.rel_l1 < 0.03


def test_inputs_stay_what_they_were() -> None:
    actual, expected = put(nan)(random()), put(nan)(random())
    copies = actual.clone(), expected.clone()
    compare(actual, expected)
    for tensor, copy in zip((actual, expected), copies, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


# --- over many calls ------------------------------------------------------------------------

values = st.floats(0, 10)
cosines = st.floats(-1, 1)
errors = st.builds(
    Errors, cosines, values, values, cosines, values, cosines, values, st.integers(1, 1000)
)


@given(errors, errors, errors)
def test_joining_is_associative_and_commutative(a: Errors, b: Errors, c: Errors) -> None:
    joined = a.join(b).join(c)
    assert_errors(a.join(b.join(c)), joined)
    assert_errors(c.join(b).join(a), joined)


def test_joining_keeps_the_worst_and_averages_by_calls() -> None:
    good = Errors(0.9, 0.1, 0.01, 0.8, 0.2, 0.95, 0.05, calls=3)
    bad = Errors(0.5, 0.6, 0.02, 0.7, 0.3, 0.55, 0.45, calls=1)
    joined = good.join(bad)
    assert joined == Errors(
        0.5, 0.6, 0.02, 0.7, 0.3, pytest.approx(0.85), pytest.approx(0.15), calls=4
    )


def test_an_infinite_error_stays_infinite() -> None:
    broken = compare(put(nan)(random()), random())
    joined = EXACT_ERRORS.join(broken).join(EXACT_ERRORS)
    assert (joined.cosine, joined.rel_l1, joined.rmse) == (-1.0, inf, inf)
    assert joined.mean_rel_l1 == inf and joined.mean_cosine == pytest.approx(1 / 3)


MEASURED = Errors(0.95, 0.1, 0.01, 0.9, 0.2, 0.96, 0.05)


@pytest.mark.parametrize(
    "limits, words",
    [
        ({}, None),
        ({"cosine": 0.95, "rel_l1": 0.1, "rmse": 0.01}, None),  # a limit itself is kept
        ({"cosine": 0.951}, "cosine 0.950000 is below 0.951"),
        ({"rel_l1": 0.09}, "rel_l1 0.1 is above 0.09"),
        ({"rmse": 0.001}, "rmse 0.01 is above 0.001"),
        ({"head_cosine": 0.92}, "head_cosine 0.900000 is below 0.92"),
        ({"head_rel_l1": 0.1}, "head_rel_l1 0.2 is above 0.1"),
        ({"cosine": 0.9, "rel_l1": 0.01, "rmse": 0}, "rel_l1 0.1 is above 0.01"),
        ({"cosine": nan}, "cosine 0.950000 is below nan"),
    ],
    ids=str,
)
def test_limits(limits: dict[str, float], words: str | None) -> None:
    assert MEASURED.beyond(limits) == words


@pytest.mark.parametrize("name", ["cosine", "rel_l1", "rmse", "head_cosine", "head_rel_l1"])
def test_what_is_no_number_is_beyond_every_limit(name: str) -> None:
    broken = dataclasses.replace(MEASURED, **{name: nan})
    assert broken.beyond({name: -1.0 if "cosine" in name else inf}) is not None


# --- outputs of models ----------------------------------------------------------------------


@dataclass
class Plain:
    """As users write them: no pytree of torch's knows of it."""

    sample: Tensor
    note: str = "text"


def one(size: int) -> Tensor:
    return torch.full((size,), float(size))


@pytest.mark.parametrize(
    "output, sizes",
    [
        (one(2), [2]),
        ((one(2), [one(1), (one(3),)]), [2, 1, 3]),
        ({"b": one(2), "a": {"c": one(1)}}, [2, 1]),
        ((None, 3, "text", True, one(1)), [1]),
        ((torch.arange(4), torch.tensor([True]), one(1)), [1]),  # not floating point
        (BaseModelOutput(last_hidden_state=one(3), hidden_states=(one(1), one(2))), [3, 1, 2]),
        (BaseModelOutput(last_hidden_state=one(3)), [3]),
        (Plain(one(2)), [2]),
        ([Plain(one(2)), {"x": Plain((one(1), one(3)))}], [2, 1, 3]),  # type: ignore[arg-type]
        ((), []),
        (None, []),
    ],
    ids=lambda value: value.__class__.__name__,
)
def test_tensors_of_an_output(output: Any, sizes: list[int]) -> None:
    assert [tensor.numel() for tensor in tensors(output)] == sizes


def t(*values: float) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    "actual, expected, wanted",
    [
        ([t(1.0, 2.0)], [t(1.0, 2.0)], 0.0),
        ([t(1.0, 3.0)], [t(1.0, 1.0)], 1.0),
        ([t(1.0), t(2.0)], [t(1.0), t(1.0)], 1.0),  # the worst, which a large one may not hide
        ([t(2.0), t(1e6)], [t(1.0), t(1e6)], 1.0),
        ([t(0.0)], [t(0.0)], 0.0),
        ([t(1.0)], [t(0.0)], inf),
        ([t(nan, 1.0)], [t(nan, 1.0)], 0.0),
        ([t(nan, 1.0)], [t(1.0, 1.0)], inf),
        ([t(1.0, 1.0)], [t(nan, 1.0)], inf),
        ([t(inf, 2.0)], [t(inf, 1.0)], 1.0),
        ([t(inf)], [t(-inf)], inf),
        ([t(inf)], [t(1.0)], inf),
        ([t(3e38)], [t(-3e38)], 2.0),  # the difference is beyond float32
        ([t(2e-45)], [t(1e-45)], 0.0),  # of float32, the same
        ([t(6e-45)], [t(3e-45)], 1.0),
        ([torch.empty(0)], [torch.empty(0)], 0.0),
        ([], [], 0.0),
    ],
    ids=str,
)
def test_relative_l1_of_outputs(
    actual: list[Tensor], expected: list[Tensor], wanted: float
) -> None:
    assert output_rel_l1(actual, expected) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    "actual, expected",
    [([t(1.0)], []), ([], [t(1.0)]), ([t(1.0)], [t(1.0, 2.0)]), ([t(1.0)], [t(1.0)[None]])],
    ids=str,
)
def test_outputs_of_other_tensors_are_refused(actual: list[Tensor], expected: list[Tensor]) -> None:
    with pytest.raises(ValueError):
        output_rel_l1(actual, expected)


def test_half_precision_outputs_are_summed_in_float64() -> None:
    expected = [torch.full((4096,), 60000.0, dtype=torch.float16)]
    actual = [expected[0] - 32.0]
    assert output_rel_l1(actual, expected) == pytest.approx(32 / 60000)
    assert output_rel_l1(tensors({"x": actual}), itertools.chain(expected)) > 0
