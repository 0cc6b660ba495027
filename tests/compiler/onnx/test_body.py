"""The bodies are valid ONNX, and mean the same to everything that runs them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from sage_compiler.errors import InvalidOptionError
from sage_compiler.onnx import schema
from sage_compiler.onnx.body import OLDEST_OPSET, function
from sage_compiler.onnx.schema import Mask, Variant
from sage_compiler.precision import PRECISIONS, RECIPES
from sage_compiler.semantics import DeadRows, MaskClass, Semantics
from tests.compiler.kernels.dense import Call, dense
from tests.compiler.onnx.bodies import (
    CODES,
    evaluate,
    inlined,
    model_of,
    optimized_operators,
    run,
    session,
    variant_of,
    with_codes,
)
from tests.compiler.onnx.closeness import assert_close
from tests.tolerances import check, check_lse

NEWEST_OPSET = 28
every_recipe = pytest.mark.parametrize("recipe", PRECISIONS)

WINDOW = Semantics(MaskClass.WINDOW, window_left=4, window_right=0)
CASES = {
    "plain": Semantics(),
    "causal": Semantics(MaskClass.CAUSAL, softcap=5.0),
    "bottom_right": Semantics(MaskClass.CAUSAL_BOTTOM_RIGHT, dead_rows=DeadRows.NAN),
    "window": WINDOW,
    "bool": Semantics(dead_rows=DeadRows.NAN),
    "bool_and_window": replace(WINDOW, mask_class=MaskClass.WINDOW_BOTTOM_RIGHT),
    "float": Semantics(softcap=5.0),
    "float_and_causal": Semantics(MaskClass.CAUSAL, dead_rows=DeadRows.NAN),
    "sinks": Semantics(),
    "sinks_and_bool": Semantics(MaskClass.CAUSAL),
}


def call_for(case: str, dtype: torch.dtype) -> Call:
    """Lq 9 and Lk 70, so that rows are dead and tiles are not full; two heads share keys."""
    generator = torch.Generator().manual_seed(len(case))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    group = 1 if "bool" in case else 2
    call = Call(
        normal(2, 2, 9, 16).to(dtype),
        (normal(2, 2 // group, 70, 16) + normal(16)).to(dtype),
        normal(2, 2 // group, 70, 8).to(dtype),
        CASES[case],
    )
    visible = torch.rand(2, 1, 9, 70, generator=generator) < 0.5
    visible[:, :, 3] = False
    if "bool" in case:
        call = replace(call, attn_mask=visible)
    if "float" in case:
        mask = normal(9, 70).masked_fill(~visible[0, 0], -inf)
        mask[5] = torch.finfo(torch.float32).min
        mask[:, 40:] -= 1e4
        call = replace(call, attn_mask=mask.to(torch.float32 if "causal" in case else dtype))
    if "sinks" in case:
        call = replace(call, sinks=torch.tensor([0.5, -inf]).to(dtype))
    return call


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_runtime_agrees(recipe: str, dtype: torch.dtype, case: str) -> None:
    """The checker, shape inference, ONNX Runtime with and without optimizations, the reference
    implementation of ONNX, the inlined model, and attention from its formula."""
    schema.schema()
    call = call_for(case, dtype)
    variant = variant_of(call, recipe)
    for dynamic in (True, False):
        model = model_of(call, variant, dynamic=dynamic)
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    expected = evaluate(model, call)
    flat = inlined(model)
    assert not flat.functions
    onnx.checker.check_model(flat, full_check=True)
    results = [run(session(model, optimize=optimize), call) for optimize in (True, False)]
    results.append(run(session(flat), call))
    output, lse = dense(call)
    name = recipe if recipe in RECIPES else "exact"
    for got in results:
        assert got["output"].dtype == dtype
        assert_close(got, expected, call, name)
        if name == "exact" and dtype != torch.float32:
            torch.testing.assert_close(
                got["output"].double(), output, atol=1e-2, rtol=1e-2, equal_nan=True
            )
        else:
            check(got["output"], output, call.value, name)
        check_lse(got["lse"], lse, name)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", CASES)
def test_codes_of_every_runtime_agree(recipe: str, case: str) -> None:
    call = call_for(case, torch.float32)
    model = with_codes(model_of(call, variant_of(call, recipe)))
    expected, got = evaluate(model, call), run(session(model), call)
    for name in CODES:
        # Sums in another order move a value across a tie now and then.
        assert (got[name] != expected[name]).float().mean() < 2e-3, name


@every_recipe
@pytest.mark.parametrize("opset", range(OLDEST_OPSET, NEWEST_OPSET + 1))
def test_opsets(recipe: str, opset: int) -> None:
    for case in ("bool_and_window", "float"):
        call = call_for(case, torch.float32)
        model = model_of(call, variant_of(call, recipe), opset=opset)
        onnx.checker.check_model(model, full_check=True)
        expected = run(session(model_of(call, variant_of(call, recipe))), call)
        assert_close(run(session(model), call), expected, call, recipe)


def test_an_older_opset_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="opset 18; the bodies need 19 or newer"):
        function(Variant(), 18)


@every_recipe
def test_attributes_that_a_node_omits_have_their_defaults(recipe: str) -> None:
    call = replace(call_for("float", torch.float32), semantics=Semantics(scale=0.3))
    model = model_of(call, variant_of(call, recipe))
    expected = run(session(model), call)
    node = model.graph.node[0]
    kept = [attribute for attribute in node.attribute if attribute.name == "scale"]
    del node.attribute[:]
    node.attribute.extend(kept)
    for same in (model, inlined(model)):
        onnx.checker.check_model(same, full_check=True)
        assert_close(run(session(same), call), expected, call, recipe)


@every_recipe
@pytest.mark.parametrize("mask_class", MaskClass)
def test_rows_before_and_behind_the_keys(recipe: str, mask_class: MaskClass) -> None:
    """More queries than keys, so that a band leaves rows without any, at either end."""
    call = call_for("plain", torch.float32)
    call = replace(call, key=call.key[:, :, :3], value=call.value[:, :, :3])
    window = {"window_left": 1, "window_right": 2} if "window" in mask_class else {}
    for dead_rows in DeadRows:
        some = replace(call, semantics=Semantics(mask_class, dead_rows=dead_rows, **window))
        got = run(session(model_of(some, variant_of(some, recipe))), some)
        output, lse = dense(some)
        name = recipe if recipe in RECIPES else "exact"
        check(got["output"], output, call.value, name)
        check_lse(got["lse"], lse, name)


@every_recipe
def test_a_window_without_a_limit(recipe: str) -> None:
    """One body serves all windows; -1 on both sides shows everything."""
    call = call_for("plain", torch.float32)
    everything = replace(call, semantics=Semantics(MaskClass.WINDOW))
    far = 2**63 - 1
    distant = replace(call, semantics=replace(WINDOW, window_left=far, window_right=far))
    expected, _ = dense(call)
    for some in (everything, distant):
        got = run(session(model_of(some, variant_of(some, recipe))), some)
        check(got["output"], expected, call.value, recipe if recipe in RECIPES else "exact")


@every_recipe
def test_a_grouped_body_serves_every_head_with_keys_of_its_own(recipe: str) -> None:
    call = call_for("bool", torch.float32)
    variant = variant_of(call, recipe)
    expected = run(session(model_of(call, variant)), call)
    got = run(session(model_of(call, replace(variant, grouped=True))), call)
    assert_close(got, expected, call, recipe)


@every_recipe
def test_empty_calls(recipe: str) -> None:
    """No batch, no query, no key; with every mask, and with sinks."""
    sizes = ((0, 3, 5), (2, 0, 5), (2, 3, 0))
    window = Semantics(MaskClass.WINDOW, dead_rows=DeadRows.NAN)
    words_and_sinks = ((Semantics(), False), (window, False), (window, True))
    for (batch, queries, keys), (words, sinks), kind in product(
        sizes, words_and_sinks, (None, *Mask)
    ):
        zeros = torch.zeros(batch, 1, queries, keys)
        call = Call(
            torch.randn(batch, 4, queries, 8),
            torch.randn(batch, 2, keys, 8),
            torch.randn(batch, 2, keys, 16),
            words,
            {None: None, Mask.BOOL: zeros == 0, Mask.FLOAT: zeros}[kind],
            torch.randn(4) if sinks else None,
        )
        got = run(session(model_of(call, variant_of(call, recipe))), call)
        output, lse = dense(call)
        assert torch.equal(got["output"], output.float())
        torch.testing.assert_close(got["lse"], lse.float())


def _variants() -> list[Variant]:
    flags = (False, True)
    return [
        Variant(*some)
        for some in product(
            PRECISIONS, MaskClass, (None, *Mask), flags, flags, DeadRows, flags, flags
        )
    ]


def test_every_variant_has_a_body() -> None:
    """Of standard operators alone, none of them idle; overloads tell all variants apart."""
    variants = _variants()
    assert len({variant.overload for variant in variants}) == len(variants)
    for variant in variants[::7]:  # 7 divides no factor of the product: all values meet
        made = function(variant, OLDEST_OPSET)
        assert made.overload == variant.overload
        used = set(made.output).union(*(node.input for node in made.node))
        assert all(not used.isdisjoint(node.output) for node in made.node)
        assert {node.domain for node in made.node} == {""}
        assert list(made.input) == list(schema.INPUTS[: len(made.input)])
        assert list(made.output) == list(variant.outputs)


def test_exact_bodies_are_small(tmp_path: Path) -> None:
    """What a stock export has: two products, a scale, a mask, a softmax."""
    for case, expected in {
        "plain": ["FusedMatMul", "Softmax", "MatMul"],
        "causal": ["FusedMatMul", "Where", "Softmax", "MatMul"],
        "float": ["FusedMatMul", "Add", "Softmax", "MatMul", "ReduceMax", "Equal", "Where"],
    }.items():
        call = call_for(case, torch.float32)
        call = replace(call, query=call.query[:, :1], semantics=replace(CASES[case], softcap=None))
        model = model_of(call, variant_of(call, "exact", lse=False), dynamic=False)
        assert optimized_operators(model, tmp_path) == expected
