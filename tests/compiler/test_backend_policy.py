"""Policies applied by the backend: what fits is taken, what does not is refused or kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

import sage_compiler as sage
from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.errors import KernelUnavailableError, PolicyError
from sage_compiler.metrics import Errors
from sage_compiler.policy import LayerPolicy, Policy
from sage_compiler.report import Report
from tests.capture import operator_calls, rewritten
from tests.tolerances import rel_l1

NONE, CAUSAL = "q2 kv2 d16 dv16 none", "q2 kv2 d16 dv16 causal"
NAMES = ("layers.0#0", "layers.1#0", "layers.2#0")


class Layer(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        return x + F.scaled_dot_product_attention(x, x, x, is_causal=self.causal)


class Model(nn.Module):
    """Three attentions, the last of them causal."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer(), Layer(causal=True)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 2, 20, 16)


def policy(*recipes: str, **changes: LayerPolicy) -> Policy:
    """A recipe for each layer of ``Model``; layers by name replace or add to them."""
    layers = {
        name: LayerPolicy((CAUSAL if name == NAMES[2] else NONE,), (recipe,), "measured")
        for name, recipe in zip(NAMES, recipes, strict=True)
    }
    return Policy({**layers, **changes}, target="cpu")


MIXED = policy("int8_int8", "exact", "int8_int16")


def applied(chosen: Any, x: Tensor, **options: Any) -> tuple[Tensor, Report]:
    return rewritten(Model(), x, policy=chosen, **{"min_seq_len": 0, **options})


def refusal(chosen: Any, x: Tensor, **options: Any) -> Exception:
    """The exception of ours that the compiled call ends in."""
    with pytest.raises(BackendCompilerFailed) as error:
        applied(chosen, x, **options)
    return error.value.inner_exception


# --- ways to give a policy ------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [lambda path: MIXED, str, Path, os.fspath], ids=["object", "str", "Path", "fspath"]
)
def test_a_policy_is_an_object_or_a_path(
    tmp_path: Path, x: Tensor, given: Callable[[Path], Any]
) -> None:
    path = tmp_path / "policy.json"
    MIXED.save(path)
    output, report = applied(given(path), x)
    assert [site.recipe for site in report.sites] == ["int8_int8", "", "int8_int16"]
    assert [site.decision for site in report.sites] == ["rewrite", "keep", "rewrite"]
    assert report.sites[0].reason.startswith("policy: measured, kernel cpu-")
    assert report.sites[1].reason == "policy: measured"
    assert report.policies == [MIXED]
    assert not torch.equal(output, Model()(x))


def test_a_policy_that_cannot_be_read_is_an_error_of_the_call(x: Tensor) -> None:
    error = refusal("nowhere.json", x)
    assert isinstance(error, PolicyError)
    assert str(error) == "nowhere.json: cannot be read: No such file or directory"


def test_exact_everywhere_leaves_the_graph_alone(x: Tensor) -> None:
    output, report = applied(policy("exact", "exact", "exact"), x)
    assert torch.equal(output, Model()(x))
    assert operator_calls(report) == 0 and report.rewritten == []
    (pair,) = report.graphs
    assert "sage" not in pair.after.code
    assert pair.after.code == pair.before.code


def test_each_layer_is_computed_with_its_own_recipe(x: Tensor) -> None:
    for at, name in enumerate(NAMES):
        recipes = ["exact"] * 3
        recipes[at] = "int8_int8"
        output, report = applied(policy(*recipes), x)
        assert [site.layer for site in report.rewritten] == [name]
        assert 0 < rel_l1(output, Model()(x)) < 0.1
        assert operator_calls(report) == 1


# --- what does not fit ----------------------------------------------------------------------

UNFIT = policy(
    "int8_int8",
    "int8_int8",
    "int8_int8",
    **{
        NAMES[1]: LayerPolicy(("q8 kv8 d16 dv16 none", CAUSAL), ("int8_int8",)),
        "layers.3#0": LayerPolicy((NONE,), ("int8_int8",)),
    },
)
del UNFIT.layers[NAMES[2]]

DIFFERENCES = [
    f"layers.1#0 is {NONE}; in the policy it is q8 kv8 d16 dv16 none or {CAUSAL}",
    f"layers.2#0 ({CAUSAL}) is not in the policy; close to it is 'layers.3#0'",
]


@pytest.mark.parametrize("least", [0, 10_000, None])
def test_all_differences_are_listed_before_any_gate(x: Tensor, least: int | None) -> None:
    error = refusal(UNFIT, x, min_seq_len=least)
    assert isinstance(error, PolicyError)
    listed = [line.removeprefix("  - ") for line in str(error).split("\n")[1:-1]]
    assert listed == DIFFERENCES
    assert str(error).startswith("the policy does not fit this model, 2 differences:")


def test_a_refused_graph_is_what_it_was(x: Tensor) -> None:
    graphs = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        before = gm.print_readable(print_output=False)
        with pytest.raises(PolicyError):
            transform(gm, parse_options({"policy": UNFIT}))
        graphs.append((before, gm.print_readable(print_output=False)))
        return gm.forward

    assert torch.equal(torch.compile(Model(), backend=backend)(x), Model()(x))
    assert graphs and all(before == after for before, after in graphs)


def test_what_fits_is_applied_without_strictness_and_the_rest_is_kept(x: Tensor) -> None:
    _, report = applied(UNFIT, x, strict_policy=False)
    assert [site.layer for site in report.rewritten] == ["layers.0#0"]
    assert [site.reason for site in report.kept] == [
        f"strict_policy=False: {difference}" for difference in DIFFERENCES
    ]
    assert all(site.cosine is None and site.rel_l1 is None for site in report.kept)


def test_a_layer_with_several_fingerprints_fits_with_each(x: Tensor) -> None:
    both = LayerPolicy((CAUSAL, NONE), ("int8_int8",))
    _, report = applied(Policy(dict.fromkeys(NAMES, both), target="cpu"), x)
    assert len(report.rewritten) == 3


def test_what_is_no_proved_attention_needs_no_policy() -> None:
    def function(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    _, report = rewritten(function, torch.randn(1, 2, 20, 16), policy=policy(*["exact"] * 3))
    assert ["dropout_p=0.5" in site.reason for site in report.sites] == [True]


# --- gates and kernels ----------------------------------------------------------------------


def test_short_attention_is_kept_by_the_gate(x: Tensor) -> None:
    _, report = applied(MIXED, x, min_seq_len=21)
    assert report.rewritten == []
    assert report.kept[0].reason == "query length 20 is below min_seq_len=21"
    assert len(applied(MIXED, x, min_seq_len=20)[1].rewritten) == 2


FOREIGN = policy("int4_fp8", "exact", "int8_int8")  # no kernel on a CPU for the first


def test_recipes_without_a_kernel_are_emulated(x: Tensor) -> None:
    _, report = applied(FOREIGN, x)
    assert [site.recipe for site in report.sites] == ["int4_fp8", "", "int8_int8"]
    assert report.sites[0].reason == (
        "policy: measured; emulated: no int4_fp8 kernel for device 'cpu'"
    )


def test_recipes_without_a_kernel_are_kept_on_demand(x: Tensor) -> None:
    _, report = applied(FOREIGN, x, fallback="sdpa")
    assert [site.recipe for site in report.sites] == ["", "", "int8_int8"]
    assert report.sites[0].reason == (
        "policy: measured; no int4_fp8 kernel for device 'cpu'; fallback='sdpa'"
    )


def test_recipes_without_a_kernel_are_an_error_on_demand(x: Tensor) -> None:
    error = refusal(FOREIGN, x, fallback="error")
    assert isinstance(error, KernelUnavailableError)
    assert str(error).startswith("layers.0#0: no int4_fp8 kernel for device 'cpu'")
    assert "precision='auto'" not in str(error)  # it is that already


def test_a_kept_recipe_of_some_timesteps_is_the_exact_operator(x: Tensor) -> None:
    layer = LayerPolicy((NONE, CAUSAL), ("int4_fp8", "int8_int8"))
    chosen = Policy(dict.fromkeys(NAMES, layer), target="cpu", timestep_ranges=2)
    sage.set_step(0, 2)
    try:
        output, report = applied(chosen, x, fallback="sdpa")
    finally:
        sage.set_step(None)
    assert {site.recipe for site in report.sites} == {"exact/int8_int8"}
    torch.testing.assert_close(output, Model()(x))


# --- what the report says -------------------------------------------------------------------


def errors(cosine: float, rel_l1: float) -> Errors:
    return Errors(cosine, rel_l1, 0.01, cosine, rel_l1, cosine, rel_l1)


def test_sites_have_the_measurements_of_the_policy(x: Tensor) -> None:
    seconds = {"int8_int8": 1e-3, "exact": 4e-3}
    measured = ({"int8_int8": errors(0.99, 0.02)},)
    chosen = policy(
        *["exact"] * 3,
        **{
            NAMES[0]: LayerPolicy((NONE,), ("int8_int8",), "", measured, seconds),
            NAMES[1]: LayerPolicy((NONE,), ("exact",), "", measured, seconds),
        },
    )
    first, second, third = applied(chosen, x)[1].sites
    assert (first.cosine, first.rel_l1) == (0.99, 0.02)
    assert (first.seconds, first.exact_seconds) == (1e-3, 4e-3)
    assert (second.cosine, second.rel_l1) == (None, None)  # kept: it has no error
    assert (second.seconds, second.exact_seconds) == (4e-3, 4e-3)
    assert (third.cosine, third.seconds, third.exact_seconds) == (None, None, None)
    kept = applied(chosen, x, min_seq_len=100)[1].sites[0]
    assert (kept.cosine, kept.seconds) == (None, 4e-3)


def test_measurements_of_an_unfit_layer_are_not_those_of_the_site(x: Tensor) -> None:
    other = LayerPolicy((CAUSAL,), ("int8_int8",), seconds={"int8_int8": 1e-3, "exact": 4e-3})
    chosen = policy(*["exact"] * 3, **{NAMES[0]: other})
    site = applied(chosen, x, strict_policy=False)[1].sites[0]
    assert (site.seconds, site.exact_seconds) == (None, None)


def test_explain_says_what_compiling_does(x: Tensor) -> None:
    options = {"policy": MIXED, "min_seq_len": 0}
    dry = sage.explain(Model(), x, options=options)
    assert sage.last_report().sites == [] == sage.last_report().policies
    torch.compile(Model(), backend="sage", options=options)(x)
    report = sage.last_report()
    assert dry.sites == report.sites and dry.policies == report.policies == [MIXED]
    assert str(dry) == str(report)


def test_explain_raises_the_difference_itself(x: Tensor) -> None:
    with pytest.raises(PolicyError, match="2 differences"):
        sage.explain(Model(), x, options={"policy": UNFIT})


def test_reports_of_several_compilations_are_merged(x: Tensor) -> None:
    others = policy("exact", "exact", "int8_int8")
    again = policy("int8_int8", "exact", "int8_int16")
    for chosen, length in ((MIXED, 20), (others, 20), (again, 12)):
        options = {"policy": chosen, "min_seq_len": 0}
        torch.compile(Model(), backend="sage", options=options, dynamic=False)(x[:, :, :length])
    report = sage.last_report()
    assert len(report.graphs) == 3 and len(report.sites) == 9
    assert report.policies == [MIXED, others]  # equal ones once
    torch._dynamo.reset()
    assert sage.last_report().policies == []


def test_recompiling_for_lengths_that_vary_applies_the_policy_again(x: Tensor) -> None:
    report = Report()

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        report.extend(transform(gm, parse_options({"policy": MIXED, "min_seq_len": 0})))
        return gm.forward

    model = Model()
    compiled = torch.compile(model, backend=backend)
    for length in (20, 24, 40):
        data = torch.randn(1, 2, length, 16)
        assert 0 < rel_l1(compiled(data), model(data)) < 0.1
    assert len(report.graphs) == 2  # fixed, then any length
    assert [site.recipe for site in report.sites] == ["int8_int8", "", "int8_int16"] * 2
    assert [site.layer for site in report.sites] == [*NAMES, *NAMES]


@pytest.mark.parametrize("name", ["freezing", "triton.cudagraphs"])
def test_what_would_make_a_step_permanent_is_refused_for_the_whole_process(
    name: str, x: Tensor
) -> None:
    recipes = ("exact", "int8_fp8")
    layers = {
        layer: LayerPolicy((CAUSAL if layer == NAMES[2] else NONE,), recipes) for layer in NAMES
    }
    by_step = Policy(layers, target="cpu", timestep_ranges=2)
    compiled = torch.compile(Model(), backend="sage", options={"policy": by_step})
    with torch._inductor.config.patch({name: True}), pytest.raises(BackendCompilerFailed) as error:
        compiled(x)
    assert name in str(error.value) and "switch it off" in str(error.value)


def test_a_policy_whose_file_has_gone_still_serves_and_a_changed_one_is_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "policy.json"
    layer = LayerPolicy((NONE,), ("exact",))
    Policy({"a#0": layer}, target="cpu").save(path)
    first = parse_options({"policy": path}).policy
    Policy({"a#0": layer, "longer_name#0": layer}, target="cpu").save(path)
    second = parse_options({"policy": path}).policy
    path.unlink()
    assert first is not None and second is not None
    assert [len(each.layers) for each in (first, second)] == [1, 2]
    assert parse_options({"policy": path}).policy == second
