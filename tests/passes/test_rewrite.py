"""The graph surgery: what replaces a site, what stays, and what happens when a check fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sage_compiler.errors import InvalidAttentionError
from sage_compiler.passes import pipeline, rewrite
from sage_compiler.passes.pipeline import Decision
from sage_compiler.precision import EXACT
from tests.passes.checks import Compiled, captured, check, normal, same, sdpa

B, H, L, D = 2, 4, 6, 8
Q, K = normal(B, H, L, D), normal(B, H, 9, D)
OPERATOR = torch.ops.sage.attention.default


def exact(site: Any) -> Decision:
    return Decision(EXACT, "asked for")


def operators(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=OPERATOR))


def originals(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=sdpa))


# --- values, strides, aliasing --------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda q: q,
    "projection": lambda q: q.reshape(B, L, H, D).transpose(1, 2),
    "every other column": lambda q: torch.cat([q, q], -1)[..., ::2],
    "head_dim first": lambda q: q.reshape(D, B, H, L).permute(1, 2, 3, 0),
    "length first": lambda q: q.reshape(L, B, H, D).permute(1, 2, 0, 3),
    "heads first": lambda q: q.reshape(H, B, L, D).permute(1, 0, 2, 3),
    "expanded": lambda q: q[:1].expand(B, H, L, D),
    "expanded heads": lambda q: q[:, :1].expand(B, H, L, D),
    "one query": lambda q: q[:, :, :1],
    "one head": lambda q: q[:, :1],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_are_those_of_eager(name: str) -> None:
    def attend(q: Tensor) -> tuple[Any, ...]:
        q = LAYOUTS[name](q)
        out = sdpa(q, q, q)
        flat = out.view(-1) if out.is_contiguous() else out.transpose(1, 2).reshape(-1)
        return out, flat, out.stride(), out.is_contiguous()

    assert len(check(attend, Q).rewritten) == 1


def test_a_view_that_only_these_strides_allow() -> None:
    def attend(x: Tensor) -> Tensor:
        q = x.view(B, L, H, D).transpose(1, 2)
        return sdpa(q, q, q).transpose(1, 2).view(B, L, H * D)

    assert len(check(attend, normal(B, L, H * D)).rewritten) == 1


def _in_place_after(q: Tensor) -> Tensor:
    out = sdpa(q, q, q)
    q.mul_(2)
    return out


def _in_place_before(q: Tensor) -> Tensor:
    q.mul_(2)
    return sdpa(q, q, q)


def _in_place_through_a_view(q: Tensor) -> Tensor:
    view = q[:, 0]
    first = sdpa(q, q, q)
    view.zero_()
    return first + sdpa(q, q, q)


def _cache(q: Tensor) -> Tensor:
    keys = torch.zeros(B, H, 2 * L, D)
    keys[:, :, :L] = q
    first = sdpa(q, keys, keys)
    keys[:, :, L:] = first
    return sdpa(q, keys, keys)


def _shared_mask(q: Tensor) -> Tensor:
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    return sdpa(sdpa(q, q, q, mask), q, q, mask) + mask.sum()


USES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "returned twice": (lambda q: (lambda out: (out, out, out + 1))(sdpa(q, q, q)), 1),
    "unused": (lambda q: (sdpa(q, q, q), q + 1)[1], 1),
    "inputs returned": (lambda q: (q, sdpa(q, q, q), q), 1),
    "changed in place": (lambda q: sdpa(q, q, q).mul_(2), 1),
    "part changed in place": (lambda q: sdpa(q, q, q)[0].zero_(), 1),
    "3-D, changed in place": (lambda q: sdpa(q[0], q[0], q[0]).add_(1), 1),
    "input changed after": (_in_place_after, 1),
    "input changed before": (_in_place_before, 1),
    "input changed through a view": (_in_place_through_a_view, 2),
    "a cache": (_cache, 2),
    "chained": (lambda q: sdpa(sdpa(q, q, q), sdpa(q + 1, q, q), sdpa(q, q, q)), 4),
    "as a mask": (lambda q: sdpa(q, q, q, sdpa(q, q, q)[..., :L]), 2),
    "one mask for two": (_shared_mask, 2),
    "the mask is the query": (lambda q: sdpa(q, q, q, q[..., :L]), 1),
    "repeats of an output": (
        lambda q: sdpa(q, *[sdpa(q[:, :2], q[:, :2], q[:, :2]).repeat_interleave(2, 1)] * 2),
        2,
    ),
    "without gradient": (lambda q: torch.no_grad()(lambda: sdpa(q, q, q))(), 1),
    "negated": (lambda q: sdpa(torch.complex(q, q).conj().imag, q, q), 1),
}


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    function, count = USES[name]
    report = check(function, Q)
    assert len(report.rewritten) == count
    (pair,) = report.graphs
    assert len(operators(pair.after.graph)) == count
    assert not originals(pair.after.graph)


def test_nothing_with_a_side_effect_is_erased() -> None:
    def attend(q: Tensor, state: Tensor) -> Tensor:
        mask = torch.ones(L, L, dtype=torch.bool).tril()
        ordinary = mask & mask  # used by the attention alone, and folded
        state.add_(ordinary.sum())
        noise = torch.rand(L, L)  # advances the generator, whoever looks at the result
        F.relu(noise, inplace=True)
        return sdpa(q, q, q, ordinary) + torch.rand(())

    (pair,) = check(attend, Q, torch.zeros(())).graphs

    def effects(graph: fx.Graph) -> list[str]:
        names = ("add_", "rand", "relu")
        called = (str(getattr(node.target, "__name__", node.target)) for node in graph.nodes)
        return [name for name in called if name in names]

    assert effects(pair.before.graph) == ["add_", "rand", "relu", "rand"]
    assert effects(pair.after.graph) == effects(pair.before.graph)


def test_what_only_the_site_used_is_erased() -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        mask = torch.ones(L, L, dtype=torch.bool).tril()
        k = k[:, :, None].expand(B, 2, 2, L, D).reshape(B, H, L, D)
        return sdpa(q, k, k, mask)

    (pair,) = check(attend, Q, normal(B, 2, L, D)).graphs
    assert [node.op for node in pair.after.graph.nodes] == [
        "placeholder",
        "placeholder",
        "call_function",
        "output",
    ]


# --- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "causal", "window", "bias", "groups", "batch"])
def test_gradients(kind: str) -> None:
    """The rewritten graph, run by autograd, differentiates as eager does."""

    def attend(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        match kind:
            case "causal":
                return sdpa(q, q, q, torch.full((L, L), -torch.inf).triu(1))
            case "window":
                return sdpa(q, q, q, torch.ones(L, L, dtype=torch.bool).tril(1).triu(-2))
            case "bias":
                return sdpa(q, q, q, bias)
            case "groups":
                k = k[:, :2].repeat_interleave(2, 1)
                return sdpa(q, k, k)
            case "batch":
                return sdpa(q, k[:1], k[:1])
        return sdpa(q, k, k)

    gradients = []
    for compiled in (False, True):
        inputs = [x.clone().requires_grad_() for x in (Q, K, normal(L, L))]
        function = Compiled(attend) if compiled else attend
        function(*inputs).square().sum().backward()
        gradients.append([x.grad for x in inputs])
        if compiled:
            assert len(function.report.rewritten) == 1
    for actual, expected in zip(*reversed(gradients), strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- symbolic sizes -------------------------------------------------------------------------

SYMBOLIC: dict[str, tuple[Any, ...]] = {
    "lengths": (lambda q, k: sdpa(q, k, k, is_causal=True), {2}, {2}, (B, H, 3, D), (B, H, 7, D)),
    "batch": (lambda q, k: sdpa(q, k, k), {0}, {0}, (5, H, L, D), (5, H, 9, D)),
    "keys of batch 1": (lambda q, k: sdpa(q, k[:1], k[:1]), {0}, (), (5, H, L, D), (B, H, 9, D)),
    "query of batch 1": (lambda q, k: sdpa(q[:1], k, k), (), {0}, (B, H, L, D), (5, H, 9, D)),
    "3-D": (lambda q, k: sdpa(q[:, 0], k[:, 0], k[:, 0]), {0, 2}, {0}, (5, H, 3, D), (5, H, 9, D)),
    "length first": (
        lambda q, k: sdpa(q.permute(2, 0, 1, 3), q.permute(2, 0, 1, 3), q.permute(2, 0, 1, 3)),
        {1, 2},
        (),
        (B, 3, 5, D),
        (B, H, 9, D),
    ),
    "then a view": (
        lambda q, k: sdpa(q, k, k).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1),
        {0, 2},
        {0, 2},
        (3, H, 11, D),
        (3, H, 4, D),
    ),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(name: str) -> None:
    function, q_dims, k_dims, *sizes = SYMBOLIC[name]
    q, k = Q.clone(), K.clone()
    for dim in q_dims:
        torch._dynamo.mark_dynamic(q, dim)
    for dim in k_dims:
        torch._dynamo.mark_dynamic(k, dim)
    compiled = Compiled(function)
    same(compiled(q, k), function(q, k))
    others = [normal(*size) for size in sizes]
    same(compiled(*others), function(*others))
    assert len(compiled.report.graphs) == 1  # the rewrite adds no guard of its own
    assert len(compiled.report.rewritten) == 1


def test_a_length_that_depends_on_data() -> None:
    def attend(q: Tensor, k: Tensor, length: Tensor) -> Tensor:
        count = length.item()
        k = k[:, :, :count]
        return sdpa(q, k, k)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        report = check(attend, Q, K, torch.tensor(3))
    assert len(report.rewritten) == 1


# --- what the new nodes say -----------------------------------------------------------------


class Attend(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return sdpa(q, q, q)


def test_metadata_is_that_of_the_replaced_node() -> None:
    model = nn.Sequential(Attend())
    for query in (Q, Q[0]):
        gm = captured(model, query)
        (old,) = originals(gm.graph)
        meta = dict(old.meta)
        pipeline.run(gm, exact)
        (new,) = gm.graph.output_node().all_input_nodes
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            assert new.meta[key] == meta[key]
        (call,) = operators(gm.graph)
        assert call.meta["stack_trace"] == meta["stack_trace"]
        value = new.meta["example_value"]
        assert value.shape == meta["example_value"].shape
        assert value.stride() == meta["example_value"].stride()
        assert value.dtype == meta["example_value"].dtype


def test_trailing_defaults_are_left_out() -> None:
    gm = captured(lambda q: sdpa(q, q, q, scale=0.5), Q)
    (finding,) = (finding for finding, _ in pipeline.run(gm, exact).findings)
    (call,) = operators(gm.graph)
    assert call.args == (finding.query,) * 3 + (None, "none", 0.5)


def test_the_gate_is_an_argument() -> None:
    gm = captured(lambda q: sdpa(q, q, q), Q)
    pipeline.run(gm, lambda site: Decision("auto", "", min_seq_len=17))
    (call,) = operators(gm.graph)
    schema = [given.name for given in OPERATOR._schema.arguments]
    given = dict(zip(schema, call.args, strict=False))  # trailing defaults are left out
    assert given["recipe"] == "auto"
    assert given["min_seq_len"] == 17


def test_windows_reach_the_operator() -> None:
    gm = captured(lambda q: sdpa(q, q, q, torch.ones(L, L).tril(1).triu(-2).bool()), Q)
    pipeline.run(gm, exact)
    (call,) = operators(gm.graph)
    given = dict(zip([each.name for each in OPERATOR._schema.arguments], call.args, strict=False))
    assert given["mask_class"] == "window"
    assert (given["window_left"], given["window_right"]) == (2, 1)
    assert given["attn_mask"] is None


def test_the_graph_keeps_its_code_generator_and_its_parameters() -> None:
    model = nn.Sequential(nn.Linear(D, D), Attend())
    gm = captured(model, Q)

    def parameters(graph: fx.Graph) -> list[Any]:
        return [getattr(n, "_dynamo_source", None) for n in graph.find_nodes(op="placeholder")]

    codegen, sources = gm.graph._codegen, parameters(gm.graph)
    assert any(source is not None for source in sources)
    outcome = pipeline.run(gm, exact)
    assert gm.graph._codegen is codegen
    assert parameters(gm.graph) == sources
    assert parameters(outcome.before.build()) == sources


# --- failures -------------------------------------------------------------------------------


def three(q: Tensor) -> Tensor:
    first = sdpa(q, q, q)
    second = sdpa(first, q[:1], q[:1])
    return sdpa(second, first, first)


def failing_at(number: int, error: Exception) -> Callable[..., fx.Node]:
    """The rewrite of a site, which fails at the given one after some nodes are inserted."""
    call_operator, calls = rewrite._call_operator, iter(range(10))

    def fail(*args: Any) -> fx.Node:
        new = call_operator(*args)
        if next(calls) == number:
            raise error
        return new

    return fail


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_failing_site_is_kept_and_the_others_are_rewritten(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    broken = failing_at(number, InvalidAttentionError("refused"))
    monkeypatch.setattr(rewrite, "_call_operator", broken)
    report = check(three, Q)
    (kept,) = report.kept
    assert kept is report.sites[number]
    assert kept.reason == "the replacement failed its check: refused"
    (pair,) = report.graphs
    assert len(operators(pair.after.graph)) == 2
    assert len(originals(pair.after.graph)) == 1
    assert not [n for n in pair.after.graph.nodes if not n.users and n.op == "call_function"]


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda x: x[..., :4],
    "dtype": lambda x: x.to(torch.bfloat16),
    "shape (3": lambda x: torch.cat([x, x[:1]]),
}


@pytest.mark.parametrize("word", SPOILED)
def test_a_replacement_of_another_kind_is_refused(
    monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    call_operator = rewrite._call_operator

    def spoil(call: Any, *args: Any) -> Any:
        return call(SPOILED[word], call_operator(call, *args))

    monkeypatch.setattr(rewrite, "_call_operator", spoil)
    report = check(three, Q)
    assert not report.rewritten
    assert all(word in site.reason for site in report.kept)


def listing(graph: fx.Graph) -> list[str]:
    return [node.format_node() or "output" for node in graph.nodes]


def test_a_graph_that_is_not_well_formed_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = captured(three, Q)
    before = listing(gm.graph)

    def lint(graph: fx.Graph) -> None:
        raise RuntimeError("no order\nand more")

    monkeypatch.setattr(fx.Graph, "lint", lint)
    outcome = pipeline.run(gm, exact)
    assert [decision.recipe for _, decision in outcome.findings] == [None] * 3
    reason = outcome.findings[0][1].reason
    assert reason == "the rewritten graph is not well formed: no order"
    assert listing(gm.graph) == before
    gm.recompile()
    same(gm(Q)[0], three(Q))


def test_a_bug_propagates_and_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = captured(three, Q)
    before = listing(gm.graph)
    monkeypatch.setattr(rewrite, "_call_operator", failing_at(1, KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        pipeline.run(gm, exact)
    assert listing(gm.graph) == before
    gm.recompile()
    same(gm(Q)[0], three(Q))
