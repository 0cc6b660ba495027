"""What masks are proved to be, and above all what they are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from sage_compiler.kernels.masking import visible_band
from sage_compiler.passes import bands, folding, terms
from sage_compiler.passes.bands import Window, express
from sage_compiler.passes.constants import Constant, read
from sage_compiler.semantics import MaskClass, Semantics
from tests.capture import rewritten
from tests.passes.checks import Compiled, check, normal, same, sdpa

L = 6
INF = math.inf
LOWEST = torch.finfo(torch.float32).min
Q, LONG = normal(2, 4, L, 8), normal(2, 4, L + 3, 8)


def ones(*size: int) -> Tensor:
    return torch.ones(size or (L, L), dtype=torch.bool)


def rows() -> Tensor:
    return torch.arange(L).unsqueeze(1)


def mask_of(function: Callable[[], Tensor], key: Tensor = Q, **options: Any) -> tuple[str, str]:
    """The mask's text and proof, after the result was found to equal eager."""
    (site,) = check(lambda q, k: sdpa(q, k, k, function()), Q, key, **options).rewritten
    return site.mask, site.proof


# --- what is proved -------------------------------------------------------------------------

CAUSAL: dict[str, Callable[[], Tensor]] = {
    "tril": lambda: torch.tril(ones()),
    "triu": lambda: torch.triu(torch.ones(L, L), 1) == 0,
    "comparison": lambda: torch.arange(L)[:, None] >= torch.arange(L)[None, :],
    "ge": lambda: rows().ge(torch.arange(L)),
    "difference": lambda: (torch.arange(L)[None] - rows()) <= 0,
    "cumsum": lambda: torch.ones(L, L).cumsum(-1) <= rows() + 1,
    "meshgrid": lambda: torch.ge(*torch.meshgrid(*[torch.arange(L)] * 2, indexing="ij")),
    "logic": lambda: ~ones().triu(1) & ones() | ones().tril(-2),
    "logical": lambda: torch.logical_and(ones().tril(), torch.logical_not(ones().triu(1))),
    "integers": lambda: torch.ones(L, L, dtype=torch.int64).tril().to(torch.bool),
    "reinterpreted": lambda: torch.ones(L, L, dtype=torch.uint8).tril().view(torch.bool),
    "methods of operators": lambda: torch.arange(L).__le__(rows()).__and__(ones()),
    "expand": lambda: ones().tril()[None, None].expand(2, 1, L, L),
    "repeat": lambda: ones().tril().view(1, 1, L, L).repeat(2, 4, 1, 1),
    "stack": lambda: torch.stack([ones().tril()] * 4),
    "new_ones": lambda: torch.ones(()).new_ones(L, L).tril().to(torch.bool),
    "aten": lambda: torch.ops.aten.tril(torch.ops.aten.ones([L, L], dtype=torch.bool)),
    "masked_fill": lambda: torch.zeros(L, L).masked_fill(ones().triu(1), -INF),
    "full and triu": lambda: torch.full((L, L), -INF).triu(1),
    "where": lambda: torch.where(ones().tril(), 0.0, -INF),
    "where tensors": lambda: torch.where(ones().tril(), torch.zeros(()), torch.full((), -INF)),
    "lowest": lambda: torch.full((L, L), LOWEST).triu(1),
    "lowest and -inf": lambda: torch.where(
        ones().tril(), 0.0, torch.where(torch.arange(L) > 4, -INF, LOWEST)
    ),
    "negative zero": lambda: torch.full((L, L), -INF).triu(1) + torch.zeros(L, L).neg(),
    "copy of what changes later": lambda: changed_after_copy(ones().tril()),
}


def changed_after_copy(mask: Tensor) -> Tensor:
    copy = torch.tril(mask)
    other = torch.zeros(L, L)
    other[0] = 1.0
    return copy


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str) -> None:
    text, proof = mask_of(CAUSAL[name])
    assert text == "causal"
    assert proof.startswith("folded from ") and proof.endswith("tril(ones(6, 6), diagonal=0)")


BANDS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "everything": (ones, "none"),
    "zeros": (lambda: torch.zeros(L, L), "none"),
    "one row": (lambda: ones(1, L), "none"),
    "one entry": (lambda: ones(1, 1), "none"),
    "sliding": (lambda: ones().tril().triu(-2), "window (2, 0)"),
    "two sides": (lambda: ones().tril(1).triu(-3), "window (3, 1)"),
    "absolute distance": (lambda: (rows() - torch.arange(L)).abs() <= 2, "window (2, 2)"),
    "one too many": (lambda: ones().tril(1), "window (unbounded, 1)"),
    "future": (lambda: ones().triu(), "window (0, unbounded)"),
    "itself": (lambda: torch.eye(L, dtype=torch.bool), "window (0, 0)"),
    "sliding -inf": (
        lambda: torch.zeros(L, L).masked_fill(~ones().tril().triu(-2), -INF),
        "window (2, 0)",
    ),
}


@pytest.mark.parametrize("name", BANDS)
def test_bands(name: str) -> None:
    function, expected = BANDS[name]
    assert mask_of(function)[0] == expected


WIDE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "top-left": (lambda: ones(L, L + 3).tril(), "causal"),
    "bottom-right": (lambda: ones(L, L + 3).tril(3), "causal bottom-right"),
    "between": (lambda: ones(L, L + 3).tril(1), "window (unbounded, 1)"),
    "window, top-left": (lambda: ones(L, L + 3).tril().triu(-2), "window (2, 0)"),
    "window, bottom-right": (lambda: ones(L, L + 3).tril(3).triu(1), "window bottom-right (2, 0)"),
}


@pytest.mark.parametrize("name", WIDE)
def test_bands_with_more_keys_than_queries(name: str) -> None:
    function, expected = WIDE[name]
    assert mask_of(function, LONG)[0] == expected


def test_causal_with_more_queries_than_keys() -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return sdpa(q, k, k, ones(L + 3, L).tril(-3))  # three rows see nothing

    (site,) = check(attend, LONG, Q).rewritten
    assert site.mask == "causal bottom-right"


def test_causal_bias_class() -> None:
    bias = causal_lower_right(L, L + 3)
    (site,) = check(lambda q, k: sdpa(q, k, k, attn_mask=bias), Q, LONG).rewritten
    assert site.mask == "causal bottom-right"


def test_one_analysis_serves_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(*args: Any) -> Constant | None:
        seen.append(args)
        return read(*args)

    monkeypatch.setattr(terms, "read", counted)

    def attend(q: Tensor) -> Tensor:
        mask = ones().tril()
        return sdpa(sdpa(q, q, q, mask), q, q, mask)

    assert [site.mask for site in check(attend, Q).rewritten] == ["causal", "causal"]
    assert len(seen) == 1


def test_a_mask_that_others_use_is_still_folded() -> None:
    def attend(q: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        position = torch.arange(L)
        mask = position[:, None] >= position
        table = F.embedding(position, q[0, 0])
        both = mask & padding
        return sdpa(q, q, q, mask), sdpa(q, q, q, both), table, mask, (~mask).sum()

    first, second = check(attend, Q, ones(1, L)).rewritten
    assert first.mask == "causal"
    assert second.mask == "causal and explicit bool (1, 6) key padding"


# --- what must stay explicit ----------------------------------------------------------------

NO_BAND: dict[str, Callable[[], Tensor]] = {
    "nothing": lambda: torch.zeros(L, L, dtype=torch.bool),
    "all -inf": lambda: torch.full((L, L), -INF),
    "strictly causal": lambda: ones().tril(-1),
    "strictly causal -inf": lambda: torch.full((L, L), -INF).triu(0),
    "lowest, a row dead": lambda: torch.full((L, L), LOWEST).triu(0),
    "lowest, all dead": lambda: torch.full((L, L), LOWEST),
    "half's lowest": lambda: torch.full((L, L), torch.finfo(torch.float16).min).triu(1),
    "-1e4": lambda: torch.full((L, L), -1e4).triu(1),
    "a bias": lambda: torch.ones(L, L).tril(),
    "nan": lambda: torch.zeros(L, L).masked_fill(ones().triu(1), math.nan),
    "+inf": lambda: torch.zeros(L, L).masked_fill(ones().triu(1), INF),
    "blocks": lambda: rows() // 3 == torch.arange(L) // 3,
    "dilated": lambda: (rows() - torch.arange(L)) % 2 == 0,
    "rolled": lambda: ones().tril().roll(1, 0),
    "flipped": lambda: ones().tril().flip(1),
    "one hole": lambda: ones().tril() & (rows() + torch.arange(L) != 4),
    "one extra": lambda: ones().tril() | ((rows() == 0) & (torch.arange(L) == 5)),
    "keys": lambda: torch.arange(L)[None] < 4,
    "queries": lambda: (torch.arange(L) < 4)[:, None].expand(L, L),
    "heads differ": lambda: torch.stack([ones().tril(i) for i in range(4)]),
    "one head differs": lambda: torch.stack([ones().tril()] * 3 + [ones()]),
    "batches differ": lambda: torch.cat([torch.ones(1, 1, L, L).tril(i) for i in range(2)]).bool(),
}


@pytest.mark.parametrize("name", NO_BAND)
def test_constants_that_are_no_band(name: str) -> None:
    text, proof = mask_of(NO_BAND[name])
    assert text.startswith("explicit ")
    assert proof.startswith(("constant, but no band of diagonals", "constant: equals the band "))


UNKNOWN: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(L, L) > 0.5,
    "rand that is causal": lambda: (torch.rand(L, L) > 2) | ones().tril(),
    "rand_like": lambda: torch.rand_like(torch.ones(L, L)) > 0.5,
    "bernoulli": lambda: torch.bernoulli(torch.full((L, L), 0.5)).bool(),
    "randperm": lambda: torch.randperm(L)[None] <= rows(),
    "dropout": lambda: F.dropout(torch.ones(L, L)) > 0,
    "empty": lambda: torch.empty(L, L).zero_(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_random_masks_are_not_folded(name: str) -> None:
    text, proof = mask_of(UNKNOWN[name])
    assert text.startswith("explicit ")
    assert proof == "it is computed by operations that are not folded"


@torch.library.custom_op("passes_test::tril", mutates_args=())
def foreign_tril(x: Tensor) -> Tensor:
    return x.triu()


foreign_tril.register_fake(torch.empty_like)


def test_a_foreign_operation_is_not_folded() -> None:
    assert mask_of(lambda: foreign_tril(ones()))[0].startswith("explicit ")


class Masked(nn.Module):
    def __init__(self, mask: Tensor, *, parameter: bool = False, buffer: bool = False) -> None:
        super().__init__()
        if parameter:
            self.mask = nn.Parameter(mask)
        elif buffer:
            self.register_buffer("mask", mask)
        else:
            self.mask = mask

    def forward(self, q: Tensor) -> Tensor:
        return sdpa(q, q, q, attn_mask=self.mask)


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_masks_of_a_module_are_not_folded(kind: str) -> None:
    model = Masked(
        torch.zeros(L, L).masked_fill(ones().triu(1), -INF),
        parameter=kind == "parameter",
        buffer=kind == "buffer",
    )
    compiled = Compiled(model)
    same(compiled(Q), model(Q))
    with torch.no_grad():
        model.mask[0] = 0.0  # what is not part of the graph may change between calls
    same(compiled(Q), model(Q))
    (site,) = compiled.report.rewritten
    assert site.mask == "explicit additive (6, 6)"


@pytest.mark.parametrize(
    "mask",
    [ones().tril(), torch.full((L, L), -INF).triu(1), normal(2, 1, L, L), ones(2, 1, 1, L)],
    ids=["bool", "-inf", "bias", "padding"],
)
def test_inputs_are_not_folded(mask: Tensor) -> None:
    (site,) = check(lambda q, m: sdpa(q, q, q, m), Q, mask).rewritten
    assert site.mask.startswith("explicit ")
    assert site.proof == "it depends on the input L_m_"


def test_a_closure_is_an_input() -> None:
    mask = ones().tril()
    text, proof = mask_of(lambda: mask)
    assert text == "explicit bool (6, 6)"
    assert proof.startswith("it depends on the input ")


def test_lengths_that_vary_are_named_as_the_reason() -> None:
    def model(q: Tensor) -> Tensor:
        position = torch.arange(q.shape[2])
        return sdpa(q, q, q, position[:, None] * position >= position)

    _, report = rewritten(model, Q, dynamic=True, precision="exact")
    (site,) = report.rewritten
    assert site.proof == "it depends on sizes that vary"


def test_numpy_masks_are_not_folded() -> None:
    text, _ = mask_of(lambda: torch.from_numpy(np.tril(np.ones((L, L), dtype=bool))))
    assert text.startswith("explicit ")


def test_a_mask_from_shapes_of_an_input_is_folded_but_from_its_values_not() -> None:
    assert mask_of(lambda: ones(L, Q.shape[2]).tril())[0] == "causal"
    (site,) = check(
        lambda q: sdpa(q, q, q, torch.ones_like(q[0, 0, :, :L]).tril().bool()), Q
    ).rewritten
    assert site.mask == "causal"
    (site,) = check(lambda q: sdpa(q, q, q, (q == q)[0, 0, :, :L].tril()), Q).rewritten
    assert site.mask.startswith("causal and explicit ")


# --- constants that change ------------------------------------------------------------------


def _iand(m: Tensor) -> None:
    m &= torch.eye(L, dtype=torch.bool)


def _numpy_add(m: Tensor) -> None:
    array = m.numpy()
    array[2] += np.float32(1)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": lambda m: m.__setitem__(2, True),
    "setitem as a function": lambda m: torch.Tensor.__setitem__(m, 2, True),
    "and": _iand,
    "fill of a row": lambda m: m[2].fill_(True),
    "fill of a slice": lambda m: m[:, 1:3].fill_(True),
    "masked_fill": lambda m: m.masked_fill_(torch.eye(L, dtype=torch.bool), False),
    "index_fill": lambda m: m.index_fill_(0, torch.tensor([2]), True),
    "put": lambda m: m.put_(torch.tensor([1, 2]), torch.tensor([True, True])),
    "copy": lambda m: m.copy_(torch.ones(L, L)),
    "set": lambda m: m.set_(~m),
    "out": lambda m: torch.logical_not(m, out=m),
    "aten": lambda m: torch.ops.aten.fill_.Scalar(m, True),
    "aten packet": lambda m: torch.ops.aten.copy_(m, ~m),
    "foreach": lambda m: torch._foreach_copy_([m], [~m]),
    "init": lambda m: nn.init.ones_(m),
    "diagonal": lambda m: m.diagonal(1).fill_(True),
    "linalg.diagonal": lambda m: torch.linalg.diagonal(m, offset=1).fill_(True),
    "as_strided": lambda m: torch.as_strided(m, (L,), (1,)).fill_(True),
    "view dtype": lambda m: m.view(torch.uint8)[2].fill_(1),
    "bool": lambda m: m.bool()[2].fill_(True),
    "ravel": lambda m: m.ravel()[3].fill_(True),
    "atleast_2d": lambda m: torch.atleast_2d(m)[3].fill_(True),
    "broadcast_tensors": lambda m: torch.broadcast_tensors(m, m)[0][3].fill_(True),
    "broadcast_to": lambda m: torch.broadcast_to(m, (L, L))[3].fill_(True),
    "tensor_split": lambda m: torch.tensor_split(m, 2)[0].fill_(True),
    "unsafe_split": lambda m: torch.unsafe_split(m, 2)[0].fill_(True),
    "hsplit": lambda m: torch.hsplit(m, 2)[1].fill_(True),
    "unbind": lambda m: [row.logical_not_() for row in m],
    "einsum": lambda m: torch.einsum("ij->ji", m)[2].fill_(True),
    "moveaxis": lambda m: torch.moveaxis(m, 0, 1)[2].fill_(True),
    "adjoint": lambda m: torch.adjoint(m)[2].fill_(True),
    "conj": lambda m: torch.conj(m)[2].fill_(True),
    "resolve_conj": lambda m: m.resolve_conj()[2].fill_(True),
    "positive": lambda m: torch.positive(m.view(torch.uint8))[2].fill_(1),
    "as_tensor": lambda m: torch.as_tensor(m)[2].fill_(True),
    "data": lambda m: m.data[2].fill_(True),
    "detach": lambda m: m.detach()[2].fill_(True),
    "identity": lambda m: nn.Identity()(m)[2].fill_(True),
    "numpy": lambda m: m.numpy()[2].fill(True),
    "views of views": lambda m: m.view(-1)[3:].unflatten(0, (3, 11))[1].t().logical_not_(),
}


# What a change that is understood leaves, where it is a band.
CHANGED = {
    "and": "window (0, 0)",
    "copy": "none",
    "aten": "none",
    "init": "none",
    "diagonal": "window (unbounded, 1)",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_constant_that_is_changed_is_what_it_became_or_stays_explicit(name: str) -> None:
    def mask() -> Tensor:
        made = ones().tril()
        CHANGES[name](made)
        return made

    text, _ = mask_of(mask)
    assert text == CHANGED[name] if name in CHANGED else text.startswith("explicit ")


FLOAT_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "relu": lambda m: F.relu(m, inplace=True),
    "relu, positional": lambda m: F.hardtanh(m, -1.0, 1.0, True),
    "module": lambda m: nn.ReLU(inplace=True)(m),
    "dropout returns its input": lambda m: F.dropout(m, 0.5, training=False)[2].fill_(0),
    "nan_to_num": lambda m: m.nan_to_num_(neginf=0),
    "real": lambda m: m.real[2].fill_(0),
    "numpy": lambda m: m.numpy().fill(0),
    "numpy, in place": _numpy_add,
    "running statistics": lambda m: F.batch_norm(normal(3, L), m[0], m[1], training=True),
    "max_norm": lambda m: F.embedding(torch.tensor([0]), m, max_norm=0.5),
}


@pytest.mark.parametrize("name", FLOAT_CHANGES)
def test_an_additive_constant_that_is_changed_is_what_it_became_or_stays_explicit(
    name: str,
) -> None:
    def mask() -> Tensor:
        made = torch.zeros(L, L).masked_fill(ones().triu(1), -INF)
        FLOAT_CHANGES[name](made)
        return made

    text, _ = mask_of(mask)
    assert text == "none" if name == "nan_to_num" else text.startswith("explicit ")


def test_a_constant_changed_between_its_uses_is_read_twice() -> None:
    def attend(q: Tensor) -> Tensor:
        mask = ones().tril()
        first = sdpa(q, q, q, mask)
        mask[0] = True
        return first + sdpa(q, q, q, mask)

    first, second = check(attend, Q).rewritten
    assert (first.mask, second.mask) == ("causal", "explicit bool (6, 6)")


def test_a_constant_changed_in_a_body_stays_explicit() -> None:
    def attend(q: Tensor) -> Tensor:
        mask = ones().tril()
        out = torch.utils.checkpoint.checkpoint(
            lambda x: sdpa(x, x, x, mask), q, use_reentrant=False
        )
        return out + sdpa(q, q, q, mask)

    report = check(attend, Q)
    assert [site.mask for site in report.rewritten] == ["explicit bool (6, 6)"]
    assert len(report.kept) == 1


# --- limits ---------------------------------------------------------------------------------


def test_a_large_constant_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask() -> Tensor:
        return torch.eye(L).cumsum(0) > 0

    monkeypatch.setattr(folding, "FOLD_LIMIT", L * L)
    assert mask_of(mask)[0] == "causal"
    monkeypatch.setattr(folding, "FOLD_LIMIT", L * L - 1)
    assert mask_of(mask)[0] == "explicit bool (6, 6)"
    assert mask_of(lambda: ones().tril())[0] == "causal"  # proved without its values


def test_a_mask_with_a_gradient_stays_explicit() -> None:
    def attend(q: Tensor) -> Tensor:
        mask = torch.zeros(L, L, requires_grad=True)
        return torch.autograd.grad(sdpa(q, q, q, mask).square().sum(), mask)[0]

    report = check(attend, Q)
    assert all(site.mask.startswith("explicit ") for site in report.rewritten)


def test_symbolic_lengths_are_proved_and_right() -> None:
    def attend(q: Tensor) -> Tensor:
        length = q.shape[2]
        return sdpa(q, q, q, torch.ones(length, length, dtype=torch.bool).tril())

    first = normal(2, 4, L, 8)
    torch._dynamo.mark_dynamic(first, 2)
    compiled = Compiled(attend)
    same(compiled(first), attend(first))
    (site,) = compiled.report.rewritten
    assert site.mask == "causal"
    for length in (2, 5, 17):
        q = normal(2, 4, length, 8)
        same(compiled(q), attend(q))
    assert len(compiled.report.graphs) == 1


def test_a_symbolic_batch_does_not_hinder() -> None:
    def attend(q: Tensor) -> Tensor:
        return sdpa(q, q, q, ones().tril())

    first = normal(2, 4, L, 8)
    torch._dynamo.mark_dynamic(first, 0)
    compiled = Compiled(attend)
    for batch in (2, 5):
        q = first if batch == 2 else normal(batch, 4, L, 8)
        same(compiled(q), attend(q))
    assert [site.mask for site in compiled.report.rewritten] == ["causal"]


def test_folding_ignores_the_modes_around_it() -> None:
    def mask() -> Tensor:
        return (torch.arange(300.0)[None] <= torch.arange(300.0)[:, None])[:L, :L]

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():

        def attend(q: Tensor) -> Tensor:
            return sdpa(q, q, q, mask())

        (site,) = check(attend, Q).rewritten
    assert site.mask == "causal"


def test_a_value_of_another_dtype_than_traced_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = folding.run
    monkeypatch.setattr(folding, "run", lambda node, values: run(node, values).to(torch.uint8))
    assert mask_of(lambda: torch.eye(L) > 0)[0] == "explicit bool (6, 6)"


def test_constants_of_another_device_are_evaluated_on_the_cpu() -> None:
    def model(q: Tensor) -> Tensor:
        position = torch.arange(L, device=q.device)
        mask = (position[:, None] >= position).to("meta") & torch.ones(1, dtype=bool).to(q.device)
        return sdpa(q, q, q, mask)

    _, report = rewritten(model, torch.empty(1, 1, L, 8, device="meta"), precision="exact")
    assert [site.mask for site in report.rewritten] == ["causal"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lowest_is_that_of_the_mask(dtype: torch.dtype) -> None:
    lowest = torch.full((L, L), torch.finfo(dtype).min, dtype=dtype).triu(1)
    found = window_of(lowest)
    assert found is not None and found.mask_class is MaskClass.CAUSAL
    assert window_of(lowest / torch.finfo(dtype).min * -1e4) is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integers_are_no_mask(dtype: torch.dtype) -> None:
    assert read(torch.zeros(L, L, dtype=dtype), L, L) is None


def test_an_empty_batch_proves_nothing() -> None:
    assert window_of(torch.ones(0, 1, L, L, dtype=torch.bool)) is None


# --- every band, and noise ------------------------------------------------------------------


def window_of(mask: Tensor) -> Window | None:
    """The window that a mask of known values is, if it is one."""
    sizes = mask.shape[-2:]
    found = read(mask, *sizes)
    if found is None or found.band is None or not found.is_boolean:
        return None
    window, said = express([found.band], *sizes)
    return window if said else None


def dense(found: Window, query_length: int, key_length: int) -> Tensor:
    """The mask that a window stands for, as the kernels read it."""
    semantics = Semantics(
        mask_class=found.mask_class,
        window_left=found.left,
        window_right=found.right,
    )
    band = semantics.band(query_length, key_length)
    if band is None:
        return torch.ones(query_length, key_length, dtype=torch.bool)
    return visible_band(band, query_length, 0, key_length, torch.device("cpu"))


@st.composite
def noisy_bands(draw: st.DrawFn) -> Tensor:
    query_length, key_length = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    low = draw(st.integers(-query_length, key_length))
    high = draw(st.integers(low - 1, key_length))
    diagonal = torch.arange(key_length) - torch.arange(query_length).unsqueeze(1)
    mask = (diagonal >= low) & (diagonal <= high)
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        row = draw(st.integers(0, query_length - 1))
        column = draw(st.integers(0, key_length - 1))
        mask[row, column] = ~mask[row, column]
    return mask


@settings(max_examples=200)
@given(mask=noisy_bands(), form=st.sampled_from(("bool", "-inf", "lowest")), lead=st.booleans())
def test_a_classified_mask_is_the_mask(mask: Tensor, form: str, lead: bool) -> None:
    given_mask = mask
    if form != "bool":
        hidden = -INF if form == "-inf" else LOWEST
        given_mask = torch.zeros(mask.shape).masked_fill(~mask, hidden)
    if lead:
        given_mask = given_mask.expand(2, 3, *mask.shape)
    found = window_of(given_mask)
    if found is not None:
        assert torch.equal(dense(found, *mask.shape), mask)


@settings(max_examples=100)
@given(
    query_length=st.integers(1, 9),
    key_length=st.integers(1, 9),
    left=st.integers(-1, 9),
    right=st.integers(-1, 9),
    bottom_right=st.booleans(),
)
def test_every_window_is_recognized(
    query_length: int, key_length: int, left: int, right: int, bottom_right: bool
) -> None:
    semantics = Semantics(
        MaskClass.WINDOW_BOTTOM_RIGHT if bottom_right else MaskClass.WINDOW, left, right
    )
    band = semantics.band(query_length, key_length)
    assert band is not None
    mask = visible_band(band, query_length, 0, key_length, torch.device("cpu"))
    found = window_of(mask)
    if bool(mask.any(-1).all()):
        assert found is not None
    if found is not None:
        assert torch.equal(dense(found, query_length, key_length), mask)


def test_a_wrong_band_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = bands._sides

    def shifted(band: bands.Band, offset: int) -> tuple[int, int] | None:
        found = sides(band, offset)
        return None if found is None else (found[0], found[1] + 1)

    monkeypatch.setattr(bands, "_sides", shifted)
    mask = ones().tril()
    found = window_of(mask)
    assert found is not None and not torch.equal(dense(found, L, L), mask)
