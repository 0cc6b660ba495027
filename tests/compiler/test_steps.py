"""Recipes by timestep: ``set_step`` switches them in compiled models, and compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sage_compiler as sage
from sage_compiler import steps
from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.errors import InvalidAttentionError
from sage_compiler.policy import LayerPolicy, Policy

FINGERPRINT = "q2 kv2 d16 dv16 none"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        return F.scaled_dot_product_attention(q, k, v)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    sage.set_step(None)
    yield
    sage.set_step(None)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return 3 * torch.randn(1, 20, 32)


def policy(*recipes: str, layer: str = "(root)#0") -> Policy:
    choice = LayerPolicy((FINGERPRINT,), recipes)
    return Policy({layer: choice}, target="cpu", timestep_ranges=len(recipes))


EARLY = policy("exact", "int8_int8")  # exact in the first half


def compiled(model: Callable[..., Any], chosen: Policy = EARLY, **arguments: Any) -> Any:
    options = {"policy": chosen, "min_seq_len": 0}
    return torch.compile(model, backend="sage", options=options, **arguments)


def is_exact(found: Tensor, expected: Tensor) -> bool:
    """Whether an output is the exact one; else it must be off as much as quantization is."""
    error = float((found - expected).abs().max())
    assert error < 1e-5 or 1e-3 < error < 0.3
    return error < 1e-5


def assert_follows(call: Callable[..., Any], model: Callable[..., Any], x: Tensor) -> None:
    """Both halves of a schedule, in any order, as ``EARLY`` has them."""
    for step in (0, 9, 4, 5, 0):
        sage.set_step(step, 10)
        assert is_exact(call(x), model(x)) == (step < 5), step


# --- set_step -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, total",
    [
        (-1, 10),
        (10, 10),
        (0, 0),
        (0, -1),
        (None, 10),
        (3, None),
        (1.0, 10),  # a timestep of a scheduler's is no step
        (1, 10.0),
        (float("nan"), 10),
        (0, float("inf")),
        ("1", 10),
        (torch.tensor(1.0), 10),
    ],
)
def test_steps_outside_of_a_schedule_are_refused(step: Any, total: Any) -> None:
    sage.set_step(3, 10)
    index = steps.index_tensor(2)
    with pytest.raises(InvalidAttentionError, match="integers 0 <= step < total"):
        sage.set_step(step, total)
    assert steps.position() == (3, 10) and index == 0


@pytest.mark.parametrize("step", [3, torch.tensor(3), torch.tensor([3])], ids=str)
def test_integers_of_every_kind(step: Any) -> None:
    sage.set_step(step, 10)
    assert steps.position() == (3, 10)


@given(st.integers(1, 1000), st.integers(1, 2000))
def test_ranges_divide_a_schedule_evenly_and_in_order(ranges: int, total: int) -> None:
    found = []
    for step in range(0, total, max(1, total // 50)):
        steps.set_step(step, total)
        found.append(steps.range_of(ranges))
        assert found[-1] <= ranges * step / total < found[-1] + 1
    assert found == sorted(found) and found[0] == 0 and found[-1] < ranges


def test_the_tensor_of_a_number_of_ranges_is_one_and_follows() -> None:
    index = steps.index_tensor(4)
    assert index is steps.index_tensor(4) and index is not steps.index_tensor(3)
    assert index == steps.UNSET
    sage.set_step(7, 8)
    assert index == 3 == steps.range_of(4) and steps.index_tensor(3) == 2
    sage.set_step(None)
    assert index == steps.UNSET


@pytest.mark.parametrize(
    "ranges, context",
    [(901, torch.inference_mode), (902, lambda: torch.device("meta")), (903, torch.no_grad)],
    ids=["inference_mode", "meta", "no_grad"],
)
def test_the_tensor_can_be_made_and_set_under_any_mode(ranges: int, context: Any) -> None:
    with context():
        index = steps.index_tensor(ranges)
        sage.set_step(0, 10)
    sage.set_step(5, 10)
    assert index == 5 * ranges // 10 and index.device.type == "cpu"


# --- compiled models ------------------------------------------------------------------------


@torch.no_grad()
def test_one_compiled_model_serves_all_timesteps(x: Tensor) -> None:
    model = Attention()
    call = compiled(model, fullgraph=True)
    sage.set_step(0, 10)
    call(x)
    (site,) = sage.last_report().sites
    assert (site.recipe, site.decision) == ("exact/int8_int8", "rewrite")
    counters.clear()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_follows(call, model, x)
    assert not counters["inductor"] and not counters["stats"]


@torch.no_grad()
def test_lengths_that_vary(x: Tensor) -> None:
    model = Attention()
    call = compiled(model, dynamic=True)
    for length in (20, 7, 130):
        assert_follows(call, model, 3 * torch.randn(2, length, 32))
    assert len(sage.last_report().graphs) == 1


@torch.no_grad()
def test_autocast(x: Tensor) -> None:
    model = Attention()
    call = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = []
        for step in (0, 9, 0):
            sage.set_step(step, 10)
            found.append(call(x))
        assert found[0].dtype == torch.bfloat16
        torch.testing.assert_close(found[0], model(x))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_training_follows_in_the_forward_and_is_exact_in_the_backward(x: Tensor) -> None:
    model = Attention().train()
    call = compiled(model)
    model(x).sum().backward()
    expected = model.qkv.weight.grad.clone()
    for step in (0, 9):
        model.zero_grad()
        sage.set_step(step, 10)
        output = call(x)
        sage.set_step(4, 10)  # the schedule may go on before the backward
        output.sum().backward()
        assert is_exact(output.detach(), model(x).detach()) == (step == 0)
        torch.testing.assert_close(model.qkv.weight.grad, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_graph_breaks_and_a_step_within_compiled_code(x: Tensor) -> None:
    first = Attention()

    def model(x: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        before = first(x)
        sage.set_step(step, 10)
        return before, first(x)

    both = Policy(
        {f"(root)#{at}": LayerPolicy((FINGERPRINT,), ("exact", "int8_int8")) for at in (0, 1)},
        target="cpu",
        timestep_ranges=2,
    )
    sage.set_step(0, 10)
    call = compiled(model, both)
    expected = first(x)
    found = [[is_exact(part, expected) for part in call(x, step)] for step in (9, 0, 9)]
    assert found == [[True, False], [False, True], [True, False]]
    assert [site.layer for site in sage.last_report().rewritten][:2] == ["(root)#0", "(root)#1"]


@torch.no_grad()
def test_models_with_other_numbers_of_ranges(x: Tensor) -> None:
    one, other = Attention(), Attention()
    halves = compiled(lambda x: one(x) * 1.0, EARLY)
    thirds = compiled(lambda x: other(x) * 1.0, policy("int8_int8", "exact", "int8_int8"))
    for step, exact in ((0, (True, False)), (3, (True, True)), (7, (False, False))):
        sage.set_step(step, 9)
        found = tuple(is_exact(call(x), one(x)) for call in (halves, thirds))
        assert found == exact, step


@torch.no_grad()
def test_a_model_before_its_first_step_says_what_to_do(x: Tensor) -> None:
    call = compiled(Attention())
    with pytest.raises(InvalidAttentionError, match=r"call sage\.set_step\(step, total\) before"):
        call(x)
    sage.set_step(0, 10)
    call(x)


@torch.no_grad()
def test_equal_recipes_need_no_step(x: Tensor) -> None:
    model = Attention()
    same = policy("int8_int8", "int8_int8")
    assert not is_exact(compiled(model, same)(x), model(x))


@torch.no_grad()
def test_exported_programs_follow_in_this_process(x: Tensor) -> None:
    model = Attention()
    module = torch.export.export(model, (x,)).module()
    report = transform(module, parse_options({"policy": EARLY, "min_seq_len": 0}))
    assert [site.recipe for site in report.rewritten] == ["exact/int8_int8"]
    assert_follows(module, model, x)


# --- caches of compiled code ----------------------------------------------------------------

PROCESS = textwrap.dedent("""
    import json, sys
    import torch
    import torch.nn.functional as F
    from torch._dynamo.utils import counters
    import sage_compiler as sage
    from sage_compiler.policy import LayerPolicy, Policy

    def model(x):
        return F.scaled_dot_product_attention(x, x, x)

    recipes = ("exact", "int8_int8")
    layers = {"(root)#0": LayerPolicy(("q2 kv2 d16 dv16 none",), recipes)}
    policy = Policy(layers, target="cpu", timestep_ranges=2)
    torch.manual_seed(0)
    x = 3 * torch.randn(1, 2, 20, 16)
    guard = {"cosine": 0.5, "fraction": 1}
    options = {"policy": policy, "min_seq_len": 0, "guard": guard}
    call = torch.compile(model, backend="sage", options=options)
    exact = []
    for step in json.loads(sys.argv[1]):
        sage.set_step(step, 10)
        exact.append(float((call(x) - model(x)).abs().max()) < 1e-5)
    guarded = [layer.compared for layer in sage.guarded_layers()]
    print(json.dumps([exact, guarded, counters["aot_autograd"]["autograd_cache_hit"]]))
""")


def test_a_warm_cache_holds_neither_steps_nor_what_a_guard_saw(tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    runs = []
    for order in ([0, 9, 0], [9, 0, 9]):  # each begins where the other does not
        done = subprocess.run(
            [sys.executable, "-W", "ignore", script, json.dumps(order)],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    (cold, cold_guarded, cold_hits), (warm, warm_guarded, warm_hits) = runs
    assert cold_hits == 0 and warm_hits > 0
    assert cold == [True, False, True] and cold_guarded == [1]
    assert warm == [False, True, False] and warm_guarded == [2]
