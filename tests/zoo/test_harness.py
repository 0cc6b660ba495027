"""The zoo's harness must fail where something is wrong, and matter where nothing is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sage_compiler.backend import transform
from sage_compiler.config import Options
from sage_compiler.report import Report
from tests.capture import rewritten
from tests.zoo import harness
from tests.zoo.architecture import EAGER, SDPA, WRITTEN, normal
from tests.zoo.expectations import PATH, read, write
from tests.zoo.harness import (
    DYNAMIC_CACHE,
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    PLAIN,
    TRAINING,
    Case,
    Result,
    largest_difference,
    run,
)
from tests.zoo.registry import ARCHITECTURES, BY_NAME, unavailable

BERT = BY_NAME["BERT"]
EXPECTED = read()
NAN, INF = float("nan"), float("inf")


def test_differences_are_relative_to_the_largest_value_and_at_least_absolute() -> None:
    assert largest_difference([torch.tensor([100.0, 1.5])], [torch.tensor([100.0, 1.0])]) == 0.005
    assert largest_difference([torch.tensor([0.0])], [torch.tensor([0.5])]) == 0.5
    assert largest_difference([None], [None]) == 0


@pytest.mark.parametrize(("found", "wanted"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (INF, -INF)])
def test_what_is_not_finite_differs(found: float, wanted: float) -> None:
    assert largest_difference([torch.tensor([found])], [torch.tensor([wanted])]) == INF


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_on_both_sides_is_equal(value: float) -> None:
    assert largest_difference([torch.tensor([value, 1.0])], [torch.tensor([value, 1.0])]) == 0


def test_another_number_of_outputs_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        largest_difference([], [torch.zeros(1)])
    with pytest.raises(AssertionError, match="one side"):
        largest_difference([None], [torch.zeros(1)])
    with pytest.raises(AssertionError):
        largest_difference([torch.zeros(1, dtype=torch.float64)], [torch.zeros(1)])


def spoiled(gm: fx.GraphModule, options: Options) -> Report:
    """The passes, and then each operator's query is a little too large."""
    report = transform(gm, options)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.sage.attention.default):
        with gm.graph.inserting_before(node):
            node.update_arg(0, gm.graph.call_function(torch.mul, (node.args[0], 1.05)))
    gm.recompile()
    return report


def with_a_wrong_scale(case: Case, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setattr("tests.capture.transform", spoiled)
    monkeypatch.setattr("tests.passes.checks.transform", spoiled)
    return run(case)


@pytest.mark.parametrize("circumstances", [PLAIN, TRAINING, DYNAMIC_CACHE])
def test_a_wrong_scale_is_seen(circumstances: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = with_a_wrong_scale(Case(BY_NAME["Llama"], SDPA, circumstances), monkeypatch)
    assert result.output_error > 10 * OUTPUT_TOLERANCE
    assert (result.gradient_error > 10 * GRADIENT_TOLERANCE) == (circumstances == TRAINING)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(entry, entry.implementations[-1], PLAIN)
        for entry in ARCHITECTURES
        if EXPECTED.get((entry.name, entry.implementations[-1], PLAIN), (0, 0))[0]
    ],
    ids=str,
)
def test_attention_matters_to_every_output(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an architecture would show nothing of how its attention is rewritten."""
    reason = unavailable(case.architecture)
    if reason:
        pytest.skip(reason)
    assert with_a_wrong_scale(case, monkeypatch).output_error > OUTPUT_TOLERANCE


class Restless(nn.Module):
    """Draws a number in each call, which the harness must not mistake for a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x.mul_(2)
        return F.scaled_dot_product_attention(x, x, x) + self.calls + torch.rand(())


def test_each_run_begins_with_the_same_inputs_buffers_and_random_numbers() -> None:
    entry = dataclasses.replace(
        BERT,
        build=lambda implementation: Restless(),
        inputs=lambda padded: {"x": normal(1, 2, 4, 8)},
        implementations=WRITTEN,
    )
    result = run(Case(entry, *WRITTEN, PLAIN))
    assert len(result.report.rewritten) == 1
    assert result.output_error <= OUTPUT_TOLERANCE


def test_a_graph_break_of_ours_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any, *args: Any, **options: Any) -> Any:
        def breaks(*args: Any) -> Any:
            torch._dynamo.graph_break()
            return function(*args)

        return rewritten(breaks, *args, **options)

    monkeypatch.setattr(harness, "rewritten", broken)
    result = run(Case(BY_NAME["standard softmax"], *WRITTEN, PLAIN))
    assert result.with_us != result.without_us


def test_another_implementation_is_seen() -> None:
    module = BERT.build(SDPA)
    harness.check_implementation(module, SDPA)
    with pytest.raises(AssertionError, match="uses sdpa"):
        harness.check_implementation(module, EAGER)


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    write(EXPECTED, path)
    assert read(path) == EXPECTED
    assert path.read_text(encoding="utf-8") == PATH.read_text(encoding="utf-8")
