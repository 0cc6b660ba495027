"""Masks of multi_head_attention_forward: what they come to together, and rows that see no key."""

from __future__ import annotations

import itertools
import math
from typing import Final

import pytest
import torch
from torch import Tensor, nn

from tests.passes.checks import check, normal
from tests.passes.torch_layers import (
    BATCH,
    CROSS,
    HEADS,
    KEYS,
    LENGTH,
    SELF,
    WIDTH,
    attention,
    forward,
    hidden,
    inputs_of,
    mask_of,
    only,
    weights,
)

MASKS: Final[dict[str, Tensor]] = {
    "bool": hidden(LENGTH, KEYS),
    "float": normal(LENGTH, KEYS),
    "float, hidden": normal(LENGTH, KEYS).masked_fill(hidden(LENGTH, KEYS), -math.inf),
    "bool by head": hidden(BATCH * HEADS, LENGTH, KEYS),
    "float by head": normal(BATCH * HEADS, LENGTH, KEYS),
}
PADDINGS: Final[dict[str, Tensor | None]] = {
    "no padding": None,
    "bool padding": hidden(BATCH, KEYS),
    "float padding": normal(BATCH, KEYS, seed=4),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, padding: str) -> None:
    def function(
        x: Tensor, y: Tensor, given: dict[str, Tensor], mask: Tensor, padding: Tensor | None
    ) -> Tensor:
        masks = {"attn_mask": mask, "key_padding_mask": padding}
        choices = itertools.product((True, False), repeat=2)
        return torch.stack(
            [
                forward(x, y, given, **masks, need_weights=weights, add_zero_attn=appended)[0]
                for weights, appended in choices
            ]
        )

    inputs = normal(LENGTH, BATCH, WIDTH), normal(KEYS, BATCH, WIDTH)
    only(check(function, *inputs, weights(), MASKS[mask], PADDINGS[padding]), 4)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dead", ["mask", "float mask", "padding", "float padding"])
def test_rows_without_a_visible_key(dead: str, need_weights: bool) -> None:
    module = attention(batch_first=True)
    mask, padding = hidden(LENGTH, KEYS), hidden(BATCH, KEYS)
    (mask[1] if "mask" in dead else padding[1]).fill_(True)
    if "float" in dead:
        mask = torch.zeros(mask.shape).masked_fill(mask, -math.inf)
        padding = torch.zeros(padding.shape).masked_fill(padding, -math.inf)

    def function(x: Tensor, y: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
        options = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
        return module(x, y, y, **options)[0]

    given = (*inputs_of(CROSS), mask, padding)
    only(check(function, *given))
    assert bool(function(*given).isnan().any()) == need_weights


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_causal_mask_is_recognized(dtype: torch.dtype, dynamic: bool, need_weights: bool) -> None:
    module = attention(batch_first=True)

    def function(x: Tensor) -> Tensor:
        if dtype == torch.bool:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        else:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return module(x, x, x, attn_mask=mask, need_weights=need_weights)[0]

    assert mask_of(check(function, *inputs_of(SELF), dynamic=dynamic)) == "causal"


def test_a_causal_mask_beside_padding() -> None:
    module = attention(batch_first=True)

    def function(x: Tensor, padding: Tensor) -> Tensor:
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return module(x, x, x, attn_mask=mask, key_padding_mask=padding)[0]

    mask = mask_of(check(function, *inputs_of(SELF), hidden(BATCH, LENGTH)))
    assert mask == f"causal and explicit bool ({BATCH}, {LENGTH}) key padding"


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_finite_mask_beside_padding(need_weights: bool) -> None:
    # The first query sees nothing but the first key, and that is padding: what weighs then are
    # the keys that the finite mask hides.
    module = attention(batch_first=True)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 0] = True

    def function(x: Tensor, padding: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), -1e9).triu(1)
        zeros = torch.zeros(padding.shape).masked_fill(padding, -math.inf)
        options = {"key_padding_mask": zeros, "need_weights": need_weights}
        return module(x, x, x, attn_mask=mask, **options)[0]

    only(check(function, *inputs_of(SELF), padding))


@pytest.mark.parametrize("need_weights", [True, False])
def test_padding_is_no_mask_over_queries(need_weights: bool) -> None:
    module = attention(batch_first=True)

    def function(x: Tensor) -> Tensor:
        padding = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)  # as many batches as keys
        return module(x, x, x, key_padding_mask=padding, need_weights=need_weights)[0]

    mask = mask_of(check(function, normal(LENGTH, LENGTH, WIDTH)))
    assert mask == f"explicit bool ({LENGTH}, {LENGTH}) key padding"


def test_padding_of_one_sequence_is_understood() -> None:
    module = attention()

    def function(x: Tensor) -> Tensor:
        padding = torch.arange(LENGTH) >= LENGTH + 2
        return module(x, x, x, key_padding_mask=padding)[0]

    assert mask_of(check(function, normal(LENGTH, WIDTH))) == "none"


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_is_causal_is_a_hint(need_weights: bool, padded: bool) -> None:
    # The function trusts the hint only where it hands over to scaled_dot_product_attention.
    module = attention(batch_first=True)
    padding = hidden(BATCH, KEYS) if padded else None

    def function(x: Tensor, y: Tensor, mask: Tensor, padding: Tensor | None) -> Tensor:
        options = {"is_causal": True, "need_weights": need_weights}
        return module(x, y, y, attn_mask=mask, key_padding_mask=padding, **options)[0]

    mask = mask_of(check(function, *inputs_of(CROSS), hidden(LENGTH, KEYS), padding))
    assert (mask == "causal") == (not need_weights and not padded)
