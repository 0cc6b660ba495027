"""The option ``guard``: what is compared, what becomes of it, and who shares it."""

from __future__ import annotations

import gc
import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sage_compiler as sage
from sage_compiler import backend
from sage_compiler import guard as guards
from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.errors import InvalidOptionError
from sage_compiler.guard import Action, Guard, parse_guard, run
from sage_compiler.metrics import LAYER_METRICS
from sage_compiler.passes import identity
from sage_compiler.policy import Calibration, LayerPolicy, Policy

NEVER_KEPT = {"cosine": 1.5}
ALWAYS_KEPT = {"cosine": -1.0}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    guards.reset()
    yield
    guards.reset()


# --- parsing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, wanted",
    [
        ({"cosine": 0.9}, Guard(0.01, {"cosine": 0.9}, Action.WARN)),
        ({"rel_l1": 1, "fraction": 1}, Guard(1.0, {"rel_l1": 1.0}, Action.WARN)),
        ({"rmse": 0.1, "action": "demote"}, Guard(0.01, {"rmse": 0.1}, Action.DEMOTE)),
        (
            {"head_rel_l1": 0.1, "head_cosine": 0.9},
            Guard(0.01, {"head_cosine": 0.9, "head_rel_l1": 0.1}, Action.WARN),
        ),
    ],
    ids=str,
)
def test_guards(value: dict[str, Any], wanted: Guard) -> None:
    assert parse_guard(value, {}) == wanted


@pytest.mark.parametrize(
    "value, words",
    [
        (0.5, "guard=0.5; it must be a dict, such as"),
        (True, "guard=True; it must be a dict"),
        ("cosine", "guard='cosine'; it must be a dict"),
        ({}, "guard has no limit; give one of cosine, rel_l1, rmse, head_cosine, head_rel_l1"),
        ({"fraction": 0.5}, "guard has no limit"),
        ({"cosin": 0.9}, "guard has 'cosin'; known: fraction, action, cosine"),
        ({"mean_cosine": 0.9}, "guard has 'mean_cosine'"),
        ({1: 2}, "guard has 1; known"),
        ({"cosine": 0.9, "fraction": 0}, "fraction=0; it must be above 0, at most 1"),
        ({"cosine": 0.9, "fraction": 1.01}, "fraction=1.01"),
        ({"cosine": 0.9, "fraction": math.nan}, "fraction=nan"),
        ({"cosine": 0.9, "fraction": True}, "fraction=True"),
        ({"cosine": 0.9, "fraction": "all"}, "fraction='all'"),
        ({"cosine": 0.9, "action": "stop"}, "action='stop'; known: warn, demote"),
        ({"cosine": 0.9, "action": ["warn"]}, r"action=['warn']; known"),
        ({"cosine": "high"}, "cosine='high'; it must be a number"),
        ({"cosine": None}, "cosine=None; it must be a number"),
        ({"cosine": math.nan}, "cosine=nan; it must be a number"),
    ],
    ids=str,
)
def test_bad_guards_say_what_is_possible(value: object, words: str) -> None:
    with pytest.raises(InvalidOptionError) as error:
        parse_guard(value, {})
    assert words in str(error.value)


def test_the_budget_of_a_policy_is_the_default() -> None:
    policy = Policy({}, target="cpu", calibration=Calibration(budget={"rel_l1": 0.05}))
    found = parse_options({"policy": policy, "guard": {}}).guard
    assert found is not None and found.limits == {"rel_l1": 0.05}
    found = parse_options({"policy": policy, "guard": {"cosine": 0.9}}).guard
    assert found is not None and found.limits == {"cosine": 0.9}


TEXT = Guard(1.0, {"cosine": 0.9}, Action.WARN).of_layer("a#0", 1, ["int8_int8"])


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "[]",
        "3",
        "{}",
        '{"layer": "a#0"}',
        TEXT[:-1],
        TEXT.replace('"warn"', '"stop"'),
        TEXT.replace("1.0", '"x"'),
        TEXT.replace('"cosine"', '"__class__"'),
        TEXT.replace('"cosine"', '"calls"'),
        TEXT.replace("0.9", "null"),
        TEXT.replace('{"cosine":0.9}', "3"),
    ],
)
def test_operator_arguments_of_another_form_are_refused(text: str) -> None:
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(InvalidOptionError, match="guard"):
        torch.ops.sage.attention(q, q, q, recipe="int8_int8", guard=text)
    assert sage.guarded_layers() == []


# --- which calls are compared ---------------------------------------------------------------


class Calls:
    """Stand-ins for one attention, quantized and exact, that count how often they run."""

    def __init__(self, error: float = 0.0) -> None:
        self.quantized_calls = self.exact_calls = 0
        self._exact = torch.randn(1, 2, 3, 4)
        self._quantized = self._exact + error

    def quantized(self) -> guards.Result:
        self.quantized_calls += 1
        return self._quantized, torch.empty(0)

    def exact(self) -> guards.Result:
        self.exact_calls += 1
        return self._exact, torch.empty(0)

    def run(self, text: str) -> bool:
        """One guarded call; whether it returned the exact result."""
        return run(text, self.quantized, self.exact)[0] is self._exact


def text(
    limits: dict[str, float], *, fraction: float = 1.0, action: str = "warn", layer: str = "a#0"
) -> str:
    return Guard(fraction, limits, Action(action)).of_layer(layer, 1, ["int8_int8"])


@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.5, 1 / 3, 0.1, 0.01, 1e-9], ids=str)
def test_so_many_calls_are_compared(fraction: float) -> None:
    calls = Calls()
    for done in range(1, 302):
        assert not calls.run(text(ALWAYS_KEPT, fraction=fraction))
        assert abs(calls.exact_calls - ((done - 1) * fraction + 1)) <= 2, done
        assert calls.exact_calls >= 1  # the first one always is
    (layer,) = sage.guarded_layers()
    assert (layer.calls, layer.compared) == (301, calls.exact_calls)
    assert calls.quantized_calls == 301
    assert abs(calls.exact_calls - math.floor(300 * fraction) - 1) <= 1
    assert layer.errors is not None and layer.errors.calls == layer.compared


def test_every_step_of_a_schedule_is_looked_at() -> None:
    """With 50 steps, every hundredth call would always be the same step."""
    calls, steps = Calls(), set()
    for call in range(20_000):
        before = calls.exact_calls
        calls.run(text(ALWAYS_KEPT, fraction=0.01))
        if calls.exact_calls > before:
            steps.add(call % 50)
    assert len(steps) > 40 and abs(calls.exact_calls - 200) <= 1


def test_warning_is_said_once_and_only_compared_calls_become_exact(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = Calls(error=10.0)
    with caplog.at_level(logging.WARNING, "sage_compiler"):
        exact = [calls.run(text({"rel_l1": 0.1}, fraction=0.5)) for _ in range(6)]
    assert exact[0] and exact.count(True) == 3
    (layer,) = sage.guarded_layers()
    assert (layer.exceeded, layer.demoted, layer.compared, layer.calls) == (3, False, 3, 6)
    (record,) = caplog.records
    assert record.getMessage().startswith("sage: guard of a#0: rel_l1 ")
    assert record.getMessage().endswith("in call 1; this call was exact, the next may not be")


def test_a_demoted_layer_is_exact_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    calls = Calls(error=10.0)
    demote = text({"rel_l1": 0.1}, fraction=0.01, action="demote")
    with caplog.at_level(logging.WARNING, "sage_compiler"):
        assert [calls.run(demote) for _ in range(5)] == [True] * 5
    assert (calls.quantized_calls, calls.exact_calls) == (1, 5)
    (layer,) = sage.guarded_layers()
    assert layer.demoted and (layer.calls, layer.compared) == (1, 1)
    (record,) = caplog.records
    assert record.getMessage().endswith("in call 1; exact from now on")
    guards.reset()
    assert sage.guarded_layers() == []
    assert calls.run(demote) and calls.quantized_calls == 2  # forgotten: tried again


def test_layers_are_judged_by_themselves() -> None:
    good, bad = Calls(), Calls(error=10.0)
    for _ in range(3):
        assert not good.run(text({"rel_l1": 0.1}, action="demote", layer="good#0"))
        assert bad.run(text({"rel_l1": 0.1}, action="demote", layer="bad#0"))
    assert [(each.layer, each.demoted) for each in sage.guarded_layers()] == [
        ("good#0", False),
        ("bad#0", True),
    ]


def test_what_is_no_number_is_beyond_the_loosest_limits() -> None:
    for name in LAYER_METRICS:
        limit = {name: -0.99 if "cosine" in name else 1e30}
        assert Calls(error=math.nan).run(text(limit, layer=name)), name


@pytest.fixture
def _hasty() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_hasty")
def test_threads_lose_no_call() -> None:
    """Calls that meet each other in the middle: nothing is counted twice, or never."""
    each, together = 200, 8
    ready = threading.Barrier(together)
    exact = []

    def serve() -> None:
        calls = Calls(error=10.0)
        ready.wait()
        exact.extend(calls.run(text({"rel_l1": 0.1}, fraction=0.25)) for _ in range(each))

    threads = [threading.Thread(target=serve) for _ in range(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (layer,) = sage.guarded_layers()
    assert layer.calls == each * together
    assert layer.compared == layer.exceeded == sum(exact) == each * together // 4
    assert layer.errors is not None and layer.errors.calls == layer.compared


# --- in compiled models ---------------------------------------------------------------------

FINGERPRINT = "q2 kv2 d16 dv16 none"


def rewrite(gm: fx.GraphModule, inputs: list[Tensor], *, options: Any) -> Callable[..., Any]:
    transform(gm, parse_options(options))
    return gm.forward


def passed(function: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> Any:
    """Through Dynamo and the passes, without Inductor."""
    parsed = {"precision": "int8_int8", "guard": {"fraction": 1, **ALWAYS_KEPT}, **options}

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return rewrite(gm, inputs, options=parsed)

    return torch.compile(function, backend=backend, dynamic=dynamic)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return 3 * torch.randn(1, 2, 20, 16)


def counts() -> list[int]:
    return [layer.calls for layer in sage.guarded_layers()]


def test_a_guarded_model_returns_exact_results_beyond_its_limits(x: Tensor) -> None:
    for action, exact in (("warn", [True, False, False]), ("demote", [True, True, True])):
        torch._dynamo.reset()
        guards.reset()
        call = passed(Attention(), guard={**NEVER_KEPT, "action": action})
        expected = Attention()(x)
        assert [torch.equal(call(x), expected) for _ in range(3)] == exact, action


def test_compiled_for_real(x: Tensor) -> None:
    model = Attention()
    options = {"precision": "int8_int8", "guard": {"fraction": 1, "cosine": 0.9}}
    call = torch.compile(model, backend="sage", options=options)
    for _ in range(2):
        assert not torch.equal(call(x), model(x))
    (layer,) = sage.guarded_layers()
    assert (layer.layer, layer.calls, layer.compared, layer.exceeded) == ("(root)#0", 2, 2, 0)
    assert layer.errors is not None and 0.9 < layer.errors.cosine < 1


def test_models_with_the_same_names_do_not_share_what_was_seen(x: Tensor) -> None:
    def first(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    def second(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) * 2

    for function, times in ((first, 1), (second, 2)):
        call = passed(function)
        for _ in range(times):
            call(x)
    assert [layer.layer for layer in sage.guarded_layers()] == ["(root)#0"] * 2
    assert counts() == [1, 2]


def test_the_number_of_a_function_that_is_gone_is_not_given_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a model would begin with what another saw, or demoted."""

    captured: list[CodeType] = []
    monkeypatch.setattr(identity, "captured_code", lambda: captured.pop())

    def number_of(code: CodeType) -> int:
        captured.append(code)
        return backend._number_of_model()

    kept = [compile(name, "kept", "eval") for name in ("a", "b")]
    numbers = [number_of(code) for code in kept]
    for name in ("c", "d", "e"):
        numbers.append(number_of(compile(name, "gone", "eval")))
        gc.collect()
    assert len(set(numbers)) == 5
    assert [number_of(code) for code in kept] == numbers[:2]


def test_recompilations_share_what_was_seen(x: Tensor) -> None:
    call = passed(Attention(), dynamic=False)
    for length in (20, 12, 20, 7):
        call(x[:, :, :length])
    assert counts() == [4]


def test_layers_of_a_model_are_counted_apart(x: Tensor) -> None:
    def model(x: Tensor) -> Tensor:
        once = F.scaled_dot_product_attention(x, x, x)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(once, x, x)

    call = passed(model)
    call(x), call(x)
    assert [layer.layer for layer in sage.guarded_layers()] == ["(root)#0", "(root)#1"]
    assert counts() == [2, 2]
    assert len({layer.model for layer in sage.guarded_layers()}) == 1


def test_prepared_instances_do_not_share_what_was_seen(x: Tensor) -> None:
    for times in (1, 2):
        call = passed(sage.prepare(Attention()))
        for _ in range(times):
            call(x)
    assert counts() == [1, 2]


def test_exact_attention_is_not_guarded(x: Tensor) -> None:
    policy = Policy({"(root)#0": LayerPolicy((FINGERPRINT,), ("exact",))}, target="cpu")
    passed(Attention(), precision="auto", policy=policy)(x)
    assert sage.guarded_layers() == []


def test_only_steps_with_a_quantized_recipe_are_guarded(x: Tensor) -> None:
    layer = LayerPolicy((FINGERPRINT,), ("exact", "int8_int8"))
    policy = Policy({"(root)#0": layer}, target="cpu", timestep_ranges=2)
    call = passed(Attention(), precision="auto", policy=policy, min_seq_len=0)
    try:
        for step in (0, 9, 1, 8, 7):
            sage.set_step(step, 10)
            call(x)
    finally:
        sage.set_step(None)
    assert counts() == [3]


@pytest.mark.parametrize("limits", [NEVER_KEPT, ALWAYS_KEPT], ids=["beyond", "within"])
def test_training(x: Tensor, limits: dict[str, float]) -> None:
    call = passed(Attention(), guard={"fraction": 1, **limits})
    given, wanted = (x.clone().requires_grad_() for _ in range(2))
    output = call(given)
    output.sum().backward()
    Attention()(wanted).sum().backward()
    torch.testing.assert_close(given.grad, wanted.grad)
    assert torch.equal(output, Attention()(x)) == (limits is NEVER_KEPT)
    assert counts() == [1]


def test_the_argument_is_the_same_in_every_process() -> None:
    """It is part of the key of compiled code in the caches."""
    limits = {"cosine": 0.9, "rel_l1": 0.1}
    first = text(limits)
    assert json.loads(first) == {
        "layer": "a#0",
        "model": 1,
        "recipes": ["int8_int8"],
        "fraction": 1.0,
        "limits": limits,
        "action": "warn",
    }
    swapped = parse_guard({"rel_l1": 0.1, "cosine": 0.9, "fraction": 1}, {})
    assert swapped.of_layer("a#0", 1, ["int8_int8"]) == first
