"""The operator library's kernels, in ONNX Runtime, against attention from its formula."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import product
from math import inf, nan

import pytest
import torch

from sage_compiler.kernels import reference
from sage_compiler.kernels.cpu import gate, kernel
from sage_compiler.precision import PRECISIONS, RECIPES
from sage_compiler.semantics import DTYPES, DeadRows, MaskClass, Semantics
from tests.compiler.calls import make_call
from tests.compiler.kernels.dense import Call, dense, random_call
from tests.compiler.onnx.runtime.models import LIBRARY, inputs_of, run
from tests.tolerances import check, check_lse

# recipe -> what serves it: the nearest that is not less accurate.
SERVED = {
    "int4_fp8": "int8_int8",
    "int4_fp16": "int8_int8",
    "int8_fp8": "int8_int8",
    "int8_int8": "int8_int8",
    "int8_fp16": "int8_int16",
    "int8_int16": "int8_int16",
    "exact": "exact",
}
# In float16 and bfloat16 an output is rounded once more, which check() allows for.


def verify(call: Call, *recipes: str) -> None:
    """One call is within the tolerance of what serves each recipe."""
    expected, expected_lse = dense(call)
    for recipe in recipes:
        output, lse = run(call, recipe)
        check(output, expected, call.value, SERVED[recipe])
        check_lse(lse, expected_lse, SERVED[recipe])


def assert_same(call: Call, other: Call, recipe: str) -> None:
    """Two calls give the same bits."""
    for actual, expected in zip(run(call, recipe), run(other, recipe), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_random_calls(first: int) -> None:
    for seed in range(first, first + 15):
        verify(random_call(seed), "exact", "int8_int8", "int8_int16")


def test_every_recipe_is_what_serves_it() -> None:
    call = random_call(3)
    assert set(SERVED) == set(PRECISIONS) - {"auto"}
    for recipe, serving in SERVED.items():
        for actual, expected in zip(run(call, recipe), run(call, serving), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_it_computes_what_the_pytorch_kernel_does() -> None:
    for seed, recipe in product(range(100, 108), kernel.RECIPES):
        call = random_call(seed)
        if kernel.refuse_head_dims(call.query.shape[3], call.value.shape[3]) is not None:
            continue
        inputs = (x.contiguous() for x in (call.query, call.key, call.value))
        expected = kernel.attention(
            *inputs, call.semantics, attn_mask=call.attn_mask, sinks=call.sinks, want_lse=True,
            recipe=recipe,
        )  # fmt: skip
        for actual, wanted in zip(run(call, recipe), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_quantized_calls_are_near_the_reference() -> None:
    """Nearer than to the formula: both round the same numbers."""
    for seed in range(110, 118):
        call = random_call(seed)
        expected, _ = reference.attention(
            call.query, call.key, call.value, RECIPES["int8_int16"], call.semantics,
            attn_mask=call.attn_mask, sinks=call.sinks,
        )  # fmt: skip
        output, _ = run(call, "int8_int16")
        assert torch.equal(output.isnan(), expected.isnan())
        error = (output.double() - expected.double()).nan_to_num().abs()
        rounding = torch.finfo(output.dtype).eps
        assert float(error.max()) <= (1e-2 + rounding) * float(call.value.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "head_dims",
    [
        (0, 8),
        (1, 1),
        (7, 7),
        (8, 8),
        (50, 50),
        (100, 33),
        (64, 0),
        (16, 250),
        (257, 257),
        (40, 600),
    ],
    ids=str,
)
def test_head_dims(head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    head_dim, value_dim = head_dims
    call = make_call(
        41, 140, batch=1, heads=4, kv_heads=2, head_dim=head_dim, value_dim=value_dim, dtype=dtype
    )
    scale = max(head_dim, 1) ** -0.5
    call = replace(call, semantics=Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT, scale=scale))
    if max(head_dims) <= 256:
        verify(call, "exact", "int8_int8")
    else:  # the quantized kernel does not take it: float arithmetic, the more accurate
        verify(call, "exact")
        for actual, expected in zip(run(call, "int8_int8"), run(call, "exact"), strict=True):
            assert torch.equal(actual, expected)


# From one query to where keys are transposed and beyond a task of 128 rows.
@pytest.mark.parametrize("lengths", [(1, 1), (1, 700), (3, 129), (5, 64), (9, 127), (17, 257),
                                     (33, 33), (300, 70)], ids=str)  # fmt: skip
def test_float_lengths(lengths: tuple[int, int]) -> None:
    for dtype, heads in product(DTYPES, ((2, 2), (4, 1))):
        call = make_call(*lengths, heads=heads[0], kv_heads=heads[1], head_dim=40, dtype=dtype)
        verify(call, "exact")
        verify(replace(call, semantics=Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT)), "exact")


@pytest.mark.parametrize("recipe", ["exact", "int8_int8"])
def test_masks_and_sinks_of_any_type(recipe: str) -> None:
    generator = torch.Generator().manual_seed(0)
    call = make_call(20, 70, batch=2, heads=4, kv_heads=2, head_dim=32)
    mask = torch.randn(2, 1, 20, 70, generator=generator).masked_fill(
        torch.rand(2, 1, 20, 70, generator=generator) < 0.4, -inf
    )
    for dtype in DTYPES:
        sinks = torch.randn(4, generator=generator).to(dtype)
        verify(replace(call, attn_mask=mask.to(dtype), sinks=sinks), recipe)
        verify(replace(call, sinks=sinks), recipe)
    for shape in ((70,), (1,), (20, 1), (4, 1, 70), (2, 4, 20, 70), (1, 1, 1, 1)):
        shown = torch.rand(shape, generator=generator) < 0.7
        verify(replace(call, attn_mask=shown), recipe)


@pytest.mark.parametrize("recipe", ["exact", "int8_int8"])
def test_empty(recipe: str) -> None:
    for batch, query_length, key_length in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)):
        call = make_call(query_length, key_length, batch=batch, head_dim=16)
        heads = call.query.shape[1]
        for dead_rows, sinks in product(DeadRows, (None, torch.arange(heads).float())):
            semantics = Semantics(dead_rows=dead_rows)
            output, lse = run(replace(call, semantics=semantics, sinks=sinks), recipe)
            assert output.shape == (batch, heads, query_length, 16) and not output.any()
            wanted = torch.full((heads,), -inf) if sinks is None else sinks
            assert torch.equal(lse, wanted.view(1, -1, 1).expand(batch, heads, query_length))


@pytest.mark.parametrize("recipe", ["exact", "int8_int8"])
@pytest.mark.parametrize("lengths", [(1, 150), (4, 150), (40, 150)], ids=str)
def test_what_no_query_sees_has_no_effect(recipe: str, lengths: tuple[int, int]) -> None:
    clean = make_call(*lengths, batch=1, heads=2, kv_heads=1, head_dim=24)
    shown = torch.ones(lengths[1], dtype=torch.bool)
    shown[[0, 70, 149]] = False
    clean = replace(clean, attn_mask=shown)
    for bad in (nan, inf, -inf):
        key, value = clean.key.clone(), clean.value.clone()
        key[:, :, ~shown], value[:, :, ~shown] = bad, bad
        zeros = replace(
            clean,
            key=clean.key.masked_fill(~shown.view(-1, 1), 0),
            value=clean.value.masked_fill(~shown.view(-1, 1), 0),
        )
        assert_same(replace(clean, key=key, value=value), zeros, recipe)


@pytest.mark.parametrize("recipe", ["exact", "int8_int8"])
def test_nan_is_never_hidden(recipe: str) -> None:
    call = make_call(20, 150, batch=1, heads=2, kv_heads=1, head_dim=24)
    for place, bad in product(("query", "key", "value", "attn_mask", "sinks"), (nan, inf)):
        mask, sinks = torch.zeros(20, 150), torch.zeros(2)
        given = replace(call, attn_mask=mask, sinks=sinks, key=call.key.abs())
        given = replace(given, query=call.query.abs(), value=call.value.clone())
        tensor = getattr(given, place)
        tensor.view(-1)[0] = bad
        output, lse = run(given, recipe)
        if place == "value" and bad == inf and recipe == "exact":
            assert torch.equal(output[:, :, :, 0].isfinite().any(), torch.tensor(False))
        elif place == "sinks":
            assert output[:, 0].isnan().all() and lse[:, 0].isnan().all()
            assert output[:, 1].isfinite().all()
        else:
            assert output[:, 0, 0].isnan().any()


def test_dead_rows() -> None:
    call = make_call(20, 70, batch=1, heads=2, kv_heads=1, head_dim=24)
    shown = torch.ones(20, 70, dtype=torch.bool)
    shown[5] = False
    for recipe, dead_rows in product(("exact", "int8_int8"), DeadRows):
        semantics = Semantics(dead_rows=dead_rows)
        output, lse = run(replace(call, attn_mask=shown, semantics=semantics), recipe)
        row = output[:, :, 5]
        assert row.isnan().all() if dead_rows is DeadRows.NAN else not row.any()
        assert (lse[:, :, 5] == -inf).all()
        assert output[:, :, 4].isfinite().all()


# --- auto


def is_quantized(call: Call) -> bool:
    """Whether `auto` is, bit by bit, what the quantized kernel gives; else it is `exact`."""
    actual, _ = run(call, None)
    quantized, exact = run(call, "int8_int8")[0], run(call, "exact")[0]
    assert not torch.equal(quantized, exact)
    assert torch.equal(actual, quantized) or torch.equal(actual, exact)
    return torch.equal(actual, quantized)


def test_auto_takes_what_the_shared_table_says() -> None:
    least = gate.GATES.get(kernel.need().isa_name)
    if least is None:
        assert not is_quantized(make_call(128, 256, batch=1, heads=8, kv_heads=8, head_dim=64))
        return
    head_dim, key_length = 128, max(least.key_length, 64)
    heads = -(-least.products // (least.query_length * key_length * head_dim))
    for query_length, gains in ((least.query_length, True), (least.query_length - 1, False)):
        call = make_call(
            query_length, key_length, batch=1, heads=heads, kv_heads=heads, head_dim=head_dim
        )
        assert is_quantized(call) is gains
    if heads > 1:
        few = make_call(
            least.query_length, key_length, batch=1, heads=heads - 1, kv_heads=1, head_dim=head_dim
        )
        assert not is_quantized(few)
    # So few keys that float arithmetic is faster.
    short = make_call(256, 64, batch=2, heads=8, kv_heads=8, head_dim=56)
    assert not is_quantized(short)


def test_the_table_is_that_of_python() -> None:
    source = (LIBRARY.parent / "gate.hpp").read_text()
    rows = source.partition("kGates[] = {")[2].partition("};")[0].replace("{", "(")
    rows = rows.replace("}", ")")
    found = {name: gate.Gate(*least) for name, *least in eval(f"[{rows}]")}
    assert found == dict(gate.GATES)


def test_it_tells_what_serves_a_recipe() -> None:
    library = ctypes.CDLL(str(LIBRARY))
    library.sage_ort_served.restype = ctypes.c_char_p
    library.sage_ort_version.restype = ctypes.c_char_p
    for recipe, serving in SERVED.items():
        served = library.sage_ort_served(b"CPUExecutionProvider", recipe.encode())
        assert served.decode() == {"exact": "float"}.get(serving, serving)
    auto = library.sage_ort_served(b"CPUExecutionProvider", b"auto")
    assert auto == (b"int8_int8" if kernel.need().isa_name in gate.GATES else b"float")
    for provider, recipe in ((b"NoProvider", b"exact"), (b"CPUExecutionProvider", b"int2")):
        assert library.sage_ort_served(provider, recipe) is None
    assert library.sage_ort_served(None, None) is None
    assert library.sage_ort_version().decode().count(".") == 2


def test_inputs_are_left_alone() -> None:
    call = random_call(7)
    before = [None if x is None else x.clone() for x in inputs_of(call)]
    run(call, "int8_int8")
    for was, now in zip(before, inputs_of(call), strict=True):
        assert was is None or now is None or torch.equal(was, now)
