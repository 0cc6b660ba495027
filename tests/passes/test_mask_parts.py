"""How masks are taken apart: what becomes the operator's band, and what stays explicit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sage_compiler.passes import terms
from sage_compiler.passes.effects import Effects
from sage_compiler.passes.masks import Analysis, MaskContext, Term, analyze
from sage_compiler.passes.values import Apply
from sage_compiler.semantics import MaskClass
from tests.passes.checks import captured, check, normal, sdpa
from tests.passes.masked_softmax import ADDITIVE, HIDDEN, VISIBLE, Kind, Masks

L = 6
INF = math.inf
LOWEST = torch.finfo(torch.float32).min
S, WIDE = normal(L, L), normal(L, L + 3)
PAD = torch.tensor([[True] * L, [False] * 2 + [True] * (L - 2)])
BIAS = normal(3, L, L, seed=2)


def ones(*size: int) -> Tensor:
    return torch.ones(size or (L, L), dtype=torch.bool)


def low(fill: float = -INF, diagonal: int = 1) -> Tensor:
    return torch.full((L, L), fill).triu(diagonal)


def analysis_of(
    mask: Callable[..., Any], *inputs: Tensor, kinds: Sequence[Kind] | None = None
) -> Analysis:
    """The analysis of a function of scores and inputs, after it was compared with the masks."""
    masks = Masks(mask, kinds)
    found = masks(S, *inputs)
    assert masks.readable
    return found


def nodes(analysis: Analysis) -> list[tuple[str, str]]:
    return [(str(term.kind), term.node.name) for term in analysis.terms]


# --- conjunctions ---------------------------------------------------------------------------

CONJUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "and": lambda s, pad: ones().tril() & pad[:, None, None],
    "other order": lambda s, pad: pad[:, None, None] & ones().tril(),
    "logical_and": lambda s, pad: torch.logical_and(ones().tril(), pad[:, None, None, :]),
    "bitwise_and": lambda s, pad: torch.bitwise_and(pad[:, None, None, :], ones().tril()),
    "times": lambda s, pad: ones().tril() * pad[:, None, None, :],
    "De Morgan": lambda s, pad: ~(ones().triu(1) | ~pad[:, None, None, :]),
    "where": lambda s, pad: torch.where(pad[:, None, None, :], ones().tril(), False),
    "masked_fill": lambda s, pad: ones().tril().masked_fill(~pad[:, None, None, :], False),
    "deep": lambda s, pad: ones() & (pad[:, None, None] & (ones().tril() & ones().tril(2))),
    "expanded": lambda s, pad: (ones().tril() & pad[:, None, None]).expand(2, 3, L, L),
    "copied": lambda s, pad: (ones().tril() & pad[:, None, None]).clone().contiguous(),
    "viewed later": lambda s, pad: (ones().tril() & pad[:, None])[:, None],
    "unsqueezed later": lambda s, pad: (ones().tril() & pad.unsqueeze(1)).unsqueeze(1),
    "transposed": lambda s, pad: (ones().triu()[None] & pad[:, :, None]).mT[:, None],
    "permuted": lambda s, pad: (ones().tril()[:, :, None] & pad.mT[None]).permute(2, 0, 1)[:, None],
    "sliced, everything": lambda s, pad: (ones().tril() & pad[:, None, None])[..., : s.shape[1]],
    "cast": lambda s, pad: (ones().tril() & pad[:, None, None]).to(torch.int64).bool(),
    "floats": lambda s, pad: ones().tril().float() * pad[:, None, None].float() == 1,
    "in place": lambda s, pad: ones(2, 1, L, L).tril().logical_and_(pad[:, None, None]),
}


@pytest.mark.parametrize("name", CONJUNCTIONS)
def test_conjunctions_are_taken_apart(name: str) -> None:
    analysis = analysis_of(CONJUNCTIONS[name], PAD)
    assert analysis.mask_class is MaskClass.CAUSAL
    assert analysis.text.startswith("causal and explicit bool (2, 1, 1, 6)")
    assert analysis.proof.endswith("and explicit: it depends on the input L_inputs_0_")
    (term,) = analysis.terms
    assert (term.kind, term.fill) in [(VISIBLE, -INF), (HIDDEN, -INF)]
    assert not analysis.live


@pytest.mark.parametrize("name", CONJUNCTIONS)
def test_hidden_conjunctions(name: str) -> None:
    analysis = analysis_of(lambda s, pad: ~CONJUNCTIONS[name](s, pad), PAD, kinds=[(HIDDEN, -INF)])
    assert analysis.mask_class is MaskClass.CAUSAL
    assert len(analysis.terms) == 1


@pytest.mark.parametrize("name", CONJUNCTIONS)
def test_attention_with_conjunctions(name: str) -> None:
    q = normal(2, 3, L, 8)
    report = check(lambda q, pad: sdpa(q, q, q, CONJUNCTIONS[name](q[0, 0], pad)), q, PAD)
    (site,) = report.rewritten
    assert "causal" in site.mask or name in ("viewed later", "unsqueezed later")


def test_a_conjunction_of_unknown_masks_is_one_mask() -> None:
    analysis = analysis_of(lambda s, pad, full: pad[:, None, None] & full, PAD, PAD[:, None, None])
    (term,) = analysis.terms
    assert term.value is None and term.node.name == "masks"


def test_a_disjunction_with_an_unknown_mask_is_not_taken_apart() -> None:
    analysis = analysis_of(lambda s, pad: ones().tril() | pad[:, None, None], PAD)
    assert (analysis.text, len(analysis.terms)) == ("explicit bool (2, 1, 6, 6)", 1)


def test_bands_intersect() -> None:
    analysis = analysis_of(lambda s: ones().tril() & ones().triu(-2) & ones().tril(3))
    assert (analysis.text, analysis.terms) == ("window (2, 0)", ())


def test_bands_of_different_corners_stay_two() -> None:
    masks = Masks(lambda s: (ones(*s.shape).tril(), ones(*s.shape).triu(4)))
    analysis = masks(WIDE)
    assert analysis.mask_class is not MaskClass.NONE
    assert len(analysis.terms) == 1


# --- sums -----------------------------------------------------------------------------------

SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mask first": lambda s, bias: low() + bias,
    "bias first": lambda s, bias: bias + low(),
    "add": lambda s, bias: torch.add(bias, low()),
    "with zeros": lambda s, bias: torch.zeros(1, 3, L, L) + (bias + low()),
    "viewed later": lambda s, bias: (low() + bias)[None],
    "expanded later": lambda s, bias: (low() + bias).expand(2, 3, L, L),
    "of bools": lambda s, bias: torch.where(ones().tril(), 0.0, -INF) + bias,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_taken_apart(name: str) -> None:
    analysis = analysis_of(SUMS[name], BIAS)
    assert analysis.mask_class is MaskClass.CAUSAL
    (term,) = analysis.terms
    assert term.kind is ADDITIVE and term.node.name == "l_inputs_0_"
    assert not analysis.live


def test_zeros_are_dropped() -> None:
    analysis = analysis_of(lambda s, bias: torch.zeros(L, L) + bias, BIAS)
    assert nodes(analysis) == [("additive", "l_inputs_0_")]


def test_a_condition_beside_a_bias() -> None:
    def mask(s: Tensor, pad: Tensor, bias: Tensor) -> Tensor:
        return torch.where(ones().tril() & pad[:, None, None], 0.0, -INF) + bias

    analysis = analysis_of(mask, PAD, BIAS)
    assert analysis.mask_class is MaskClass.CAUSAL
    assert [str(term.kind) for term in analysis.terms] == ["visible", "additive"]


def test_sums_are_not_added_in_another_order() -> None:
    """Numbers that are all low round otherwise then, which shows."""

    def mask(s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (a + low()) + b

    analysis = analysis_of(mask, BIAS - 1e9, 30 * BIAS)
    assert analysis.mask_class is MaskClass.CAUSAL
    (term,) = analysis.terms
    assert term.node.name == "masks"


def test_a_sum_in_place_stays_whole() -> None:
    def mask(s: Tensor, bias: Tensor) -> Tensor:
        total = bias.clone()
        total += low()
        return total

    analysis = analysis_of(mask, BIAS)
    assert analysis.mask_class is MaskClass.CAUSAL
    (term,) = analysis.terms
    assert term.node.name == "total_1"


def test_attention_with_a_sum() -> None:
    q = normal(2, 3, L, 8)
    (site,) = check(lambda q, bias: sdpa(q, q, q, low() + bias), q, BIAS).rewritten
    assert site.mask == "causal and explicit additive (3, 6, 6)"


# --- what is read later ---------------------------------------------------------------------


def test_a_part_that_changes_before_the_mask_is_read_stays_in_it() -> None:
    def mask(s: Tensor, bias: Tensor) -> Tensor:
        own = bias > 0
        both = ones().tril() & own
        own.logical_not_()
        return both

    analysis = analysis_of(mask, BIAS)
    (term,) = analysis.terms
    assert analysis.mask_class is MaskClass.CAUSAL
    assert term.node.name == "both"


def test_the_reader_of_a_part_is_the_node_that_reads_it() -> None:
    def mask(s: Tensor, pad: Tensor) -> Tensor:
        both = ones().tril() & pad[:, None, None]
        return both.expand(2, 3, L, L)

    (term,) = analysis_of(mask, PAD).terms
    assert term.reader.name == "both"


def test_a_part_changed_after_the_mask_is_read_shows_in_its_reader() -> None:
    """The operator stands where the output is computed: the caller must look from there."""

    def attend(s: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        own = bias > 0
        both = ones().tril() & own
        scores = s.masked_fill(~both, -INF)
        own.logical_not_()
        return scores.softmax(-1), own

    gm = captured(attend, S, BIAS)
    effects = Effects(gm.graph)
    (both, softmax) = (node for node in gm.graph.nodes if node.name in ("both", "softmax"))
    (reader,) = both.users
    found = analyze([Term(both, VISIBLE, reader)], L, L, MaskContext(effects))
    assert found.mask_class is MaskClass.CAUSAL
    (term,) = found.terms
    assert effects.changed(term.node, term.reader, softmax)
    assert not effects.changed(term.node, term.reader, reader)


# --- finite fills ---------------------------------------------------------------------------

EXCLUDING: dict[str, tuple[Callable[..., Any], str]] = {
    "causal": (lambda s: low(LOWEST), "causal"),
    "-1e9": (lambda s: low(-1e9), "causal"),
    "window": (lambda s: (low(-1e9), torch.full((L, L), LOWEST).tril(-3)), "window (2, 0)"),
    "sum": (lambda s: low(-1e9) + torch.full((L, L), LOWEST).tril(-3), "window (2, 0)"),
    "beside -inf": (lambda s: (low(), torch.full((L, L), LOWEST).tril(-3)), "window (2, 0)"),
    "beside zeros": (lambda s: (low(LOWEST), torch.zeros(L, L)), "causal"),
    "half": (lambda s: low(-65504.0).half(), "causal"),
}


@pytest.mark.parametrize("name", EXCLUDING)
def test_finite_fills_become_bands_where_every_row_is_live(name: str) -> None:
    mask, text = EXCLUDING[name]
    analysis = analysis_of(mask)
    assert (analysis.text, analysis.terms, analysis.live) == (text, (), True)


def test_a_bounded_bias_does_not_hinder() -> None:
    def mask(s: Tensor) -> tuple[Tensor, ...]:
        slope = torch.arange(L) - torch.arange(L)[:, None]
        return low(-1e9), slope.float() * 0.5

    analysis = analysis_of(mask)
    assert analysis.mask_class is MaskClass.CAUSAL and analysis.live
    (term,) = analysis.terms
    assert term.kind is ADDITIVE


KEPT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], tuple[Kind, ...]]] = {
    "a row is dead": (lambda s: low(LOWEST, 0), (), ()),
    "rows are dead together": (
        lambda s: (low(LOWEST), torch.full((L, L), -1e9).tril(0)),
        (),
        (),
    ),
    "padding": (
        lambda s, pad: torch.where(ones().tril() & pad[:, None, None], 0.0, LOWEST),
        (PAD,),
        (),
    ),
    "padding apart": (
        lambda s, pad: low(LOWEST) + torch.where(pad[:, None, None], 0.0, LOWEST),
        (PAD,),
        (),
    ),
    "padding of -inf": (
        lambda s, pad: (low(LOWEST), torch.where(pad[:, None, None], 0.0, -INF)),
        (PAD,),
        (),
    ),
    "a learned bias": (lambda s, bias: low(-1e9) + bias, (BIAS,), ()),
    "a bias as large": (lambda s: (low(-1e9), torch.full((L, L), 1e9).tril(-3)), (), ()),
    "-1e4": (lambda s: low(-1e4), (), ()),
    "half's lowest in float32": (lambda s: low(-65504.0), (), ()),
    "scores replaced": (
        lambda s, pad: (ones().tril(), pad[:, None, None] & ones(1, L)),
        (PAD,),
        ((VISIBLE, -1e9), (VISIBLE, -1e9)),
    ),
    "-inf replaced later": (
        lambda s, pad: (ones().tril(), pad[:, None, None] & ones(1, L)),
        (PAD,),
        ((VISIBLE, -INF), (VISIBLE, -1e9)),
    ),
    "nan": (lambda s: (low(), torch.full((L, L), math.nan).tril(-4)), (), ()),
    "+inf": (lambda s: (low(), torch.full((L, L), INF).triu(4)), (), ()),
    "+inf under -inf": (lambda s: low() + torch.full((L, L), INF).tril(-4), (), ()),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_proved_to_exclude_is_kept(name: str) -> None:
    mask, inputs, kinds = KEPT[name]
    analysis = analysis_of(mask, *inputs, kinds=kinds or None)
    assert analysis.mask_class is MaskClass.NONE
    assert analysis.terms


def test_an_earlier_finite_fill_does_not_undo_a_later_one() -> None:
    def mask(s: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
        return pad[:, None, None] & ones(1, L), ones().tril()

    analysis = analysis_of(mask, PAD, kinds=[(VISIBLE, -1e9), (VISIBLE, -INF)])
    assert analysis.mask_class is MaskClass.CAUSAL
    assert [term.fill for term in analysis.terms] == [-1e9]


def test_a_later_fill_that_hides_nothing_undoes_nothing() -> None:
    kinds = [(VISIBLE, -INF), (VISIBLE, -1e9)]
    analysis = analysis_of(lambda s: (ones().tril(-1), ones()), kinds=kinds)
    assert not analysis.live
    assert len(analysis.terms) == 1


# --- smaller masks --------------------------------------------------------------------------


def shape_of(term: Term, analysis: Analysis) -> str:
    return analysis.text.partition("(")[2].partition(")")[0]


SMALLER: dict[str, tuple[Callable[..., Any], str]] = {
    "padding": (lambda s: (torch.arange(L) > 1).expand(L, L), "explicit bool (1, 6) key padding"),
    "padding, 4-D": (
        lambda s: (torch.arange(L) > 1).expand(2, 3, L, L),
        "explicit bool (1, 1, 1, 6) key padding",
    ),
    "padding, numbers": (
        lambda s: torch.where(torch.arange(L) > 1, 0.0, -1e4).repeat(L, 1),
        "explicit additive (1, 6) key padding",
    ),
    "padding of batch entries": (
        lambda s: (torch.arange(L) > torch.arange(2)[:, None] + 1)[:, None, None].repeat(
            1, 3, L, 1
        ),
        "explicit bool (2, 1, 1, 6) differs between heads or batch entries",
    ),
    "blocks": (
        lambda s: torch.arange(L)[:, None] // 2 == torch.arange(L) // 2,
        "explicit bool (6, 6) block-diagonal, 3 blocks",
    ),
    "uneven blocks": (
        lambda s: torch.block_diag(*[torch.ones(n, n) for n in (1, 3, 2)]).bool(),
        "explicit bool (6, 6) block-diagonal, 3 blocks",
    ),
    "blocks for all heads": (
        lambda s: (torch.arange(L)[:, None] // 2 == torch.arange(L) // 2).repeat(2, 3, 1, 1),
        "explicit bool (1, 1, 6, 6) block-diagonal, 3 blocks",
    ),
    "no blocks: one overlaps": (
        lambda s: torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool() | (ones().triu(5)),
        "explicit bool (6, 6)",
    ),
    "queries": (lambda s: (torch.arange(L) > 1)[:, None].expand(L, L), "explicit bool (6, 1)"),
}


@pytest.mark.parametrize("name", SMALLER)
def test_constants_are_no_larger_than_they_need_to_be(name: str) -> None:
    mask, text = SMALLER[name]
    assert analysis_of(mask).text == text


def test_an_expanded_mask_is_read_where_it_is_small() -> None:
    analysis = analysis_of(lambda s, pad: pad[:, None, None].expand(2, 3, L, L), PAD)
    assert analysis.text == "explicit bool (2, 1, 1, 6) key padding"


def test_an_expanded_padding_of_numbers_is_read_as_bool() -> None:
    def mask(s: Tensor, pad: Tensor) -> Tensor:
        return torch.where(pad[:, None, None].expand(2, 1, L, L), torch.zeros(()), LOWEST)

    analysis = analysis_of(mask, PAD)
    assert analysis.text == "explicit bool (2, 1, 1, 6) key padding"
    (term,) = analysis.terms
    assert (term.kind, term.fill) == (VISIBLE, LOWEST)


@pytest.mark.parametrize("fill", [-1e9, -1e4])
def test_numbers_that_scores_still_show_beside_stay_numbers(fill: float) -> None:
    analysis = analysis_of(
        lambda s, pad: torch.where(pad[:, None, None].expand(2, 1, L, L), 0.0, fill), PAD
    )
    (term,) = analysis.terms
    assert term.kind is ADDITIVE


# --- live rows ------------------------------------------------------------------------------

LIVE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], bool]] = {
    "causal": (lambda s: ones().tril(), (), True),
    "everything": (lambda s: ones(), (), True),
    "strictly causal": (lambda s: ones().tril(-1), (), False),
    "blocks": (lambda s: torch.arange(L)[:, None] // 2 == torch.arange(L) // 2, (), True),
    "blocks and causal": (
        lambda s: (torch.arange(L)[:, None] // 2 == torch.arange(L) // 2) & ones().tril(),
        (),
        True,
    ),
    "blocks and not causal": (
        lambda s: ((torch.arange(L)[:, None] // 2 == torch.arange(L) // 2), ones().triu(1)),
        (),
        False,
    ),
    "padding": (lambda s, pad: pad[:, None, None] & ones(1, L), (PAD,), False),
    "a bias": (lambda s, bias: bias * 1, (BIAS,), False),
    "a constant bias": (lambda s: torch.arange(L).float().expand(L, L) * 0.1, (), True),
    "a constant bias and -inf": (
        lambda s: torch.where(ones().tril(-1), torch.arange(L) * 0.1, -INF),
        (),
        False,
    ),
    "low numbers": (lambda s: low(LOWEST, 0), (), True),
    "low numbers and -inf": (
        lambda s: torch.where(ones().tril(-1), 0.0, torch.where(ones().triu(1), -INF, -1e9)),
        (),
        False,
    ),
    "low numbers and a large bias": (
        lambda s: (low(LOWEST, 0), torch.where(ones().tril(-1), 1.0, -3e38)),
        (),
        False,
    ),
    "low numbers in half": (lambda s: low(-65504.0, 0).half(), (), False),
    "large numbers": (
        lambda s: (torch.full((L, L), -3e38) + s.new_zeros(L), torch.full((L, L), -3e38)),
        (),
        False,
    ),
    "low numbers twice": (lambda s: (low(LOWEST, 0), low(LOWEST, 0) * 1), (), False),
}


@pytest.mark.parametrize("name", LIVE)
def test_rows_that_see_a_key(name: str) -> None:
    mask, inputs, live = LIVE[name]
    assert analysis_of(mask, *inputs).live == live


def test_more_queries_than_keys() -> None:
    masks = Masks(lambda s: ones(*s.shape).tril(s.shape[1] - s.shape[0]))
    analysis = masks(normal(L + 3, L))
    assert analysis.mask_class is MaskClass.CAUSAL_BOTTOM_RIGHT
    assert not analysis.live


@pytest.mark.parametrize(("query", "key"), [(0, 4), (4, 0), (0, 0), (1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize("form", ["bool", "-inf", "lowest", "bottom-right"])
def test_lengths_of_none_and_one(query: int, key: int, form: str) -> None:
    def mask(s: Tensor) -> Tensor:
        if form == "bool":
            return torch.ones(s.shape, dtype=torch.bool).tril()
        if form == "bottom-right":
            return torch.arange(key) <= torch.arange(query)[:, None] + (key - query)
        return torch.full(s.shape, -INF if form == "-inf" else LOWEST).triu(1)

    analysis = Masks(mask)(normal(query, key))
    assert not analysis.live or query == 0 or key > 0


def test_no_masks() -> None:
    context = MaskContext(Effects(fx.Graph()))
    assert analyze([], 4, 4, context).live
    assert not analyze([], 4, 0, context).live


# --- terms ----------------------------------------------------------------------------------


def test_terms_with_a_value_are_kept_or_dropped_whole() -> None:
    def masks(s: Tensor, pad: Tensor) -> tuple[Tensor, ...]:
        return ones().tril() & pad[:, None], ones().tril() & ones().triu(-2), s + 1

    gm = captured(masks, S, PAD)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    both, window, _ = output.args[0]
    context = MaskContext(Effects(gm.graph))
    given = [
        Term(node, VISIBLE, output, value=Apply(torch.ops.aten.unsqueeze.default, (node, 0)))
        for node in (both, window)
    ]
    found = analyze(given, L, L, context)
    assert (str(found.mask_class), found.window_left, found.window_right) == ("window", 2, 0)
    assert found.terms == (given[0],)


def test_masks_whose_last_dims_are_other_lengths_are_not_read() -> None:
    def mask(s: Tensor) -> tuple[Tensor, Tensor]:
        return ones().tril(), s + 1

    gm = captured(mask, S)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    term = Term(output.args[0][0], VISIBLE, output)
    assert analyze([term], L + 1, L + 1, MaskContext(Effects(gm.graph))).terms == (term,)


def test_large_masks_are_proved_without_computing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(terms, "_CHEAP", L * L - 1)
    monkeypatch.setattr(terms, "read", fail)
    assert analysis_of(lambda s: ones().tril() & ones().triu(-2)).text == "window (2, 0)"
    with pytest.raises(Exception, match="computed"):
        analysis_of(lambda s: torch.eye(L) > 0)


def test_repeated_masks_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    read = terms.read
    monkeypatch.setattr(terms, "read", lambda *args: (seen.append(args), read(*args))[1])

    def attend(q: Tensor) -> Tensor:
        for _ in range(5):
            q = sdpa(q, q, q, torch.arange(L)[:, None] >= torch.arange(L))
        return q

    report = check(attend, normal(2, 3, L, 8))
    assert [site.mask for site in report.rewritten] == ["causal"] * 5
    assert len(seen) == 1
