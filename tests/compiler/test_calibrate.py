"""sage.calibrate: what it finds on models where the answer is known."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_compiler as sage
from sage_compiler import steps
from sage_compiler.calibration import search
from sage_compiler.calibration.measure import Measurement
from sage_compiler.calibration.probe import Call, watched
from sage_compiler.errors import InvalidAttentionError, InvalidOptionError
from sage_compiler.metrics import output_rel_l1, tensors
from sage_compiler.policy import Policy
from sage_compiler.precision import EXACT
from tests import tolerances
from tests.compiler.calibration.models import (
    OUTLIER,
    TARGET,
    Attention,
    Causal,
    Stack,
    WrittenOut,
    tokens,
)

LAYER = {"cosine": 0.992}  # INT4 of a planted layer is at .98 at most, of any other at .998


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setenv("SAGE_CACHE_DIR", str(tmp_path / "cache"))
    yield
    sage.set_step(None)


def recipes(policy: Policy) -> list[str]:
    return [layer.recipe for layer in policy.layers.values()]


def expected(layers: int, planted: set[int]) -> list[str]:
    return ["int8_fp8" if at in planted else "int4_fp8" for at in range(layers)]


def some(layers: int, seed: int) -> set[int]:
    rng = random.Random(seed)
    return set(rng.sample(range(layers), rng.randint(1, layers - 1)))


# --- planted outliers are found


class GroupedHeads(Attention):
    """Two query heads for one key/value head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = torch.cat([q, -q], 1)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).mean(1, keepdim=True)


KINDS = {"sdpa": Attention, "written out": WrittenOut, "causal": Causal, "grouped": GroupedHeads}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_planted_layers_are_found_and_no_other(kind: type[Attention], seed: int) -> None:
    layers = 6 + seed
    planted = some(layers, seed)
    model = Stack(layers, planted, kind, seed).eval()
    policy = sage.calibrate(model, [tokens(seed)], budget=LAYER, **TARGET)
    assert recipes(policy) == expected(layers, planted)
    assert list(policy.layers) == [f"layers.{at}#0" for at in range(layers)]
    for at, layer in enumerate(policy.layers.values()):
        if at in planted:
            assert layer.reason.startswith("int4_fp8: cosine 0.9")
            assert layer.reason.endswith(" is below 0.992")
        else:
            assert layer.reason == "the quickest candidate"


@pytest.mark.parametrize(
    ("budget", "planted_recipe", "other"),
    [
        ({"rel_l1": 0.10}, "int8_fp8", "int4_fp8"),
        ({"head_cosine": 0.992}, "int8_fp8", "int4_fp8"),
        ({"head_rel_l1": 0.10, "cosine": 0.9}, "int8_fp8", "int4_fp8"),
        ({"cosine": -1.0}, "int4_fp8", "int4_fp8"),
        ({"cosine": 1.0}, EXACT, EXACT),
        ({"rmse": 0.0}, EXACT, EXACT),
    ],
    ids=str,
)
def test_budgets_of_layers(budget: dict[str, float], planted_recipe: str, other: str) -> None:
    model = Stack(2, {1}).eval()
    policy = sage.calibrate(model, [tokens(0)], budget=budget, **TARGET)
    assert recipes(policy) == [other, planted_recipe]
    assert policy.calibration.budget == budget and policy.calibration.end_to_end is None


def test_a_part_of_heads_and_queries_finds_them_too() -> None:
    planted = {0, 2}
    model = Stack(3, planted).eval()
    policy = sage.calibrate(model, [tokens(0)], budget=LAYER, queries=128, heads=1, **TARGET)
    assert recipes(policy) == expected(3, planted)
    assert policy.calibration.subset == "1 heads, 128 queries"
    whole = sage.calibrate(model, [tokens(0)], budget=LAYER, **TARGET)
    for name, layer in policy.layers.items():
        assert layer.seconds == whole.layers[name].seconds  # those of the whole calls
        for recipe, errors in layer.measured[0].items():
            all_of_it = whole.layers[name].measured[0][recipe]
            assert errors.mean_rel_l1 == pytest.approx(all_of_it.mean_rel_l1, rel=0.3)


def test_the_worst_input_decides() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor, outlier: Tensor) -> Tensor:
            return self.attention(x, outlier)

    torch.manual_seed(0)
    model = Sometimes().eval()
    inputs = [(tokens(seed), torch.tensor(size)) for seed, size in enumerate((1.0, OUTLIER, 1.0))]
    for given, recipe in ((inputs, "int8_fp8"), (inputs[::2], "int4_fp8")):
        policy = sage.calibrate(model, given, budget=LAYER, **TARGET)
        assert recipes(policy) == [recipe]
        (layer,) = policy.layers.values()
        assert layer.measured[0]["int4_fp8"].calls == len(given)


# --- what is measured


def test_errors_are_those_of_an_independent_computation() -> None:
    model, inputs = Stack(2, {1}).eval(), [tokens(0), tokens(1)]
    policy = sage.calibrate(model, inputs, budget=LAYER, **TARGET)
    calls: list[Call] = []

    def attend(call: Call) -> Tensor:
        calls.append(call)
        return call.run(EXACT)

    with torch.no_grad(), watched(model) as watch:
        watch.attend = attend
        for x in inputs:
            watch.run(x)
    for name, layer in policy.layers.items():
        of_layer = [call for call in calls if call.layer == name]
        assert layer.fingerprints == ("q1 kv1 d64 dv64 none",)
        for recipe, errors in layer.measured[0].items():
            pairs = [(call.run(recipe).double(), _exact(call)) for call in of_layer]
            cosines = [tolerances.cosine(*pair) for pair in pairs]
            distances = [tolerances.rel_l1(*pair) for pair in pairs]
            near = {"rel": 1e-4, "abs": 1e-7}
            assert errors.calls == 2
            assert errors.cosine == pytest.approx(min(cosines), **near)
            assert errors.mean_cosine == pytest.approx(sum(cosines) / 2, **near)
            assert errors.rel_l1 == pytest.approx(max(distances), **near)
            assert errors.mean_rel_l1 == pytest.approx(sum(distances) / 2, **near)
            assert errors.rmse == pytest.approx(max(tolerances.rmse(*p) for p in pairs), **near)
            assert errors.head_cosine == pytest.approx(errors.cosine)  # one head


def _exact(call: Call) -> Tensor:
    q, k, v = call.query.double(), call.key.double(), call.value.double()
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def test_the_model_computes_exactly_while_it_is_measured() -> None:
    """So that a layer's error is its own, and not that of the layers before."""
    model = Stack(2, {0}).eval()
    both = sage.calibrate(model, [tokens(0)], budget=LAYER, **TARGET)
    one = sage.calibrate(
        model, [tokens(0)], budget=LAYER, **{**TARGET, "candidates": ("int8_fp8",)}
    )
    for name in both.layers:
        assert both.layers[name].measured[0]["int8_fp8"] == one.layers[name].measured[0]["int8_fp8"]


# --- bounds on the output


def worst_error(model: nn.Module, policy: Policy, inputs: list[Tensor]) -> float:
    """The greatest relative L1 of the output under a policy, with the watch as the runner."""
    errors = []
    with torch.no_grad(), watched(model) as watch:
        for x in inputs:
            watch.attend = lambda call: call.run(policy.layers[call.layer].recipe)
            errors.append(output_rel_l1(tensors(watch.run(x)), tensors(model(x))))
    return max(errors)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
)
def test_bounds_on_the_output_hold_on_other_inputs_too(seed: int) -> None:
    model = Stack(4, some(4, seed), seed=seed).eval()
    inputs, held_out = [tokens(seed), tokens(100 + seed)], [tokens(200 + seed), tokens(300 + seed)]
    every_int4 = sage.calibrate(model, inputs[:1], budget={"output_rel_l1": 1e9}, **TARGET)
    assert set(recipes(every_int4)) == {"int4_fp8"}
    limit = 0.6 * worst_error(model, every_int4, inputs)  # some layers, not all of them
    policy = sage.calibrate(model, inputs, budget={"output_rel_l1": limit}, **TARGET)
    found = policy.calibration.end_to_end
    assert found is not None and found.holds and found.worst is not None
    assert found.worst == pytest.approx(worst_error(model, policy, inputs), rel=1e-3)
    assert found.worst <= 0.8 * limit
    assert worst_error(model, policy, held_out) <= limit
    assert set(recipes(policy)) != {EXACT}


def test_the_layer_whose_error_matters_is_promoted() -> None:
    """Of two layers with outliers, the one whose output is all but ignored may err."""
    model = Stack(3, {0, 2}).eval()
    for layer, weight in ((0, 1e-3), (1, 0.1), (2, 1.0)):
        attention = model.layers[layer]
        assert isinstance(attention, Attention)
        attention.out.weight.data *= weight
    limit = 1e-2
    policy = sage.calibrate(
        model, [tokens(0)], budget={"output_rel_l1": limit}, margin=1.0, **TARGET
    )
    assert recipes(policy) == ["int4_fp8", "int4_fp8", "int8_fp8"]


def test_a_metric_of_the_users() -> None:
    def largest(actual: Tensor, expected: Tensor) -> Tensor:
        assert actual.shape == expected.shape
        return (actual - expected).abs().max()

    model, x = Stack(2, {1}).eval(), tokens(0)
    policy = sage.calibrate(model, [x], budget={"output": (largest, 0.03)}, **TARGET)
    found = policy.calibration.end_to_end
    assert found is not None and found.metric == "largest" and found.limit == 0.03
    assert found.holds and found.worst is not None and found.worst <= 0.8 * 0.03
    assert recipes(policy) == ["int4_fp8", "int8_fp8"]


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("zeros", [False, True], ids=["", "layers without error"])
def test_a_bound_that_nothing_keeps_is_said_not_to_hold(value: float, zeros: bool) -> None:
    model = Stack(2).eval()
    if zeros:  # V = 0: every recipe is without error there, and nothing is left to promote
        for layer in model.layers:
            assert isinstance(layer, Attention)
            layer.qkv.weight.data[-64:] = 0
            layer.qkv.bias.data[-64:] = 0
    budget = {"output": (lambda actual, expected: value, 0.5)}
    policy = sage.calibrate(model, [tokens(0)], budget=budget, **TARGET)
    found = policy.calibration.end_to_end
    assert found is not None and not found.holds
    assert set(recipes(policy)) == {EXACT}
    assert "does NOT hold" in str(policy)


def test_a_bound_of_nothing_leaves_nothing_but_exact() -> None:
    policy = sage.calibrate(Stack(2).eval(), [tokens(0)], budget={"output_rel_l1": 0.0}, **TARGET)
    found = policy.calibration.end_to_end
    assert found is not None and found.holds and found.worst == 0.0
    assert set(recipes(policy)) == {EXACT}


def test_both_kinds_of_budget_hold() -> None:
    """Each forbids what the other allows."""
    model, x = Stack(2, {0}).eval(), tokens(0)
    loose = sage.calibrate(model, [x], budget={**LAYER, "output_rel_l1": 1e9}, **TARGET)
    assert recipes(loose) == ["int8_fp8", "int4_fp8"]
    strict = sage.calibrate(model, [x], budget={"cosine": 0.0, "output_rel_l1": 0}, **TARGET)
    assert recipes(strict) == [EXACT, EXACT]


def test_a_layer_that_breaks_the_output_is_given_up_and_no_other() -> None:
    def breaks(actual: Tensor, expected: Tensor) -> float:
        first = float((actual - expected)[..., 0].abs().max())
        return float("nan") if first > 1e-6 else output_rel_l1([actual], [expected])

    model = Stack(2).eval()
    last = model.layers[1]
    assert isinstance(last, Attention)
    last.out.weight.data[0] = 0  # nothing of its attention reaches the first channel
    policy = sage.calibrate(model, [tokens(0)], budget={"output": (breaks, 0.5)}, **TARGET)
    found = policy.calibration.end_to_end
    assert found is not None and found.holds and found.rounds == 1
    assert recipes(policy) == [EXACT, "int4_fp8"]


@dataclasses.dataclass
class Output:
    hidden: Tensor
    rest: dict[str, Any]


def as_tuple(x: Tensor) -> Any:
    return x, x + 1, 7


def as_nested(x: Tensor) -> Any:
    return {"a": [x, None], "b": "text"}


def as_dataclass(x: Tensor) -> Any:
    return Output(x, {"again": x})


@pytest.mark.parametrize("wrap", [as_tuple, as_nested, as_dataclass])
def test_outputs_of_any_make(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Stack(1, {0})

        def forward(self, x: Tensor) -> Any:
            return wrap(self.model(x))

    policy = sage.calibrate(Wrapped().eval(), [tokens(0)], budget={"output_rel_l1": 1e-9}, **TARGET)
    assert recipes(policy) == [EXACT]
    found = policy.calibration.end_to_end
    assert found is not None and found.holds


def test_an_output_without_numbers_cannot_be_bounded() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Stack(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).argmax(-1)

    with pytest.raises(InvalidOptionError, match=r"use output: \(metric, limit\)"):
        sage.calibrate(Ids().eval(), [tokens(0)], budget={"output_rel_l1": 0.1}, **TARGET)


def test_random_inputs_are_compared_with_themselves() -> None:
    """A bound is verified in a second pass, which must not draw other inputs."""

    class Drawn:
        def __iter__(self) -> Iterator[Tensor]:
            for _ in range(2):
                yield torch.randn(1, 64, 64)

    policy = sage.calibrate(Stack(1).eval(), Drawn(), budget={"output_rel_l1": 0.2}, **TARGET)
    found = policy.calibration.end_to_end
    assert found is not None and found.worst is not None and found.worst < 0.05


# --- timesteps


class Denoiser(nn.Module):
    """Its outliers are there in the first half of the schedule only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor, early: Tensor) -> Tensor:
        outlier = torch.where(early, OUTLIER, 1.0)
        return self.second(self.first(x, outlier))


def schedule(total: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(total):
        sage.set_step(step, total)
        yield tokens(step), torch.tensor(step < total / 2)


def test_outliers_of_early_timesteps_give_recipes_by_timestep() -> None:
    model = Denoiser().eval()
    policy = sage.calibrate(model, schedule(), budget=LAYER, timestep_ranges=2, **TARGET)
    assert policy.timestep_ranges == 2
    assert policy.layers["first#0"].recipes == ("int8_fp8", "int4_fp8")
    assert policy.layers["second#0"].recipes == ("int4_fp8",)
    assert [part["int4_fp8"].calls for part in policy.layers["first#0"].measured] == [2, 2]


def test_where_steps_are_set_there_are_four_ranges() -> None:
    policy = sage.calibrate(Denoiser().eval(), schedule(), budget=LAYER, **TARGET)
    assert policy.timestep_ranges == 4
    assert policy.layers["first#0"].recipes == (*["int8_fp8"] * 2, *["int4_fp8"] * 2)
    flat = sage.calibrate(Denoiser().eval(), schedule(2), budget=LAYER, timestep_ranges=1, **TARGET)
    assert flat.layers["first#0"].recipes == ("int8_fp8",)


def test_bounds_on_the_output_by_timestep() -> None:
    policy = sage.calibrate(
        Denoiser().eval(), schedule(), budget={"output_rel_l1": 0.006}, timestep_ranges=2, **TARGET
    )
    found = policy.calibration.end_to_end
    assert found is not None and found.holds
    assert policy.layers["first#0"].recipes == ("int8_fp8", "int4_fp8")


def test_a_model_that_goes_through_steps_by_itself() -> None:
    """All ranges share in the error of an output; it is that of the policy as a whole."""
    denoiser = Denoiser().eval()

    def pipeline(x: Tensor) -> Tensor:
        for step in range(2):
            sage.set_step(step, 2)
            x = denoiser(x, torch.tensor(step == 0))
        return x

    budget = {"output_rel_l1": 0.008}
    policy = sage.calibrate(pipeline, [tokens(0)], budget=budget, timestep_ranges=2, **TARGET)
    found = policy.calibration.end_to_end
    assert found is not None and found.worst is not None and found.holds
    assert recipes(policy)[0] == "int8_fp8/int4_fp8"

    def attend(call: Call) -> Tensor:
        chosen = policy.layers[call.layer].recipes
        return call.run(chosen[steps.range_of(2) if len(chosen) > 1 else 0])

    with torch.no_grad(), watched(pipeline) as watch:
        watch.attend = attend
        error = output_rel_l1([watch.run(tokens(0))], [pipeline(tokens(0))])
    assert found.worst == pytest.approx(error, rel=1e-3)


def test_ranges_without_a_step_are_refused() -> None:
    with pytest.raises(InvalidAttentionError, match="no step is set"):
        sage.calibrate(Stack(1).eval(), [tokens(0)], budget=LAYER, timestep_ranges=2, **TARGET)


# --- Ctrl-C


def interrupting(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Press Ctrl-C in a call of a method, counted from 1."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def method(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


BOTH_BUDGETS = pytest.mark.parametrize("budget", [LAYER, {"output_rel_l1": 0.02}], ids=str)


@BOTH_BUDGETS
def test_before_the_first_input_is_done_an_interrupt_comes_out(
    monkeypatch: pytest.MonkeyPatch, budget: dict[str, float]
) -> None:
    interrupting(monkeypatch, Measurement, "attend", call=2)
    with pytest.raises(KeyboardInterrupt):
        sage.calibrate(Stack(2).eval(), [tokens(0)] * 2, budget=budget, **TARGET)


def test_an_interrupt_keeps_the_inputs_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(2, {1}).eval()
    one = sage.calibrate(model, [tokens(0)], budget=LAYER, **TARGET)
    interrupting(monkeypatch, Measurement, "attend", call=4)  # in the last layer of the second
    policy = sage.calibrate(model, [tokens(0), tokens(1), tokens(2)], budget=LAYER, **TARGET)
    assert policy.calibration.interrupted and policy.calibration.inputs == 1
    assert "interrupted after 1 input" in str(policy)
    for name, layer in policy.layers.items():  # nothing of the second weighs in
        assert layer == one.layers[name]


def test_after_an_interrupt_while_measuring_no_bound_is_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupting(monkeypatch, Measurement, "attend", call=3)
    budget = {"output_rel_l1": 1.0}
    policy = sage.calibrate(Stack(2).eval(), [tokens(0), tokens(1)], budget=budget, **TARGET)
    found = policy.calibration.end_to_end
    assert found is not None and not found.holds and found.worst is None
    assert "not verified" in str(policy)
    assert set(recipes(policy)) == {EXACT}
    assert all(
        layer.measured[0].keys() == {"int4_fp8", "int8_fp8"} for layer in policy.layers.values()
    )


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_interrupt_of_the_search_keeps_what_was_verified(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """One layer at a time (1, 2), then the first policy on two inputs (3, 4)."""
    interrupting(monkeypatch, search._Model, "_error", call)
    policy = sage.calibrate(
        Stack(2).eval(), [tokens(0), tokens(1)], budget={"output_rel_l1": 1.0}, **TARGET
    )
    found = policy.calibration.end_to_end
    assert policy.calibration.interrupted and policy.calibration.inputs == 2
    assert found is not None and not found.holds and found.worst is None
    assert set(recipes(policy)) == {EXACT}


def test_a_verified_policy_survives_the_interrupt_of_the_next_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Stack(2).eval(), tokens(0)
    budget = {"output_rel_l1": 0.05}
    monkeypatch.setattr(search._Model, "weighed", lambda self, at, layer, options: list(options))
    interrupting(monkeypatch, search._Model, "run", call=2)
    policy = sage.calibrate(model, [x], budget=budget, **TARGET)
    found = policy.calibration.end_to_end
    assert policy.calibration.interrupted
    assert found is not None and found.holds and found.worst is not None
    assert found.worst == pytest.approx(worst_error(model, policy, [x]), rel=1e-3)


# --- arguments


def test_what_a_budget_can_be_is_said_before_the_model_runs() -> None:
    def model(x: Tensor) -> Tensor:
        raise AssertionError("it must not run")

    def metric(actual: Any, expected: Any) -> float:
        return 0.0

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"budget": {}}, "with at least one of cosine"),
        ({"budget": 0.998}, "must be a dict"),
        ({"budget": {"cosin": 0.9}}, "budget has 'cosin'; known: cosine"),
        ({"budget": {"cosine": "0.9"}}, "must be a finite number"),
        ({"budget": {"cosine": True}}, "must be a finite number"),
        ({"budget": {"rel_l1": float("nan")}}, "must be a finite number"),
        ({"budget": {"cosine": 99.8}}, "99.8 % is 0.998"),
        ({"budget": {"rel_l1": -0.1}}, "an error is at least 0"),
        ({"budget": {"output": (metric, -30)}}, "an error is at least 0"),
        ({"budget": {"output": metric}}, r"must be \(metric, limit\)"),
        ({"budget": {"output": (0.1, metric)}}, r"must be \(metric, limit\)"),
        ({"budget": {"output": (metric, 1), "output_rel_l1": 1}}, "give one of them"),
        ({"inputs": tokens(0)}, "inputs is Tensor"),
        ({"inputs": {"x": tokens(0)}}, "inputs is dict"),
        ({"inputs": 3}, "inputs is int"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": iter(())}, "inputs is empty"),
        ({"candidates": []}, "must be a list of: int4_fp8"),
        ({"candidates": "int8_fp8"}, "must be a list of"),
        ({"candidates": ["int2_fp8"]}, "must be a list of"),
        ({"candidates": ["exact"]}, "must be a list of"),
        ({"target": "sm_75"}, "unknown target 'sm_75'"),
        ({"target": 89}, "unknown target 89"),
        ({"timestep_ranges": 0}, "timestep_ranges=0; it must be"),
        ({"timestep_ranges": 1001}, "from 1 to 1000"),
        ({"timestep_ranges": "4"}, "timestep_ranges='4'"),
        ({"timestep_ranges": True}, "timestep_ranges=True"),
        ({"margin": 0}, "margin=0; it must be above 0"),
        ({"margin": 1.1}, "at most 1"),
        ({"margin": "0.8"}, "margin='0.8'"),
        ({"heads": 0}, "heads=0"),
        ({"queries": "all"}, "queries='all'"),
    ]
    for arguments, words in wrong:
        usual: dict[str, Any] = {"inputs": [tokens(0)], "budget": LAYER, **TARGET}
        with pytest.raises(InvalidOptionError, match=words):
            sage.calibrate(model, **{**usual, **arguments})


def test_a_model_without_attention() -> None:
    with pytest.raises(InvalidOptionError, match=r"no attention to calibrate.*explain"):
        sage.calibrate(nn.Linear(64, 64), [tokens(0)], budget=LAYER, **TARGET)


def test_candidates_that_the_target_has_no_kernel_for() -> None:
    arguments = {**TARGET, "target": "sm_80"}
    with pytest.raises(InvalidOptionError, match=r"layers\.0#0: no int4_fp8 kernel on sm_80"):
        sage.calibrate(Stack(1).eval(), [tokens(0, 16)], budget=LAYER, **arguments)
    some_of_them = {**arguments, "candidates": ("int8_fp8", "int8_fp16")}
    policy = sage.calibrate(Stack(1).eval(), [tokens(0)], budget=LAYER, **some_of_them)
    (layer,) = policy.layers.values()
    assert layer.recipe == "int8_fp16"
    assert layer.reason == "int8_fp8: no int8_fp8 kernel on sm_80"


def test_a_recipe_that_some_calls_of_a_layer_cannot_have() -> None:
    """It has no kernel for the other calls, so the layer cannot be given it."""

    def attention(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    wide, usual = torch.randn(1, 1, 512, 320), torch.randn(1, 1, 512, 64)
    policy = sage.calibrate(attention, [usual, wide], budget={"cosine": -1}, **TARGET)
    (layer,) = policy.layers.values()
    assert len(layer.fingerprints) == 2 and layer.recipe == EXACT
    assert "no int8_fp8 kernel on sm_89" in layer.reason


def test_a_metric_that_fails_does_so_after_the_first_input() -> None:
    drawn = []

    def inputs() -> Iterator[Tensor]:
        for number in range(5):
            drawn.append(number)
            yield tokens(number, 16)

    def metric(actual: Tensor, expected: Tensor) -> Any:
        return "bad"

    with pytest.raises(InvalidOptionError, match="'metric' returned str"):
        sage.calibrate(Stack(1).eval(), inputs(), budget={"output": (metric, 1)}, **TARGET)
    assert drawn == [0]


def test_a_part_of_what_is_timed_here_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="they are timed on whole calls"):
        sage.calibrate(Stack(1).eval(), [tokens(0, 16)], budget=LAYER, queries=128, progress=False)


# --- what is the user's stays the user's


def test_step_random_numbers_and_mode_are_left_alone() -> None:
    model = Stack(1)  # in training: it has no dropout
    sage.set_step(3, 9)
    state = torch.get_rng_state()
    sage.calibrate(model, schedule(2), budget={"output_rel_l1": 0.05}, **_inputs_of_one(model))
    assert steps.position() == (3, 9)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def _inputs_of_one(model: Stack) -> dict[str, Any]:
    forward = model.forward
    model.forward = lambda x, early=None: forward(x)  # type: ignore[method-assign]
    return TARGET


def test_the_step_is_restored_when_the_model_fails() -> None:
    def model(x: Tensor, early: Tensor) -> Tensor:
        raise ZeroDivisionError

    sage.set_step(3, 9)
    with pytest.raises(ZeroDivisionError):
        sage.calibrate(model, schedule(2), budget=LAYER, **TARGET)
    assert steps.position() == (3, 9)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_stderr_or_not_at_all(
    capsys: pytest.CaptureFixture[str], progress: bool
) -> None:
    arguments = {**TARGET, "progress": progress}
    budget = {"output_rel_l1": 0.5}
    sage.calibrate(Stack(1).eval(), [tokens(0)], budget=budget, **arguments)
    out, err = capsys.readouterr()
    assert out == ""
    shown = [what in err for what in ("sage: measuring", "sage: layer by layer", "sage: policy 1")]
    assert shown == [progress] * 3
    assert progress or err == ""


# --- the policy


def test_a_policy_is_the_same_after_json(tmp_path: Path) -> None:
    policy = sage.calibrate(
        Denoiser().eval(), schedule(2), budget={**LAYER, "output_rel_l1": 0.5}, **TARGET
    )
    policy.save(tmp_path / "policy.json")
    loaded = Policy.load(tmp_path / "policy.json")
    assert loaded == policy and str(loaded) == str(policy)
    assert loaded.layers == policy.layers and loaded.calibration == policy.calibration


@pytest.mark.slow
def test_compiling_gives_the_recipes_of_the_policy() -> None:
    model, x = Stack(2, {1}).eval(), tokens(0)
    policy = sage.calibrate(model, [x], budget=LAYER, **TARGET)
    with torch.no_grad():
        torch.compile(model, backend="sage", options={"policy": policy})(x)
    sites = sage.last_report().rewritten
    assert [(site.layer, site.recipe) for site in sites] == [
        ("layers.0#0", "int4_fp8"),
        ("layers.1#0", "int8_fp8"),
    ]


def test_explaining_gives_the_recipes_of_the_policy() -> None:
    model, x = Stack(2, {1}).eval(), tokens(0)
    policy = sage.calibrate(model, [x], budget=LAYER, **TARGET)
    sites = sage.explain(model, x, options={"policy": policy}).rewritten
    assert {site.layer: site.recipe for site in sites} == {
        name: layer.recipe for name, layer in policy.layers.items()
    }


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_half_precision(precision: str) -> None:
    model, x = Stack(2, {1}).eval(), tokens(0, 512)
    if precision == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        policy = sage.calibrate(model, [x], budget={"cosine": 0.992}, **TARGET)
    first, second = policy.layers.values()
    assert first.measured[0]["int4_fp8"].cosine > 0.992 > second.measured[0]["int4_fp8"].cosine
    assert second.measured[0]["int8_fp8"].cosine > 0.998


def test_measured_on_this_machine() -> None:
    """The kernels here are the ones that run, and their times are measured."""
    runs = []

    class Counting(Stack):
        def forward(self, x: Tensor) -> Tensor:
            count(x)
            return super().forward(x)

    @torch.compiler.disable
    def count(x: Tensor) -> None:
        runs.append(x)

    x = tokens(0, 64)
    policy = sage.calibrate(Counting(2).eval(), [x, x], budget={"cosine": 0.0}, progress=False)
    made = policy.calibration
    assert policy.target == "cpu" and made.candidates == ("int8_int8", "int8_int16")
    assert made.times.startswith("measured on ")
    assert made.model_seconds.keys() == {EXACT, "policy"}
    for layer in policy.layers.values():
        assert layer.seconds.keys() == {EXACT, "int8_int8", "int8_int16"}
        assert layer.recipe == min(layer.seconds, key=layer.seconds.__getitem__) or (
            layer.seconds[layer.recipe] <= min(layer.seconds.values()) / 0.99
        )
    assert len(runs) <= 2 * (len(made.candidates) + 2)


# --- what may not decide


def test_a_step_left_over_from_sampling_makes_no_timesteps() -> None:
    sage.set_step(49, 50)
    policy = sage.calibrate(Stack(1).eval(), [tokens(0)], budget={"cosine": 0.5}, **TARGET)
    assert policy.timestep_ranges == 1
    assert steps.position() == (49, 50)
    sage.set_step(None)


def test_ranges_without_an_input_are_exact_and_say_so() -> None:
    def inputs() -> Iterator[Tensor]:
        sage.set_step(0, 4)
        yield tokens(0)

    policy = sage.calibrate(Stack(1).eval(), inputs(), budget={"cosine": 0.5}, **TARGET)
    (layer,) = policy.layers.values()
    assert layer.recipes[1:] == ("exact",) * 3 and layer.recipes[0] != "exact"
    assert "timestep range 2, 3, 4 of 4: exact, since no input was in it" in layer.reason


def test_outputs_without_a_number_are_an_error() -> None:
    with pytest.raises(InvalidAttentionError, match="no finite number"):
        sage.calibrate(
            Stack(1).eval(), [tokens(0) * float("nan")], budget={"cosine": 0.5}, **TARGET
        )


class OwnBuffer(nn.Module):
    """Returns the same memory in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack(2)
        self.kept = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stack(x)
        if self.kept.shape != y.shape:
            self.kept = torch.empty_like(y)
        return self.kept.copy_(y)


def test_an_output_in_a_buffer_of_the_model_is_not_compared_with_itself() -> None:
    model, x = OwnBuffer().eval(), tokens(0)
    policy = sage.calibrate(model, [x], budget={"output_rel_l1": 0.5}, margin=1.0, **TARGET)
    found = policy.calibration.end_to_end
    assert found is not None and found.worst is not None and found.worst > 1e-4


def test_an_option_that_breaks_the_output_leaves_the_finer_ones() -> None:
    model, x = Stack(1).eval(), tokens(0)

    def finite_below(actual: Tensor, expected: Tensor) -> float:
        error = float((actual - expected).abs().sum() / expected.abs().sum())
        return error if error < threshold else float("inf")

    errors = {
        recipe: sage.calibrate(
            model, [x], budget={"output_rel_l1": 9.0}, candidates=[recipe], target="sm_89",
            progress=False, margin=1.0,
        ).calibration.end_to_end
        for recipe in ("int4_fp8", "int8_fp8")
    }  # fmt: skip
    coarse, fine = (each.worst for each in errors.values() if each is not None)
    assert coarse is not None and fine is not None and fine < coarse / 2
    threshold = (coarse + fine) / 2
    policy = sage.calibrate(
        model, [x], budget={"output": (finite_below, 0.9 * coarse)}, margin=1.0, **TARGET
    )
    assert [layer.recipe for layer in policy.layers.values()] == ["int8_fp8"]
