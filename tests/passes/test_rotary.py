"""Rotary embedding taken out of the graph and handed to the operator: proved, or left alone.

No kernel of a CPU rotates, so most tests force the pass; the operator then rotates with torch,
which must give what the model gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sage_compiler.backend import decide, transform
from sage_compiler.config import Options, parse_options
from sage_compiler.kernels import registry
from sage_compiler.kernels.kernel import Kernel
from sage_compiler.passes.pipeline import Decision
from sage_compiler.passes.site import AttentionSite
from sage_compiler.precision import EXACT
from sage_compiler.report import Report
from tests.capture import rewritten
from tests.passes.checks import normal
from tests.zoo.harness import PLAIN, Case, built, outputs_of, tensors
from tests.zoo.registry import BY_NAME, unavailable

B, H, L, D = 2, 4, 6, 8
ROTATED = torch.ops.sage.rotary_attention.default


def forced(site: AttentionSite, options: Options) -> Decision:
    """As if a kernel that rotates served every site."""
    return replace(decide(site, options), fuses_rotary=True)


def fused(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> Any:
    """The results of the rewritten function, and the report."""
    report = Report()

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        report.extend(transform(gm, parse_options({"precision": EXACT}), forced))
        return gm.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=dynamic)(*inputs), report


def operators(report: Report) -> int:
    return sum(node.target is ROTATED for pair in report.graphs for node in pair.after.graph.nodes)


def check(
    function: Callable[..., Any], *inputs: Tensor, tolerance: float = 0.0, **options: Any
) -> list[str]:
    """What the report says of rotations; results must be those of eager, bit by bit."""
    expected = function(*(each.clone() for each in inputs))
    actual, report = fused(function, *(each.clone() for each in inputs), **options)
    assert len(report.rewritten) == len(report.sites) > 0, str(report)
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    texts = [site.rotary for site in report.sites]
    assert operators(report) == sum(text.startswith("fused") for text in texts)
    return texts


def angles(channels: int, length: int = L) -> Tensor:
    return torch.outer(torch.arange(float(length)), 10.0 ** -torch.linspace(0, 1, channels // 2))


def halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


# --- the forms that models have ---------------------------------------------------------------


def llama(x: Tensor) -> Tensor:
    both = torch.cat((angles(D), angles(D)), -1)
    cos, sin = both.cos()[None, None].to(x.dtype), both.sin()[None, None].to(x.dtype)
    return x * cos + halves(x) * sin


def neox(x: Tensor) -> Tensor:
    both = torch.cat((angles(4), angles(4)), -1)
    turned, rest = x[..., :4], x[..., 4:]
    return torch.cat((turned * both.cos() + halves(turned) * both.sin(), rest), -1)


def gpt_oss(x: Tensor) -> Tensor:
    cos, sin = angles(D).cos(), angles(D).sin()
    first, second = torch.chunk(x, 2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def gpt_j(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    cos, sin = (
        table[None, :, None].repeat_interleave(2, 3) for table in (angles(4).cos(), angles(4).sin())
    )
    turned, rest = x[..., :4], x[..., 4:]
    return torch.cat((turned * cos + neighbours(turned) * sin, rest), -1).permute(0, 2, 1, 3)


def flux(x: Tensor) -> Tensor:
    cos, sin = (table.repeat_interleave(2, -1) for table in (angles(D).cos(), angles(D).sin()))
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def two_rows(x: Tensor) -> Tensor:
    """Halves as a dim of their own, one entry for each pair in interleaved order."""
    cos, sin = angles(D).cos(), angles(D).sin()
    a, b = x.unflatten(-1, (D // 2, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def timm(x: Tensor) -> Tensor:
    embedding = torch.cat((angles(D).sin(), angles(D).cos()), -1).repeat_interleave(2, -1)
    sin, cos = embedding.tensor_split(2, -1)
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin


def complex_numbers(x: Tensor) -> Tensor:
    turn = torch.polar(torch.ones(L, D // 2), angles(D))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3).type_as(x)


FORMS = {
    llama: "fused (half, 8 of 8 channels)",
    neox: "fused (half, 4 of 8 channels)",
    gpt_oss: "fused (half, 8 of 8 channels)",
    gpt_j: "fused (interleaved, 4 of 8 channels)",
    flux: "fused (interleaved, 8 of 8 channels)",
    two_rows: "fused (interleaved, 8 of 8 channels)",
    timm: "fused (interleaved, 8 of 8 channels)",
    complex_numbers: "fused (interleaved, 8 of 8 channels)",
}


def attend(rotate: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Projections, a rotation, attention."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(B, L, H, D).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(rotate(q), rotate(k), v)

    return function


def projections(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(B, L, H * D, seed=seed).to(dtype) for seed in range(3)]


@pytest.mark.parametrize("rotate", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms(rotate: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and rotate in (neox, gpt_oss, gpt_j, two_rows, timm):
        # Tables of float32 make the rotated Q float32, beside a V of bfloat16: SDPA refuses.
        form, rotate = rotate, lambda x: form(x).to(x.dtype)
        assert check(attend(rotate), *projections(dtype)) == [FORMS[form]]
        return
    # A processor may multiply complex numbers with FMAs, which round once less.
    rounding = 0.0 if rotate is not complex_numbers else 1e-6 if dtype == torch.float32 else 2**-8
    assert check(attend(rotate), *projections(dtype), tolerance=rounding) == [FORMS[rotate]]


def test_lengths_that_vary_and_tables_of_the_caller() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in (q, k, v))
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = (x * cos + halves(x) * sin for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    tables = [normal(B, L, D, seed=seed) for seed in (4, 5)]
    text = check(function, *projections(), *tables, dynamic=True)
    assert text == ["fused (half, 8 of 8 channels)"]


def test_gradients() -> None:
    function = attend(llama)
    leaves = [each.requires_grad_() for each in projections()]
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    output, report = fused(function, *leaves)
    assert operators(report) == 1
    actual = torch.autograd.grad(output.square().sum(), leaves)
    for found, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotates", [False, True])
def test_the_kernel_that_serves_a_site_decides(
    rotates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none rotates the graph stays as it is: Inductor fuses the rotation there."""
    seen = []

    def run(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(options.get("rotary"))
        return torch.zeros_like(query), torch.zeros(query.shape[:3])

    kernel = Kernel(
        name=lambda: "test", device_type="cpu", recipe="int8_int8", refuse=lambda problem: None,
        gate=lambda problem: "never", run=run, run_rotary=run if rotates else None,
    )  # fmt: skip
    monkeypatch.setattr(registry, "KERNELS", [kernel])
    report = Report()

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        report.extend(transform(gm, parse_options({"precision": "int8_int8"})))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(attend(llama), backend=backend)(*projections())
    assert [site.decision for site in report.sites] == ["rewrite"]
    assert operators(report) == int(rotates)
    assert report.sites[0].rotary == ("fused (half, 8 of 8 channels)" if rotates else "")
    assert [each is not None for each in seen] == [rotates]
    assert ("rotary fused" in str(report)) is rotates


def test_no_rotation_is_no_news() -> None:
    assert check(attend(lambda x: x * 2), *projections()) == [""]


# --- one side alone -----------------------------------------------------------------------------


def test_a_cache_that_holds_rotated_keys() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
        q, k, v = (x.view(B, L, H, D).transpose(1, 2) for x in (q, k, v))
        k = torch.cat((past, llama(k)), 2)
        return F.scaled_dot_product_attention(llama(q), k, torch.cat((past, v), 2))

    text = check(function, *projections(), normal(B, H, 3, D))
    assert text == ["fused (half, 8 of 8 channels, query alone)"]


def test_rotated_keys_that_are_returned() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.view(B, L, H, D).transpose(1, 2) for x in (q, k, v))
        k = llama(k)
        return F.scaled_dot_product_attention(llama(q), k, v), k

    expected = function(*projections())
    actual, report = fused(function, *projections())
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert report.sites[0].rotary == (
        "fused (half, 8 of 8 channels, query alone); key: what is rotated is also used by output"
    )


def test_sides_rotated_in_two_ways() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(B, L, H, D).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(llama(q), neox(k), v)

    (text,) = check(function, *projections())
    assert text.startswith("fused (half, 8 of 8 channels, query alone); key: rotated in another")


# --- near misses --------------------------------------------------------------------------------

BOTH = torch.cat((angles(D), angles(D)), -1)
COS, SIN = BOTH.cos(), BOTH.sin()


def with_other(other: Callable[[Tensor], Tensor], cos: Tensor = COS, sin: Tensor = SIN) -> Any:
    return lambda x: x * cos + other(x) * sin


def swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first, -second), -1)


def one_off(x: Tensor) -> Tensor:
    return torch.cat((x[..., :1], neox(x[..., 1:].contiguous())[..., :7]), -1)


def changed(x: Tensor) -> Tensor:
    x = x.contiguous()
    rotated = llama(x)
    x.mul_(2.0)
    return rotated


def written(x: Tensor) -> Tensor:
    result = llama(x)
    result += 0.0
    return result


MISSES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "no sign": (with_other(lambda x: x.roll(D // 2, -1)), "roll is neither"),
    "no negation": (with_other(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1)), "signs are not"),
    "the other half negated": (
        with_other(lambda x: torch.cat((x[..., 4:], -x[..., :4]), -1)), "signs are not",
    ),
    "halves not exchanged": (with_other(swapped), "is not made of itself and another one"),
    "a difference": (lambda x: x * COS - halves(x) * SIN, "signs are not"),
    "own part negated": (lambda x: halves(x) * SIN - x * COS, "the sign of channel 0"),
    "unequal halves": (
        with_other(lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1)), "paired in another way",
    ),
    "the last channels": (
        lambda x: torch.cat((x[..., 4:] * COS[:, :4] + halves(x[..., 4:]) * SIN[:, :4],
                             x[..., :4]), -1),
        "channels",
    ),
    "tables turned around": (
        with_other(halves, COS.flip(-1)[:, :1].expand(L, D).contiguous()[:, :1]), "no entries",
    ),
    "two sums": (lambda x: llama(x) + x, "what is added are not products"),
    "a number besides": (lambda x: llama(x) * 0.5, "multiplied"),
    "changed since": (changed, "changed in place"),
    "two tables": (lambda x: x * COS * COS + halves(x) * SIN, "multiplied twice"),
    "one head of all": (lambda x: llama(x) * 1 + 0 * x[:, 1:2], "multiplied"),
    "an index that is computed": (
        lambda x: x * COS + x[..., torch.arange(D).roll(D // 2)] * SIN, "depends on what",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSES)
def test_near_misses_are_left_alone(what: str) -> None:
    rotate, words = MISSES[what]
    (text,) = check(attend(rotate), *projections())
    assert text.startswith("not fused (query: "), text
    assert words in text


def test_an_offset_of_the_tables_is_another_table() -> None:
    """Positions do not matter: entries are what the model multiplies by."""
    long = torch.cat((angles(D, L + 5), angles(D, L + 5)), -1)
    rotate = with_other(halves, long.cos()[5:], long.sin()[5:])
    assert check(attend(rotate), *projections()) == ["fused (half, 8 of 8 channels)"]


def test_tables_of_each_head_in_another_order() -> None:
    """(L, H, D) beside a query (B, L, H, D), which is transposed after its rotation."""
    cos, sin = normal(L, H, D, seed=1), normal(B, L, H, D, seed=2)

    def rotate(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return (x * cos + neighbours(x) * sin).transpose(1, 2)

    assert check(attend(rotate), *projections()) == ["fused (interleaved, 8 of 8 channels)"]


def test_cosines_and_sines_that_change_places_stay_what_they_multiply() -> None:
    rotate = with_other(halves, SIN, COS)
    assert check(attend(rotate), *projections()) == ["fused (half, 8 of 8 channels)"]


# --- whole models -------------------------------------------------------------------------------

# Name -> pairs, rotated channels of all.
MODELS = {
    "Llama": "half, 8 of 8",
    "GPT-NeoX": "half, 2 of 8",
    "GPT-J": "interleaved, 4 of 8",
    "Phi": "half, 4 of 8",
    "Qwen3 (QK-norm)": "half, 8 of 8",
    "Gemma": "half, 8 of 8",
    "Cohere": "interleaved, 8 of 8",
    "GLM-4": "interleaved, 4 of 8",
    "FLUX": "interleaved, 16 of 16",
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_zoo(name: str) -> None:
    """Every site of the model: bit by bit what the rewrite gives that leaves rotations alone."""
    architecture = BY_NAME[name]
    if unavailable(architecture):
        pytest.skip(unavailable(architecture))
    for implementation in architecture.implementations:
        check_model(Case(architecture, implementation, PLAIN), f"fused ({MODELS[name]} channels)")


def check_model(case: Case, text: str) -> None:
    module, reports = built(case), []

    def with_rotation(**given: Any) -> Any:
        result, report = fused(lambda all_: module(**all_), given)
        reports.append(report)
        return result

    def without(**given: Any) -> Any:
        return rewritten(lambda all_: module(**all_), given, precision=EXACT)[0]

    with torch.no_grad():
        actual = list(tensors(outputs_of(module, case, with_rotation)))
        expected = list(tensors(outputs_of(module, case, without)))
    assert {site.rotary for report in reports for site in report.rewritten} == {text}
    for found, right in zip(actual, expected, strict=True):
        assert torch.equal(found, right)
