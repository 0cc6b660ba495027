"""The operator's forward: values, layouts, fakes, errors, what it leaves alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from sage_compiler import ops
from sage_compiler.errors import InvalidAttentionError, InvalidOptionError
from sage_compiler.kernels import exact, reference, registry
from sage_compiler.kernels.kernel import Gate, Kernel
from sage_compiler.precision import RECIPES
from sage_compiler.semantics import DeadRows, MaskClass, Semantics
from tests.compiler.calls import (
    LAYOUTS,
    attention,
    attention_lse,
    gaussian,
    laid_out,
    make_call,
    options,
    run,
    run_lse,
)
from tests.compiler.kernels.dense import Call, class_mask, dense, random_call
from tests.tolerances import TOLERANCES, check, check_lse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FINFO_MIN = torch.finfo(torch.float32).min
WINDOW = Semantics(mask_class=MaskClass.WINDOW, window_left=2, window_right=1)

every_recipe = pytest.mark.parametrize("recipe", ["exact", *RECIPES])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Emulation warns once per process; one test is about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*emulates it.*")
        warnings.filterwarnings("ignore", message=".*batching rule.*")
        yield


# --- opcheck: schema, fake, autograd registration, AOT with dynamic shapes


def _differentiable(call: Call) -> Call:
    """The same call with gradients wanted everywhere."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().requires_grad_()

    return Call(
        *(tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)),
        semantics=call.semantics,
        attn_mask=leaf(call.attn_mask),
        sinks=leaf(call.sinks),
    )


def _opcheck_calls() -> dict[str, Call]:
    plain = make_call(3, 5)
    gqa = make_call(5, kv_heads=2)
    bools = gaussian(2, 4, 3, 5, seed=7) > -0.5
    floats = gaussian(2, 4, 3, 5, seed=8)
    calls = {
        "plain": plain,
        "plain with gradients": _differentiable(plain),
        "bool mask (B, H, Lq, Lk)": replace(plain, attn_mask=bools),
        "bool mask (Lk,)": replace(plain, attn_mask=bools[0, 0, 0]),
        "bool mask (B, 1, 1, Lk), stride 0": replace(
            plain, attn_mask=bools[:, :1, :1].expand(2, 4, 3, 5)
        ),
        "float mask (Lq, Lk)": replace(plain, attn_mask=floats[0, 0]),
        "float mask (B, 1, Lq, Lk) with gradients": _differentiable(
            replace(plain, attn_mask=floats[:, :1])
        ),
        "gqa with gradients": _differentiable(gqa),
        "everything with gradients": _differentiable(
            replace(
                make_call(3, 5, kv_heads=2, value_dim=6),
                semantics=replace(WINDOW, softcap=3.0, scale=0.3),
                attn_mask=floats,
                sinks=gaussian(4, seed=9),
            )
        ),
        "Dv != D": make_call(3, 5, value_dim=12),
        "dead rows would be NaN": replace(
            make_call(3, 5),
            semantics=Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT, dead_rows=DeadRows.NAN),
        ),
    }
    for mask_class in MaskClass:
        semantics = WINDOW if "window" in mask_class else Semantics()
        calls[f"class {mask_class}"] = replace(
            plain, semantics=replace(semantics, mask_class=mask_class)
        )
    for layout in LAYOUTS:
        calls[f"layout {layout}"] = make_call(3, 5, layout=layout)
    for dtype in DTYPES[1:]:
        calls[str(dtype)] = _differentiable(make_call(3, 5, dtype=dtype))
    return calls


@pytest.mark.parametrize("name", _opcheck_calls())
def test_opcheck(name: str) -> None:
    call = _opcheck_calls()[name]
    for operator in (attention, attention_lse):
        opcheck(operator, (call.query, call.key, call.value), options(call))


@every_recipe
def test_opcheck_recipes(recipe: str) -> None:
    call = _differentiable(make_call(3, 5))
    tensors = (call.query, call.key, call.value)
    for operator in (attention, attention_lse):
        opcheck(operator, tensors, {"recipe": recipe})


def test_opcheck_sequences_and_steps() -> None:
    call = _differentiable(make_call(6, batch=1))
    tensors = (call.query, call.key, call.value)
    offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    table = {"step": torch.tensor(1), "step_recipes": ["exact", "int8_fp8"]}
    for operator in (attention, attention_lse):
        opcheck(operator, tensors, {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets})
        opcheck(operator, tensors, table)


def test_opcheck_backward() -> None:
    for layout in ("contiguous", "tokens_first", "expanded_heads"):
        call = make_call(3, 5, layout=layout)
        mask, sinks = gaussian(3, 5, seed=7), gaussian(4, seed=8)
        opcheck(
            torch.ops.sage.attention_backward.default,
            (
                torch.ones(()).expand(2, 4, 3, 8), torch.ones(2, 4, 3), call.query, call.key,
                call.value, mask, sinks, None, None, "causal", None, "zero", 2.0, -1, -1,
                [True, False, True, True, True],
            ),
        )  # fmt: skip


# --- values


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_exact_is_attention(first: int) -> None:
    for seed in range(first, first + 20):
        call = random_call(seed, longest=60)
        expected, expected_lse = dense(call)
        check(run(call), expected, call.value, "exact")
        output, lse = run_lse(call)
        check(output, expected, call.value, "exact")
        check_lse(lse, expected_lse, "exact")
        assert lse.dtype == torch.float32 and output.dtype == call.query.dtype


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_attention_within_their_tolerance(recipe: str) -> None:
    for seed in range(100, 112):
        call = random_call(seed, longest=80)
        expected, expected_lse = dense(call)
        check(run(call, recipe), expected, call.value, recipe)
        output, lse = run_lse(call, recipe)
        check(output, expected, call.value, recipe)
        check_lse(lse, expected_lse, recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_the_reference(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KERNELS", [])
    call = random_call(5)
    expected = reference.attention(
        call.query, call.key, call.value, RECIPES[recipe], call.semantics,
        attn_mask=call.attn_mask, sinks=call.sinks,
    )  # fmt: skip
    for actual, wanted in zip(run_lse(call, recipe), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def test_long_queries_are_attended_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "QUERY_CHUNK", 4)
    for seed in range(20):
        call = random_call(seed, longest=30)
        expected, expected_lse = dense(call)
        output, lse = run_lse(call)
        check(output, expected, call.value, "exact")
        check_lse(lse, expected_lse, "exact")


def test_sequences_are_attended_one_by_one() -> None:
    call = make_call(9, 12, batch=1, kv_heads=2)
    starts_q, starts_k = [0, 4, 4, 9], [0, 0, 5, 12]
    cu_q, cu_k = torch.tensor(starts_q), torch.tensor(starts_k, dtype=torch.int32)
    for recipe in ("exact", "int8_fp8"):
        for semantics in (Semantics(), WINDOW, Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT)):
            packed = replace(call, semantics=semantics)
            output, lse = attention_lse(
                call.query, call.key, call.value, recipe=recipe, cu_seqlens_q=cu_q,
                cu_seqlens_k=cu_k, **options(packed),
            )  # fmt: skip
            for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
                part = Call(
                    call.query[:, :, a:b], call.key[:, :, c:d], call.value[:, :, c:d], semantics
                )
                expected, expected_lse = dense(part)
                if a < b:
                    check(output[:, :, a:b], expected, call.value, recipe)
                    check_lse(lse[:, :, a:b], expected_lse, recipe)


def test_no_sequences() -> None:
    call = make_call(0, batch=1)
    none = torch.tensor([0])
    output, lse = attention_lse(
        call.query, call.key, call.value, cu_seqlens_q=none, cu_seqlens_k=none
    )
    assert output.shape == (1, 4, 0, 8) and lse.shape == (1, 4, 0)


def test_the_step_chooses_the_recipe() -> None:
    call = make_call(40)
    table = ["exact", "int4_fp8"]
    for index, name in enumerate(table):
        output = attention(
            call.query, call.key, call.value, recipe="int8_fp16", step=torch.tensor(index),
            step_recipes=table,
        )  # fmt: skip
        assert torch.equal(output, run(call, name))


# --- layouts: what the fake promises, the operator keeps


def _fake_of(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    with FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        found = function(**fakes)
    return [found] if isinstance(found, Tensor) else list(found)


def _significant(tensor: Tensor) -> list[int | None]:
    """Strides, without those that address nothing."""
    if tensor.numel() == 0:
        return []
    return [s if n > 1 else None for n, s in zip(tensor.shape, tensor.stride(), strict=True)]


def _assert_fake_is_exact(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    found = function(**arguments)
    reals = [found] if isinstance(found, Tensor) else found
    for real, fake in zip(reals, _fake_of(function, arguments), strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
        assert _significant(real) == _significant(fake)
        assert real.storage_offset() == 0 == fake.storage_offset()


def _shapes() -> Iterator[dict[str, Any]]:
    yield {"lengths": (5, 7)}
    yield {"lengths": (5, 7), "value_dim": 3}
    yield {"lengths": (5, 7), "kv_heads": 2}
    yield {"lengths": (1, 7), "batch": 1}
    yield {"lengths": (6, 6), "heads": 1, "kv_heads": 1}
    yield {"lengths": (4, 0)}
    yield {"lengths": (0, 4)}
    yield {"lengths": (3, 3), "batch": 0}
    yield {"lengths": (5, 7), "dtype": torch.bfloat16}


@every_recipe
def test_fakes_have_the_real_layout(recipe: str) -> None:
    for shape in _shapes():
        keywords = {name: value for name, value in shape.items() if name != "lengths"}
        for layout in LAYOUTS:
            call = make_call(*shape["lengths"], layout=layout, **keywords)
            tensors = {"query": call.query, "key": call.key, "value": call.value}
            for semantics in (Semantics(), WINDOW, Semantics(softcap=2.0)):
                arguments = {
                    **tensors, **options(replace(call, semantics=semantics)), "recipe": recipe,
                }  # fmt: skip
                _assert_fake_is_exact(attention, arguments)
                _assert_fake_is_exact(attention_lse, arguments)


def test_fakes_of_random_calls_have_the_real_layout() -> None:
    for seed in range(200, 260):
        call = random_call(seed, longest=30)
        arguments = {
            "query": call.query, "key": call.key, "value": call.value, **options(call),
        }  # fmt: skip
        _assert_fake_is_exact(attention, arguments)
        _assert_fake_is_exact(attention_lse, arguments)


def test_fakes_of_the_backward_have_the_real_layout() -> None:
    for layout in LAYOUTS:
        for shape in _shapes():
            keywords = {name: value for name, value in shape.items() if name != "lengths"}
            call = make_call(*shape["lengths"], layout=layout, **keywords)
            mask = laid_out(
                gaussian(*call.query.shape[:3], call.key.shape[2], seed=3).to(call.query.dtype),
                layout,
            )
            _assert_fake_is_exact(
                torch.ops.sage.attention_backward.default,
                {
                    "grad_output": torch.ones_like(run(call)), "grad_lse": None,
                    "query": call.query, "key": call.key, "value": call.value, "attn_mask": mask,
                    "sinks": None, "cu_seqlens_q": None, "cu_seqlens_k": None,
                    "mask_class": "none", "scale": None, "dead_rows": "zero", "softcap": None,
                    "window_left": -1, "window_right": -1,
                    "needed": [True, True, layout != "sliced", True, False],
                },
            )  # fmt: skip


def test_a_transposed_projection_gives_a_transposed_output() -> None:
    call = make_call(5, 7, layout="tokens_first")
    for recipe in ("exact", "int8_fp8"):
        assert run(call, recipe).transpose(1, 2).is_contiguous()
        assert run(make_call(5, 7), recipe).is_contiguous()


# --- what a caller relies on


@every_recipe
def test_inputs_are_not_touched(recipe: str) -> None:
    for seed in range(300, 306):
        call = random_call(seed, longest=70)
        given = [call.query, call.key, call.value, call.attn_mask, call.sinks]
        tensors = [tensor for tensor in given if tensor is not None]
        before = [(tensor.clone(), tensor._version) for tensor in tensors]
        output, lse = run_lse(call, recipe)
        output.add_(1.0)
        lse.add_(1.0)
        for tensor, (value, version) in zip(tensors, before, strict=True):
            assert torch.equal(tensor, value) and tensor._version == version


def test_inference_mode_and_no_grad() -> None:
    call = make_call(5)
    expected = run(call)
    with torch.inference_mode():
        assert torch.equal(run(call), expected) and run(call).is_inference()
    with torch.no_grad():
        assert not run(_differentiable(call)).requires_grad
    assert run(_differentiable(call)).requires_grad


def test_vmap() -> None:
    call = make_call(3, 5, kv_heads=2)
    queries = gaussian(3, 2, 4, 3, 8, seed=5)
    masks = gaussian(3, 3, 5, seed=6)  # Lq, batch of vmap, Lk
    for recipe in ("exact", "int8_fp8"):
        batched = torch.vmap(
            lambda q, m, recipe=recipe: attention(q, call.key, call.value, m, recipe=recipe),
            in_dims=(0, 1),
        )(queries, masks)
        for index, output in enumerate(batched):
            one = replace(call, query=queries[index], attn_mask=masks[:, index])
            check(output, dense(one)[0], call.value, recipe)


def test_forward_mode_is_refused_rather_than_zero() -> None:
    call = make_call(3)
    for recipe in ("exact", "int8_fp8"):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(
                lambda q, recipe=recipe: run(replace(call, query=q), recipe),
                (call.query,),
                (call.query,),
            )


# --- autocast


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_autocast_is_that_of_sdpa(mask: str | None) -> None:
    call = make_call(5)
    masks = {"bool": gaussian(5, 5, seed=3) > 0, "float": gaussian(5, 5, seed=3)}
    attn_mask = None if mask is None else masks[mask]
    for cast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=cast):
            for dtypes in ((torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float16)):
                q, k, v = (
                    tensor.to(dtype)
                    for tensor, dtype in zip(
                        (call.query, call.key, call.value), dtypes, strict=True
                    )
                )
                output = attention(q, k, v, attn_mask)
                expected = F.scaled_dot_product_attention(q, k, v, attn_mask)
                assert output.dtype == expected.dtype == cast
                assert torch.equal(output, expected)
                found = attention_lse(q, k, v, attn_mask)
                with torch.autocast("cpu", enabled=False):
                    is_float = attn_mask is not None and attn_mask.is_floating_point()
                    mask_cast = attn_mask.to(cast) if is_float else attn_mask
                    wanted = attention_lse(q.to(cast), k.to(cast), v.to(cast), mask_cast)
                assert [x.dtype for x in found] == [cast, torch.float32]
                assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert run(call).dtype == torch.float32


# --- dead rows, garbage, NaN, nothing to attend to


@every_recipe
def test_dead_rows(recipe: str) -> None:
    call = make_call(70, 130)
    visible = torch.ones(70, 130, dtype=torch.bool)
    visible[3] = visible[69] = False
    additive = torch.zeros(70, 130).masked_fill(~visible, -inf)
    for mask in (visible, additive):
        for dead, wanted in ((DeadRows.ZERO, 0.0), (DeadRows.NAN, nan)):
            for softcap in (None, 4.0):
                output, lse = run_lse(
                    replace(
                        call, attn_mask=mask, semantics=Semantics(dead_rows=dead, softcap=softcap)
                    ),
                    recipe,
                )
                rows = output[:, :, [3, 69]]
                torch.testing.assert_close(rows, torch.full_like(rows, wanted), equal_nan=True)
                assert (lse[:, :, [3, 69]] == -inf).all()
                others = torch.arange(70)[(torch.arange(70) != 3) & (torch.arange(70) != 69)]
                assert output[:, :, others].isfinite().all() and lse[:, :, others].isfinite().all()


@every_recipe
def test_dead_rows_of_a_band(recipe: str) -> None:
    call = make_call(9, 4)
    for dead, wanted in ((DeadRows.ZERO, 0.0), (DeadRows.NAN, nan)):
        semantics = Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT, dead_rows=dead)
        banded = replace(call, semantics=semantics)
        output = run(banded, recipe)
        dead_rows = output[:, :, :5]
        torch.testing.assert_close(
            dead_rows, torch.full_like(dead_rows, wanted), rtol=0, atol=0, equal_nan=True
        )
        check(output, dense(banded)[0], call.value, recipe)


@every_recipe
def test_a_finite_mask_over_a_whole_row_is_a_uniform_average(recipe: str) -> None:
    call = replace(make_call(4, 6), attn_mask=torch.full((4, 6), FINFO_MIN))
    output = run(call, recipe)
    check(output, call.value.mean(2, keepdim=True).expand_as(output), call.value, recipe)


@every_recipe
def test_garbage_in_masked_slots(recipe: str) -> None:
    call = make_call(8, 100)
    # As in scaled_dot_product_attention, 0 * NaN is NaN; a recipe never reads what nobody sees.
    garbage = (1e4, -1e4) if recipe == "exact" else (1e4, -1e4, 3e38, nan, inf)
    for mask, semantics in ((torch.arange(100) < 37, Semantics()), (None, WINDOW)):
        visible = class_mask(semantics, 8, 100).any(0) if mask is None else mask
        one = replace(call, attn_mask=mask, semantics=semantics)
        clean = run(one, recipe)
        for number in garbage:
            key, value = (
                torch.where(visible.unsqueeze(-1), tensor, number)
                for tensor in (call.key, call.value)
            )
            dirty = run(replace(one, key=key, value=value), recipe)
            torch.testing.assert_close(dirty, clean, rtol=1e-5, atol=1e-5)


def test_nan_and_inf_go_where_they_go_in_sdpa() -> None:
    call = make_call(6, 6)
    for name in ("query", "key", "value"):
        for bad in (nan, inf, -inf):
            spoiled = getattr(call, name).clone()
            spoiled[0, 1, 2, 3] = bad
            one = replace(call, **{name: spoiled})
            for is_causal in (False, True):
                semantics = Semantics(MaskClass.CAUSAL if is_causal else MaskClass.NONE)
                expected = F.scaled_dot_product_attention(
                    one.query, one.key, one.value, is_causal=is_causal
                )
                output = run(replace(one, semantics=semantics))
                torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_that_is_seen_stays_nan(recipe: str) -> None:
    call = make_call(6, 6)
    for name in ("query", "key", "value"):
        spoiled = getattr(call, name).clone()
        spoiled[0, 1, 2, 3] = nan
        one = replace(call, **{name: spoiled})
        expected = F.scaled_dot_product_attention(one.query, one.key, one.value)
        output = run(one, recipe)
        # Quantization shares scales between tokens, so NaN may spread, within its head.
        assert output.isnan()[expected.isnan()].all()
        assert output[1].isfinite().all() and output[0, [0, 2, 3]].isfinite().all()


@every_recipe
def test_all_zero_blocks(recipe: str) -> None:
    call = make_call(130, 200)
    for name in ("query", "key", "value"):
        zeroed = getattr(call, name).clone()
        zeroed[:, :, :128] = 0.0
        zeroed[..., 0] = 0.0
        one = replace(call, **{name: zeroed})
        # Zeros of V are rounded all the same way by an INT8 with a zero point: no averages here.
        error = (run(one, recipe) - dense(one)[0]).abs().max()
        assert error <= TOLERANCES[recipe].max_abs * call.value.abs().max()
        nothing = replace(call, **{name: torch.zeros_like(zeroed)})
        check(run(nothing, recipe), dense(nothing)[0], call.value, recipe)


@every_recipe
@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": (1, 1)},
        {"lengths": (1, 77)},
        {"lengths": (129, 65)},
        {"lengths": (5, 0)},
        {"lengths": (0, 5)},
        {"lengths": (0, 0)},
        {"lengths": (4, 6), "batch": 0},
        {"lengths": (4, 6), "heads": 0, "kv_heads": 0},
        {"lengths": (4, 6), "value_dim": 0},
        {"lengths": (4, 6), "head_dim": 1},
    ],
    ids=str,
)
def test_odd_shapes(recipe: str, shape: dict[str, Any]) -> None:
    keywords = {name: value for name, value in shape.items() if name != "lengths"}
    call = make_call(*shape["lengths"], **keywords)
    for semantics in (
        Semantics(),
        Semantics(MaskClass.CAUSAL),
        Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT, dead_rows=DeadRows.NAN),
        replace(WINDOW, softcap=2.0),
    ):
        one = replace(call, semantics=semantics)
        output, lse = run_lse(one, recipe)
        assert output.shape == (*call.query.shape[:3], call.value.shape[3])
        assert lse.shape == call.query.shape[:3]
        if output.numel() == 0:
            assert run(one, recipe).shape == output.shape
            continue
        expected, expected_lse = dense(one)
        unit = torch.cat([call.value.flatten(), torch.ones(1)])  # of no keys, too
        check(output, expected, unit, recipe)
        check_lse(lse, expected_lse, recipe)
        check(run(one, recipe), expected, unit, recipe)


@every_recipe
def test_no_head_dim_is_a_uniform_average(recipe: str) -> None:
    call = replace(make_call(3, 5), query=torch.zeros(2, 4, 3, 0), key=torch.zeros(2, 4, 5, 0))
    for output in (run(call, recipe), run_lse(call, recipe)[0]):
        check(output, call.value.mean(2, keepdim=True).expand_as(output), call.value, recipe)


# --- who serves a call


class FakeKernel:
    """A kernel that counts its calls and returns its own number."""

    def __init__(self, number: float) -> None:
        self.number, self.calls = number, 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        semantics: Semantics,
        *,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        self.calls += 1
        shape = (*query.shape[:3], value.shape[3])
        lse = query.new_full(shape[:3], self.number) if want_lse else query.new_empty(0)
        return query.new_full(shape, self.number), lse


@pytest.fixture
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    run_fake = FakeKernel(42.0)
    kernel = Kernel(
        name=lambda: "fake",
        device_type="cpu",
        recipe="int8_int8",
        refuse=lambda problem: "no masks" if problem.has_mask else None,
        gate=lambda problem: Gate(query_length=10, key_length=20),
        run=run_fake,
    )
    monkeypatch.setattr(registry, "KERNELS", [kernel])
    monkeypatch.setattr(registry, "DEFAULT_RECIPES", {"cpu": lambda problem: "int8_int8"})
    return run_fake


def test_auto_is_the_default_where_it_has_a_kernel(fake_kernel: FakeKernel) -> None:
    call = make_call(10, 20)
    assert (run(call, "auto") == 42.0).all() and fake_kernel.calls == 1
    masked = replace(call, attn_mask=torch.ones(10, 20, dtype=torch.bool))
    assert torch.equal(run(masked, "auto"), run(masked)) and fake_kernel.calls == 1


def test_auto_without_a_kernel_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KERNELS", [])
    call = make_call(10, 20)
    assert torch.equal(run(call, "auto"), run(call))


@pytest.mark.parametrize("lengths", [(10, 20), (20, 10)])
def test_the_gate_of_short_sequences(fake_kernel: FakeKernel, lengths: tuple[int, int]) -> None:
    call = make_call(*lengths)
    tensors = (call.query, call.key, call.value)
    short = attention(*tensors, recipe="auto", min_seq_len=11)
    assert torch.equal(short, run(call)) and fake_kernel.calls == 0
    for least in (10, 0):
        assert (attention(*tensors, recipe="auto", min_seq_len=least) == 42.0).all()
    assert fake_kernel.calls == 2


@pytest.mark.parametrize("recipe", ["auto", "int8_int8"])
def test_the_gate_that_is_shipped(fake_kernel: FakeKernel, recipe: str) -> None:
    for lengths, served in (((10, 20), True), ((9, 20), False), ((10, 19), False)):
        call = make_call(*lengths)
        tensors = (call.query, call.key, call.value)
        output = attention(*tensors, recipe=recipe, min_seq_len=ops.SHIPPED_GATE)
        assert torch.equal(output, run(call)) is not served
        assert (output == 42.0).all() == served


def test_the_gate_is_passed_by_each_sequence(fake_kernel: FakeKernel) -> None:
    call = make_call(20, batch=1)
    offsets = torch.tensor([0, 15, 20])
    arguments = {"recipe": "auto", "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    for operator in (attention, attention_lse):
        found = operator(call.query, call.key, call.value, min_seq_len=11, **arguments)
        output = found if isinstance(found, Tensor) else found[0]
        assert (output[:, :, :15] == 42.0).all() and not (output[:, :, 15:] == 42.0).any()


def test_a_kernel_may_return_any_layout(
    monkeypatch: pytest.MonkeyPatch, fake_kernel: FakeKernel
) -> None:
    def transposed(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        output, lse = fake_kernel(*args, **options)
        lse = lse.mT.contiguous().mT if options["want_lse"] else lse
        return laid_out(output, "head_dim_first"), lse

    kernel = replace(registry.KERNELS[0], run=transposed)
    monkeypatch.setattr(registry, "KERNELS", [kernel])
    for layout in LAYOUTS:
        call = make_call(5, 7, layout=layout)
        arguments = {"query": call.query, "key": call.key, "value": call.value, "recipe": "auto"}
        _assert_fake_is_exact(attention, arguments)
        _assert_fake_is_exact(attention_lse, arguments)


def test_emulation_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "KERNELS", [])
    ops._warn_emulated.cache_clear()
    call = make_call(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            run(call, "int8_fp8")
            run(call, "exact")
            run(call, "auto")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert "no int8_fp8 kernel for device 'cpu'" in messages[0] and "slow" in messages[0]


# --- bad calls


CALL = make_call(5, 6)
Q, K, V = CALL.query, CALL.key, CALL.value
OFFSETS_Q, OFFSETS_K = torch.tensor([0, 5]), torch.tensor([0, 6])


def _offsets(cu_q: Any, cu_k: Any) -> dict[str, Any]:
    """A packed call with these cumulative lengths."""
    first = {"query": Q[:1], "key": K[:1], "value": V[:1]}
    as_tensor = [x if x is None or isinstance(x, Tensor) else torch.tensor(x) for x in (cu_q, cu_k)]
    return {**first, "cu_seqlens_q": as_tensor[0], "cu_seqlens_k": as_tensor[1]}


# What differs from a good call, and words that the message must have.
BAD_CALLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "3-D": ({"query": Q[0], "key": K[0], "value": V[0]}, ["query has shape (4, 5, 8)", "4-D"]),
    "2-D": ({"query": Q[0, 0], "key": K[0, 0], "value": V[0, 0]}, ["(5, 8)", "4-D"]),
    "5-D key": ({"key": K[None]}, ["key has shape (1, 2, 4, 6, 8)", "4-D"]),
    "3-D value": ({"value": V[..., 0]}, ["value has shape (2, 4, 6)", "4-D"]),
    "3-D value that broadcasts": (
        {"query": torch.ones(3, 3, 3, 3), "key": torch.ones(3, 3, 3, 3)}
        | {"value": torch.ones(3, 3, 3)},
        ["value has shape (3, 3, 3)", "4-D"],
    ),
    "5-D value that broadcasts": (
        {"query": torch.ones(3, 3, 3, 3), "key": torch.ones(3, 3, 3, 3)}
        | {"value": torch.ones(3, 3, 3, 3, 3)},
        ["value has shape (3, 3, 3, 3, 3)", "4-D"],
    ),
    "float64": (
        {"query": Q.double(), "key": K.double(), "value": V.double()},
        ["torch.float64", "float32, bfloat16, float16", "scaled_dot_product_attention"],
    ),
    "int64": ({"query": Q.long(), "key": K.long(), "value": V.long()}, ["torch.int64"]),
    "complex": ({"query": Q.cfloat(), "key": K.cfloat(), "value": V.cfloat()}, ["complex64"]),
    "key dtype": ({"key": K.half()}, ["key is torch.float16 and query torch.float32", "one dtype"]),
    "value dtype": ({"value": V.bfloat16()}, ["value is torch.bfloat16", "one dtype"]),
    "key device": ({"key": K.to("meta")}, ["key is on meta and query on cpu"]),
    "value device": ({"value": V.to("meta")}, ["value is on meta and query on cpu"]),
    "query device": ({"query": Q.to("meta")}, ["key is on cpu and query on meta"]),
    "batch": ({"key": K[:1], "value": V[:1]}, ["key has batch size 1 and query 2"]),
    "batch of value": ({"value": V[:1]}, ["value has batch size 1 and query 2"]),
    "value heads": ({"value": V[:, :2]}, ["key is (2, 4, 6, 8)", "value (2, 2, 6, 8)"]),
    "value length": ({"value": V[:, :, :5]}, ["value (2, 4, 5, 8)", "length"]),
    "head_dim": ({"key": K[..., :7]}, ["head_dim 8 and key 7"]),
    "head_dim of no keys": (
        {"key": K[:, :, :0, :7], "value": V[:, :, :0, :7]}, ["head_dim 8 and key 7"],
    ),
    "heads do not divide": (
        {"key": K[:, :3], "value": V[:, :3]}, ["4 query heads and 3 key/value heads", "multiple"],
    ),
    "more key heads": ({"query": Q[:, :2]}, ["2 query heads and 4 key/value heads"]),
    "no key heads": ({"key": K[:, :0], "value": V[:, :0]}, ["4 query heads and 0"]),
    "mask of int64": ({"attn_mask": torch.ones(5, 6).long()}, ["torch.int64", "bool", "float32"]),
    "mask of uint8": ({"attn_mask": torch.ones(5, 6).byte()}, ["torch.uint8", "bool"]),
    "mask of float64": ({"attn_mask": torch.ones(5, 6).double()}, ["attn_mask is torch.float64"]),
    "mask of bfloat16": ({"attn_mask": torch.ones(5, 6).bfloat16()}, ["torch.bfloat16", "bool"]),
    "mask device": ({"attn_mask": torch.ones(5, 6, device="meta")}, ["attn_mask is on meta"]),
    "mask rows": ({"attn_mask": torch.ones(4, 6)}, ["shape (4, 6)", "broadcast", "(2, 4, 5, 6)"]),
    "mask columns": ({"attn_mask": torch.ones(5)}, ["shape (5,)", "broadcast"]),
    "mask heads": ({"attn_mask": torch.ones(3, 5, 6)}, ["shape (3, 5, 6)", "broadcast"]),
    "mask batch": ({"attn_mask": torch.ones(3, 1, 5, 6)}, ["shape (3, 1, 5, 6)", "broadcast"]),
    "5-D mask": ({"attn_mask": torch.ones(1, 2, 4, 5, 6)}, ["shape (1, 2, 4, 5, 6)"]),
    "mask broadcasts the query": (
        {"query": Q[:, :, :1], "attn_mask": torch.ones(5, 6)}, ["shape (5, 6)", "(2, 4, 1, 6)"],
    ),
    "mask broadcasts the batch": (
        {"query": Q[:1], "key": K[:1], "value": V[:1], "attn_mask": torch.ones(3, 1, 5, 6)},
        ["shape (3, 1, 5, 6)", "(1, 4, 5, 6)"],
    ),
    "mask broadcasts the keys": (
        {"key": K[:, :, :1], "value": V[:, :, :1], "attn_mask": torch.ones(5, 6) > 0},
        ["shape (5, 6)", "(2, 4, 5, 1)"],
    ),
    "mask class": ({"mask_class": "cauzal"}, ["'cauzal'", "none, causal, causal_bottom_right"]),
    "dead rows": ({"dead_rows": "one"}, ["'one'", "zero, nan"]),
    "recipe": ({"recipe": "int3_fp8"}, ["'int3_fp8'", "auto, exact", "int8_fp8"]),
    "no recipe": ({"recipe": ""}, ["''", "auto, exact"]),
    "softcap 0": ({"softcap": 0.0}, ["softcap=0.0", "positive"]),
    "softcap < 0": ({"softcap": -1.0}, ["softcap=-1.0", "positive"]),
    "softcap inf": ({"softcap": inf}, ["softcap=inf", "finite"]),
    "softcap NaN": ({"softcap": nan}, ["softcap=nan", "finite"]),
    "scale NaN": ({"scale": nan}, ["scale=nan", "finite"]),
    "scale inf": ({"scale": -inf}, ["scale=-inf", "finite"]),
    "window without its class": ({"window_left": 3}, ["window=(3, -1)", "class none"]),
    "window < -1": ({"mask_class": "window", "window_right": -2}, ["window=(-1, -2)", "no limit"]),
    "sinks shape": ({"sinks": torch.ones(3)}, ["sinks has shape (3,)", "(4,)"]),
    "sinks dims": ({"sinks": torch.ones(4, 1)}, ["sinks has shape (4, 1)", "(4,)"]),
    "sinks dtype": ({"sinks": torch.ones(4).long()}, ["sinks is torch.int64", "floating point"]),
    "sinks device": ({"sinks": torch.ones(4, device="meta")}, ["meta", "on cpu"]),
    "one side of lengths": (_offsets([0, 5], None), ["one side only"]),
    "lengths with a batch": (
        {"cu_seqlens_q": OFFSETS_Q, "cu_seqlens_k": OFFSETS_K}, ["batch size 2", "batch of 1"],
    ),
    "lengths with a mask": (
        {**_offsets([0, 5], [0, 6]), "attn_mask": torch.ones(5, 6)}, ["attn_mask with cu_seqlens"],
    ),
    "lengths of float": (_offsets([0.0, 5.0], [0, 6]), ["cu_seqlens_q is torch.float32", "int32"]),
    "lengths of 2 dims": (_offsets([[0, 5]], [0, 6]), ["shape (1, 2)", "(sequences + 1,)"]),
    "lengths elsewhere": (
        _offsets(OFFSETS_Q.to("meta"), OFFSETS_K), ["cu_seqlens_q is on meta", "cpu"],
    ),
    "counts of sequences": (_offsets([0, 5], [0, 3, 6]), ["1 sequences", "2; they must be equal"]),
    "step without table": ({"step": torch.tensor(0)}, ["belong together"]),
    "table without step": ({"step_recipes": ["exact"]}, ["belong together"]),
    "step of float": (
        {"step": torch.tensor(0.0), "step_recipes": ["exact"]}, ["torch.float32", "0-d int64"],
    ),
    "step of 1 dim": (
        {"step": torch.tensor([0]), "step_recipes": ["exact"]}, ["1 dims", "0-d int64"],
    ),
    "unknown recipe in the table": (
        {"step": torch.tensor(0), "step_recipes": ["exact", "x"]}, ["'x'", "auto, exact"],
    ),
    "unknown recipe beside a table": (
        {"recipe": "x", "step": torch.tensor(0), "step_recipes": ["exact"]}, ["'x'"],
    ),
}  # fmt: skip

# Only values tell, so a fake call passes.
BAD_VALUES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lengths are short": (_offsets([0, 4], [0, 6]), ["[0, 4]", "packed length 5"]),
    "lengths are long": (_offsets([0, 6], [0, 6]), ["[0, 6]", "packed length 5"]),
    "lengths of keys": (_offsets([0, 5], [0, 5]), ["cu_seqlens_k", "packed length 6"]),
    "lengths do not start at 0": (_offsets([1, 5], [0, 6]), ["[1, 5]", "ascend from 0"]),
    "lengths do not ascend": (_offsets([0, 3, 2, 5], [0, 1, 2, 6]), ["[0, 3, 2, 5]", "ascend"]),
    "lengths of nothing": (
        _offsets(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)),
        ["[]", "ascend"],
    ),
    "step beyond the table": (
        {"step": torch.tensor(1), "step_recipes": ["exact"]}, ["step 1", "1 recipes"],
    ),
    "step below the table": (
        {"step": torch.tensor(-1), "step_recipes": ["exact"]}, ["step -1", "in range"],
    ),
    "empty table": ({"step": torch.tensor(0), "step_recipes": []}, ["step 0", "0 recipes"]),
}  # fmt: skip


def _assert_refused(call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises((InvalidAttentionError, InvalidOptionError)) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", BAD_CALLS | BAD_VALUES)
def test_bad_calls(name: str) -> None:
    changes, words = (BAD_CALLS | BAD_VALUES)[name]
    arguments = {"query": Q, "key": K, "value": V, **changes}
    _assert_refused(lambda: attention(**arguments), words)
    _assert_refused(lambda: attention_lse(**arguments), words)
    if "recipe" not in changes:
        _assert_refused(lambda: attention(**arguments, recipe="int8_fp8"), words)
    if name in BAD_CALLS and not any("meta" in word for word in words):
        _assert_refused(lambda: _fake_of(attention, arguments), words)
        _assert_refused(lambda: _fake_of(attention_lse, arguments), words)


def test_the_call_they_are_made_from_is_good() -> None:
    check(attention(Q, K, V), dense(CALL)[0], V, "exact")
    attention(**_offsets([0, 5], [0, 6]))
    attention(Q, K, V, torch.ones(()) > 0)
    attention(Q, K, V, step=torch.tensor(0), step_recipes=["exact"])
    with torch.no_grad():
        attention(*(x.bfloat16() for x in (Q, K, V)), torch.ones(5, 6))
