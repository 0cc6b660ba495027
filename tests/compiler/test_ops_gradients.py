"""The operator's gradient: that of exact attention, whatever the recipe and the call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

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
from tests.compiler.kernels.dense import Call, dense

WINDOW = Semantics(mask_class=MaskClass.WINDOW, window_left=2, window_right=1)
NAMES = ("query", "key", "value", "attn_mask", "sinks")


def given(call: Call) -> list[Tensor]:
    """The tensors of a call that can have a gradient."""
    tensors = (getattr(call, name) for name in NAMES)
    return [x for x in tensors if x is not None and x.is_floating_point()]


def with_tensors(call: Call, tensors: Sequence[Tensor]) -> Call:
    """The call with ``given(call)`` replaced."""
    names = [
        name for name in NAMES if (x := getattr(call, name)) is not None and x.is_floating_point()
    ]
    return replace(call, **dict(zip(names, tensors, strict=True)))


Results = tuple[Tensor, ...]


def gradients(
    function: Callable[[Call], Results], call: Call, *, seed: int = 50
) -> tuple[Tensor, ...]:
    """Gradients of every tensor of the call, for random gradients of the results."""
    leaves = [tensor.detach().requires_grad_() for tensor in given(call)]
    results = function(with_tensors(call, leaves))
    downstream = [
        gaussian(*result.shape, seed=seed + index).to(result.dtype)
        for index, result in enumerate(results)
    ]
    return torch.autograd.grad(results, leaves, downstream)


def close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        error = (a.double() - e.double()).abs().max() if a.numel() else torch.tensor(0.0)
        assert error <= tolerance * max(1.0, float(e.abs().max()) if e.numel() else 1.0), error


def output_only(call: Call) -> Results:
    return (run(call),)


def both(call: Call) -> Results:
    return run_lse(call)


# --- against scaled_dot_product_attention


def sdpa(call: Call) -> Results:
    return (
        F.scaled_dot_product_attention(
            call.query,
            call.key,
            call.value,
            call.attn_mask,
            is_causal=call.semantics.mask_class is MaskClass.CAUSAL,
            scale=call.semantics.scale,
            enable_gqa=True,
        ),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_sdpa(layout: str, dtype: torch.dtype) -> None:
    call = make_call(5, 7, kv_heads=2, layout=layout, dtype=dtype)
    visible = gaussian(2, 1, 5, 7, seed=5) > -0.5
    for one in (
        call,
        replace(call, semantics=Semantics(MaskClass.CAUSAL, scale=0.2)),
        replace(call, attn_mask=visible),
        replace(call, attn_mask=gaussian(4, 5, 7, seed=6, dtype=dtype)),
        replace(call, attn_mask=gaussian(7, seed=6, dtype=dtype).expand(5, 7)),
    ):
        found = gradients(output_only, one)
        close(found, gradients(sdpa, one), 1e-5 if dtype == torch.float32 else 2e-2)
        assert [x.dtype for x in found] == [x.dtype for x in given(one)]


# --- against the formula in float64


def formula(call: Call) -> Results:
    return dense(call)


def formula_output(call: Call) -> Results:
    return dense(call)[:1]


def everything() -> Call:
    """Softcap, sinks, mask, window, GQA, Dv != D and a scale at once; every row sees a key."""
    return replace(
        make_call(6, 7, kv_heads=2, value_dim=5),
        semantics=replace(WINDOW, softcap=3.0, scale=0.3),
        attn_mask=gaussian(2, 1, 6, 7, seed=7),
        sinks=gaussian(4, seed=8),
    )


@pytest.mark.parametrize(
    "call",
    [
        make_call(6, 7),
        replace(make_call(6, 7), sinks=gaussian(4, seed=8)),
        replace(make_call(6, 7, kv_heads=1), semantics=Semantics(softcap=2.0)),
        replace(make_call(6, 7), semantics=WINDOW, attn_mask=gaussian(7, seed=7)),
        replace(make_call(3, 7), semantics=Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT)),
        replace(make_call(6, 7), attn_mask=gaussian(2, 4, 6, 1, seed=7)),
        everything(),
    ],
    ids=["plain", "sinks", "softcap and GQA", "window", "bottom right", "mask", "everything"],
)
def test_gradients_are_those_of_the_formula(call: Call) -> None:
    close(gradients(output_only, call), gradients(formula_output, call))
    close(gradients(both, call), gradients(formula, call))


def test_the_lse_has_a_gradient_of_its_own() -> None:
    call = everything()
    leaves = [tensor.detach().requires_grad_() for tensor in given(call)]
    run_lse(with_tensors(call, leaves))[1].square().sum().backward()
    found = [leaf.grad for leaf in leaves]
    twins = [tensor.detach().requires_grad_() for tensor in given(call)]
    dense(with_tensors(call, twins))[1].square().sum().backward()
    for leaf, twin in zip(found, twins, strict=True):
        assert leaf is not None
        close([leaf], [torch.zeros_like(twin) if twin.grad is None else twin.grad])


def test_gradients_of_packed_sequences() -> None:
    starts_q, starts_k = [0, 4, 4, 9], [0, 3, 5, 12]
    offsets = {
        "cu_seqlens_q": torch.tensor(starts_q),
        "cu_seqlens_k": torch.tensor(starts_k, dtype=torch.int32),
    }
    call = replace(
        make_call(9, 12, batch=1, kv_heads=2),
        semantics=Semantics(MaskClass.CAUSAL, softcap=4.0),
        sinks=gaussian(4, seed=9),
    )

    def packed(one: Call) -> Results:
        output, lse = attention_lse(one.query, one.key, one.value, **options(one), **offsets)
        return output, lse

    def apart(one: Call) -> Results:
        parts = [
            dense(
                replace(
                    one, query=one.query[:, :, a:b], key=one.key[:, :, c:d],
                    value=one.value[:, :, c:d],
                )
            )
            for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True)
        ]  # fmt: skip
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs, 2), torch.cat(lses, 2)

    close(gradients(packed, call), gradients(apart, call))
    plain = replace(call, sinks=None, semantics=Semantics())
    close(
        gradients(lambda one: packed(one)[:1], plain), gradients(lambda one: apart(one)[:1], plain)
    )


def test_finite_differences() -> None:
    """Without any formula: the slope of the operator itself, along random directions."""
    call = everything()
    tensors = given(call)
    weights = [gaussian(*result.shape, seed=50 + i) for i, result in enumerate(run_lse(call))]

    def objective(inputs: Sequence[Tensor]) -> float:
        results = run_lse(with_tensors(call, inputs))
        return sum(
            float((w.double() * result.double()).sum())
            for w, result in zip(weights, results, strict=True)
        )

    found = gradients(both, call)
    step = 1e-2
    for index, gradient in enumerate(found):
        direction = gaussian(*gradient.shape, seed=60 + index)
        ahead, behind = list(tensors), list(tensors)
        ahead[index] = tensors[index] + step * direction
        behind[index] = tensors[index] - step * direction
        slope = (objective(ahead) - objective(behind)) / (2 * step)
        expected = float((gradient * direction).sum())
        assert abs(slope - expected) <= 5e-3 * max(1.0, abs(expected)), NAMES[index]


@pytest.mark.parametrize("recipe", ["int4_fp8", "int8_int8", "auto"])
def test_a_recipe_has_the_gradient_of_exact_attention(recipe: str) -> None:
    call = everything()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = gradients(lambda one: (run(one, recipe),), call)
    close(found, gradients(output_only, call), 0.0)


# --- rows that see nothing, sequences of nothing


@pytest.mark.parametrize("dead_rows", DeadRows)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_dead_rows_have_no_gradient(dead_rows: DeadRows, softcap: float | None, kind: str) -> None:
    call = make_call(5, 6)
    visible = gaussian(5, 6, seed=9) > -1.0
    visible[2] = False
    mask = visible if kind == "bool" else gaussian(5, 6, seed=10).masked_fill(~visible, -inf)
    call = replace(call, attn_mask=mask, semantics=Semantics(dead_rows=dead_rows, softcap=softcap))
    live = torch.tensor([0, 1, 3, 4])

    def without(one: Call) -> Call:
        assert one.attn_mask is not None
        return replace(one, query=one.query[:, :, live], attn_mask=one.attn_mask[live])

    def live_rows(function: Callable[[Call], Results]) -> Callable[[Call], Results]:
        return lambda one: tuple(result[:, :, live] for result in function(one))

    for ours, whole in ((output_only, formula_output), (both, formula)):
        found = gradients(live_rows(ours), call)
        close(found, gradients(lambda one, whole=whole: whole(without(one)), call))
        everywhere = gradients(ours, call)  # the gradient of a dead row's result goes nowhere
        assert all(gradient.isfinite().all() for gradient in everywhere)
        assert (everywhere[0][:, :, 2] == 0).all()


@pytest.mark.parametrize("lengths", [(4, 0), (0, 4), (0, 0), (1, 1)])
def test_gradients_of_nothing(lengths: tuple[int, int]) -> None:
    call = make_call(*lengths, kv_heads=2)
    for function in (output_only, both):
        found = gradients(function, replace(call, sinks=gaussian(4, seed=3)))
        assert all(gradient.isfinite().all() for gradient in found)
        found = gradients(function, call)
        assert [x.shape for x in found] == [x.shape for x in given(call)]


# --- autograd's contract


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 4), (1, 2, 3)])
def test_only_what_is_wanted_gets_a_gradient(wanted: tuple[int, ...]) -> None:
    call = everything()
    expected = gradients(output_only, call)
    leaves = [
        tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(given(call))
    ]
    output = run(with_tensors(call, leaves))
    output.backward(gaussian(*output.shape, seed=50))
    for index, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (index in wanted)
        if leaf.grad is not None:
            close([leaf.grad], [expected[index]], 1e-6)


def test_one_tensor_as_query_key_and_value() -> None:
    x = gaussian(2, 4, 5, 8, seed=1).requires_grad_()
    weight = gaussian(2, 4, 5, 8, seed=2)
    (found,) = torch.autograd.grad(attention(x, x, x), x, weight)
    (expected,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x), x, weight)
    close([found], [expected])


def test_the_graph_can_be_kept() -> None:
    leaves = [tensor.requires_grad_() for tensor in given(everything())]
    output = run(with_tensors(everything(), leaves))
    first = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    close(torch.autograd.grad(output.sum(), leaves), first, 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), leaves)


def test_second_derivatives_are_right_or_refused() -> None:
    def penalty(function: Callable[[Call], Results], call: Call) -> Tensor:
        query = call.query.detach().requires_grad_()
        (result,) = function(replace(call, query=query))
        (slope,) = torch.autograd.grad(result.square().sum(), query, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), query)
        return second

    capped = replace(make_call(4, 5), semantics=Semantics(softcap=2.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autograd kernel was not registered.*")
        close([penalty(output_only, capped)], [penalty(formula_output, capped)], 1e-4)
        with pytest.raises(RuntimeError, match="backward is not implemented"):
            penalty(output_only, make_call(4, 5))


def test_functorch_transforms_are_refused_rather_than_wrong() -> None:
    call = make_call(3)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda q: run(replace(call, query=q)).sum())(call.query)


def test_backward_leaves_its_inputs_alone() -> None:
    for layout in LAYOUTS:
        call = make_call(5, 6, layout=layout)
        mask = laid_out(gaussian(2, 4, 5, 6, seed=4), layout)
        call = replace(call, attn_mask=mask, semantics=Semantics(softcap=2.0))
        leaves = [tensor.detach().requires_grad_() for tensor in given(call)]
        before = [(leaf.detach().clone(), leaf._version) for leaf in leaves]
        output, lse = run_lse(with_tensors(call, leaves))
        downstream = [torch.ones_like(output), torch.ones_like(lse)]
        found = torch.autograd.grad([output, lse], leaves, downstream)
        for gradient in found:
            gradient.add_(1.0)
        for leaf, (value, version) in zip(leaves, before, strict=True):
            assert torch.equal(leaf, value) and leaf._version == version
        assert all((tensor == 1.0).all() and tensor._version == 0 for tensor in downstream)


def test_a_changed_input_is_noticed() -> None:
    query = make_call(4).query.clone().requires_grad_()
    scaled = query * 1.0
    output = attention(scaled, scaled, scaled)
    scaled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# --- surroundings: autocast, dispatch modes, checkpointing


class Watch(TorchDispatchMode):
    """Sees every operator and changes none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        Watch,
        lambda: FlopCounterMode(display=False),
        nullcontext,
    ],
    ids=["autocast", "dispatch mode", "flop counter", "nothing"],
)
@pytest.mark.parametrize("call", [make_call(5, 6), everything()], ids=["plain", "everything"])
def test_backward_does_not_depend_on_where_it_runs(
    surroundings: Callable[[], AbstractContextManager[object]], call: Call
) -> None:
    expected = gradients(output_only, call)
    leaves = [tensor.detach().requires_grad_() for tensor in given(call)]
    output = run(with_tensors(call, leaves))
    with surroundings():
        output.backward(gaussian(*output.shape, seed=50))
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == gradient.dtype
        close([leaf.grad], [gradient], 0.0)


def test_training_under_autocast_is_that_of_sdpa() -> None:
    call = replace(make_call(5, 6), attn_mask=gaussian(5, 6, seed=3))

    def inside(function: Callable[[Call], Results]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(function, call)

    found = inside(output_only)
    close(found, inside(sdpa), 2e-2)
    assert all(gradient.dtype == torch.float32 for gradient in found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    call = everything()
    leaves = [tensor.detach().requires_grad_() for tensor in given(call)]
    output = checkpoint(
        lambda *tensors: run(with_tensors(call, tensors)), *leaves, use_reentrant=use_reentrant
    )
    output.backward(gaussian(*output.shape, seed=50))
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    close(found, gradients(output_only, call), 0.0)
