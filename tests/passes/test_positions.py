"""What is proved of masks for all lengths: one graph, run with many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sage_compiler.passes.effects import Effects
from sage_compiler.passes.forms import Affine, Choice
from sage_compiler.passes.masks import Analysis, MaskContext, Term, TermKind, analyze
from sage_compiler.passes.positions import Positions
from sage_compiler.semantics import MaskClass
from tests.passes.checks import captured, check, normal, sdpa
from tests.passes.masked_softmax import Masks

INF = math.inf
SIZES = ((5, 7), (6, 6), (9, 4), (2, 3), (17, 40))
Mask = Callable[[Tensor], Any]


def proved(mask: Mask, sizes: Sequence[tuple[int, int]] = SIZES, **options: Any) -> Analysis:
    """The analysis of one graph for all sizes, compared with the masks for each of them."""
    masks = Masks(mask, dynamic=True, **options)
    for query, key in sizes:
        analysis = masks(normal(query, key))
    assert masks.graphs == 1 and masks.readable
    return analysis


def lowest() -> float:
    return torch.finfo(torch.float32).min


def rows(s: Tensor) -> Tensor:
    return torch.arange(s.shape[0])[:, None]


def columns(s: Tensor) -> Tensor:
    return torch.arange(s.shape[1])


def ones(s: Tensor) -> Tensor:
    return torch.ones(s.shape, dtype=torch.bool)


def past(s: Tensor) -> int:
    return s.shape[1] - s.shape[0]


def assigned(s: Tensor) -> Tensor:
    mask = ones(s)
    mask[columns(s) > rows(s)] = False
    return mask


def in_place(s: Tensor) -> Tensor:
    mask = torch.full(s.shape, -INF)
    mask.triu_(1)
    return mask


def moved_in_place(s: Tensor) -> Tensor:
    position = torch.arange(s.shape[0])
    position += past(s)
    return columns(s) <= position[:, None]


def transformers(s: Tensor) -> Tensor:
    """As transformers writes it, packed sequences looked for on the way."""
    position = torch.arange(s.shape[0] + s.shape[1]).unsqueeze(0).expand(3, -1)
    jumps = torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1
    packed = jumps.cumsum(-1)
    batch = torch.arange(3)[:, None, None, None]
    query = torch.arange(s.shape[0])[None, None, :, None]
    key = torch.arange(s.shape[1])[None, None, None, :]
    mask = query.new_ones((), dtype=torch.bool)
    mask = mask & (packed[batch, query] == packed[batch, key]).to(s.device)
    mask = mask & (position[batch, key] <= position[batch, query])
    return mask.expand(3, -1, *s.shape)


CAUSAL: dict[str, Mask] = {
    "le": lambda s: columns(s) <= rows(s),
    "methods": lambda s: rows(s).ge(columns(s).view(1, 1, -1)),
    "lt, one more": lambda s: columns(s) < rows(s) + 1,
    "difference": lambda s: (columns(s) - rows(s)) <= 0,
    "negated": lambda s: ~(columns(s) > rows(s)),
    "not equal, not more": lambda s: torch.logical_not(rows(s) - columns(s) < 0),
    "tril": lambda s: ones(s).tril(),
    "triu of numbers": lambda s: torch.ones(s.shape).triu(1) == 0,
    "tril of integers": lambda s: torch.ones(s.shape, dtype=torch.int64).tril().bool(),
    "masked_fill": lambda s: torch.zeros(s.shape).masked_fill(columns(s) > rows(s), -INF),
    "where": lambda s: torch.where(columns(s) <= rows(s), 0.0, -INF),
    "where tensors": lambda s: torch.where(ones(s).triu(1), torch.full((), -INF), torch.zeros(())),
    "full and triu": lambda s: torch.full(s.shape, -INF).triu(1),
    "triu_": in_place,
    "assigned": assigned,
    "finite fill": lambda s: torch.full(s.shape, lowest()).triu(1),
    "one minus": lambda s: (1.0 - ones(s).tril().to(torch.float32)) * lowest(),
    "times": lambda s: ones(s).tril(2) * ones(s).tril(),
    "with all": lambda s: ones(s).tril() & (columns(s) < s.shape[1]) & (rows(s) >= 0),
    "or less": lambda s: ones(s).tril() | (columns(s) < 0),
    "views": lambda s: ones(s).tril()[None, None].expand(2, 3, *s.shape).contiguous()[:, :1],
    "sliced": lambda s: torch.ones(64, 64).tril()[: s.shape[0], : s.shape[1]] == 1,
    "sliced within": lambda s: (
        torch.ones(64, 64).tril()[3 : 3 + s.shape[0], 3:][:, : s.shape[1]] > 0
    ),
    "transposed": lambda s: torch.ones(s.shape[1], s.shape[0], dtype=torch.bool).triu().mT,
    "cumsum": lambda s: torch.ones(s.shape[1], dtype=torch.int64).cumsum(0) - 1 <= rows(s),
    "transformers": transformers,
    "scaled": lambda s: 3 * columns(s) - columns(s) * 2 <= rows(s),
    "int32": lambda s: columns(s).int() <= rows(s).int(),
    "repeat": lambda s: columns(s)[None].repeat(s.shape[0], 1) <= rows(s),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str) -> None:
    analysis = proved(CAUSAL[name])
    assert (analysis.mask_class, analysis.text, analysis.terms) == (MaskClass.CAUSAL, "causal", ())
    assert analysis.live
    assert analysis.proof.startswith("comparison of positions: equals ")


BANDS: dict[str, tuple[Mask, str]] = {
    "bottom-right": (lambda s: columns(s) <= rows(s) + past(s), "causal bottom-right"),
    "bottom-right, tril": (lambda s: ones(s).tril(past(s)), "causal bottom-right"),
    "bottom-right, in place": (moved_in_place, "causal bottom-right"),
    "bottom-right, triu": (
        lambda s: torch.full(s.shape, -INF).triu(past(s) + 1),
        "causal bottom-right",
    ),
    "window": (lambda s: ones(s).tril() & (columns(s) > rows(s) - 4), "window (3, 0)"),
    "two sides": (lambda s: (rows(s) - columns(s)).abs() <= 3, "window (3, 3)"),
    "two sides, negated": (lambda s: ~((columns(s) - rows(s)).abs() > 3), "window (3, 3)"),
    "one more": (lambda s: ones(s).tril(1), "window (unbounded, 1)"),
    "future": (lambda s: columns(s) >= rows(s), "window (0, unbounded)"),
    "itself": (lambda s: columns(s) == rows(s), "window (0, 0)"),
    "window, bottom-right": (
        lambda s: ones(s).tril(past(s)) & ones(s).triu(past(s) - 2),
        "window bottom-right (2, 0)",
    ),
    "sum": (
        lambda s: (
            torch.full(s.shape, -INF).triu(1) + torch.where(columns(s) < rows(s) - 2, -INF, 0.0)
        ),
        "window (2, 0)",
    ),
    "everything": (lambda s: ones(s), "none"),
    "one entry": (lambda s: torch.ones((), dtype=torch.bool) & s.new_ones(1).bool(), "none"),
    "zeros": (lambda s: torch.zeros(2, 3, *s.shape), "none"),
    "all keys": (lambda s: (columns(s) < s.shape[1]) & (columns(s) >= 0), "none"),
}


@pytest.mark.parametrize("name", BANDS)
def test_bands(name: str) -> None:
    mask, text = BANDS[name]
    analysis = proved(mask)
    assert (analysis.text, analysis.terms) == (text, ())


def test_equal_lengths_make_a_corner_of_many() -> None:
    def mask(s: Tensor) -> Tensor:
        return columns(s) <= rows(s) + past(s)

    square = proved(mask, [(6, 6), (9, 9)])
    assert square.mask_class in (MaskClass.CAUSAL, MaskClass.CAUSAL_BOTTOM_RIGHT)


def test_one_query_sees_everything() -> None:
    """A step of decoding: the query stands at the end."""
    masks = Masks(lambda s: columns(s)[None] <= torch.arange(1)[:, None] + s.shape[1] - 1)
    first = normal(1, 7)
    torch._dynamo.mark_dynamic(first, 1)
    assert masks(first).text == "none"
    masks(normal(1, 30))
    assert masks.graphs == 1


@pytest.mark.parametrize("query", [1, 4])
def test_lengths_that_do_not_vary(query: int) -> None:
    def mask(s: Tensor) -> Tensor:
        return columns(s) <= rows(s) + past(s)

    masks = Masks(mask)
    first = normal(query, 7)
    torch._dynamo.mark_dynamic(first, 1)
    assert masks(first).text == ("none" if query == 1 else "causal bottom-right")
    masks(normal(query, 30))


# --- what must stay explicit ----------------------------------------------------------------

NO_BAND: dict[str, Mask] = {
    "the diagonal is hidden": lambda s: columns(s) < rows(s),
    "the diagonal is hidden, additive": lambda s: torch.full(s.shape, -INF).triu(0),
    "between the corners": lambda s: columns(s) <= rows(s) + past(s) // 2,
    "beyond a corner": lambda s: columns(s) <= rows(s) + 2 * past(s),
    "a side that varies": lambda s: columns(s) >= rows(s) - s.shape[1] // 2,
    "one of two": lambda s: (columns(s) <= rows(s)) | (columns(s) > rows(s) + 2),
    "not the diagonal": lambda s: columns(s) != rows(s),
    "the other triangle": lambda s: columns(s) + rows(s) < s.shape[0],
    "every second key": lambda s: 2 * columns(s) <= rows(s),
    "steps": lambda s: columns(s) <= 2 * rows(s),
    "keys": lambda s: (columns(s) < 2)[None],
    "queries": lambda s: rows(s) < 2,
    "blocks": lambda s: columns(s) // 3 == rows(s) // 3,
    "dilated": lambda s: (columns(s) - rows(s)) % 2 == 0,
    "floats": lambda s: columns(s).float() <= rows(s),
    "flipped": lambda s: (columns(s) <= rows(s)).flip(1),
    "negative positions": lambda s: columns(s)[rows(s) - 1] <= rows(s),
    "triangle of a triangle": lambda s: ones(s).tril() & ones(s).mT.triu().mT & ones(s).tril(-1),
    "random": lambda s: torch.rand(s.shape) > 2,
    "heads differ": lambda s: columns(s) <= rows(s) + torch.arange(3)[:, None, None],
    "finite, a row dead": lambda s: torch.full(s.shape, lowest()).triu(0),
    "finite, rows dead beyond the keys": lambda s: torch.where(columns(s) >= rows(s), 0.0, -1e9),
    "-1e4": lambda s: torch.full(s.shape, -1e4).triu(1),
    "nan": lambda s: torch.full(s.shape, math.nan).triu(1),
    "+inf": lambda s: torch.full(s.shape, INF).triu(1),
}


@pytest.mark.parametrize("name", NO_BAND)
def test_what_is_no_band_stays_explicit(name: str) -> None:
    sizes = [(5, 5), (8, 8)] if name == "triangle of a triangle" else SIZES
    analysis = proved(
        NO_BAND[name], [s for s in sizes if name != "negative positions" or s[1] > s[0]]
    )
    assert analysis.mask_class in (MaskClass.NONE, MaskClass.CAUSAL)
    assert analysis.terms
    assert "explicit " in analysis.text


def test_positions_that_the_caller_passes_are_no_proof() -> None:
    masks = Masks(lambda s, position: position[:, None] >= torch.arange(s.shape[1]), dynamic=True)
    for query, key in SIZES:
        analysis = masks(normal(query, key), torch.arange(query).flip(0))
    assert analysis.terms
    assert analysis.proof == "it depends on the input L_inputs_0_"


def test_a_number_that_the_caller_passes_is_no_proof() -> None:
    masks = Masks(lambda s, past: columns(s) <= rows(s) + past, dynamic=True)
    for past_length in (2, 3, 11):
        assert masks(normal(5, 7), past_length).terms
    assert masks.graphs == 1


WRITES: dict[str, Mask] = {}


def write(change: Mask) -> Mask:
    WRITES[change.__name__] = change
    return change


@write
def positions_changed(s: Tensor) -> Tensor:
    position = torch.arange(s.shape[1])
    position[0] = 5
    return position <= rows(s)


@write
def positions_flipped_in_place(s: Tensor) -> Tensor:
    position = torch.arange(s.shape[1])
    position.copy_(position.flip(0))
    return position <= rows(s)


@write
def mask_changed_after(s: Tensor) -> Tensor:
    mask = columns(s) <= rows(s)
    mask[:, 0] = False
    return mask


@write
def mask_changed_through_a_view(s: Tensor) -> Tensor:
    mask = columns(s) <= rows(s)
    mask.view(-1)[:2].logical_not_()
    return mask


@write
def view_changed(s: Tensor) -> Tensor:
    mask = ones(s)
    mask[None].tril_()
    return mask


@write
def reshaped_in_place(s: Tensor) -> Tensor:
    mask = columns(s) <= rows(s)
    mask.t_()
    return mask.clone().mT


@write
def other_condition(s: Tensor) -> Tensor:
    mask = ones(s)
    mask[rows(s).expand(s.shape) > 2] = False
    return mask


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen(name: str) -> None:
    analysis = proved(WRITES[name])
    assert analysis.terms


def test_a_write_after_the_comparison_does_not_matter() -> None:
    def mask(s: Tensor) -> Tensor:
        position = torch.arange(s.shape[1])
        result = position <= rows(s)
        position.zero_()
        return result

    assert proved(mask).text == "causal"


def test_a_gradient_is_not_lost() -> None:
    def attend(q: Tensor) -> Tensor:
        mask = torch.zeros(q.shape[2], q.shape[2], requires_grad=True)
        return torch.autograd.grad(sdpa(q, q, q, mask).square().sum(), mask)[0]

    report = check(attend, normal(2, 4, 6, 8), dynamic=True)
    assert all(site.mask.startswith("explicit ") for site in report.rewritten)


# --- cost -----------------------------------------------------------------------------------


def test_long_chains_do_not_recurse() -> None:
    graph = fx.Graph()
    mask = graph.placeholder("mask")
    mask.meta["example_value"] = torch.ones(4, 4, dtype=torch.bool)
    for _ in range(3000):
        mask = graph.call_method("logical_not", (mask,))
        mask.meta["example_value"] = torch.ones(4, 4, dtype=torch.bool)
    output = graph.output((mask,))
    context = MaskContext(Effects(graph))
    (found,) = analyze([Term(mask, TermKind.VISIBLE, output)], 4, 4, context).terms
    assert found.node is mask


def test_every_node_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(s: Tensor) -> tuple[Tensor, ...]:
        mask = columns(s) <= rows(s)
        return tuple(mask & (columns(s) > rows(s) - width) for width in range(2, 9))

    gm = captured(attend, normal(9, 9), dynamic=True)
    seen: list[fx.Node] = []
    read = Positions._read

    def counted(self: Positions, maker: fx.Node, node: fx.Node) -> Any:
        seen.append(node)
        return read(self, maker, node)

    monkeypatch.setattr(Positions, "_read", counted)
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    context = MaskContext(Effects(gm.graph))
    for node in output.all_input_nodes:
        sizes = node.meta["example_value"].shape
        analysis = analyze([Term(node, TermKind.VISIBLE, output)], *sizes, context)
        assert analysis.mask_class is MaskClass.WINDOW
    assert len(seen) == len(set(seen))


def test_layers_share_an_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor) -> Tensor:
        length = q.shape[2]
        mask = torch.arange(length) <= torch.arange(length)[:, None]
        for _ in range(20):
            q = sdpa(q, q, q, mask)
        return q

    seen = []
    form = Positions.form
    monkeypatch.setattr(Positions, "form", lambda *args: (seen.append(args), form(*args))[1])
    report = check(attend, normal(2, 4, 6, 8), dynamic=True)
    assert [site.mask for site in report.rewritten] == ["causal"] * 20
    assert len(seen) == 1


# --- forms ----------------------------------------------------------------------------------


def form_of(mask: Callable[[], Tensor]) -> Any:
    gm = captured(lambda x: (mask(), x + 1), normal(3))
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    return Positions(Effects(gm.graph)).form(output.args[0][0], output)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_small_integers_may_wrap(dtype: torch.dtype) -> None:
    assert form_of(lambda: torch.arange(100, dtype=dtype) + 100) is None


def test_large_numbers_may_wrap() -> None:
    assert form_of(lambda: torch.arange(9) + (1 << 40)) is None
    assert form_of(lambda: torch.arange(9, dtype=torch.int32) * 1000 * 1000) is None
    assert form_of(lambda: torch.arange(9) < (1 << 40)) is None


def test_affine_arithmetic() -> None:
    found = form_of(lambda: 3 - 2 * (torch.arange(2, 9)[:, None] - torch.arange(4)))
    assert isinstance(found, Affine)
    assert (found.slopes, found.offset) == ((-2, 2), -1)


def test_numbers_are_those_of_the_dtype() -> None:
    found = form_of(lambda: torch.full((4, 4), lowest()).triu(1) + torch.full((4, 4), lowest()))
    assert isinstance(found, Choice)
    assert {found.inside, found.outside} == {-INF, lowest()}
