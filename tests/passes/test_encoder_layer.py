"""Transformer layers of torch.nn, and the calls that they become in evaluation: the fast path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import Tensor, fx, nn

from sage_compiler.passes.encoder_layer import recognize_encoder_layer
from sage_compiler.passes.walk import Walk
from tests.capture import rewritten
from tests.passes.checks import captured, check, keeps, normal
from tests.passes.torch_layers import (
    BATCH,
    CROSS,
    HEADS,
    KEYS,
    LENGTH,
    SELF,
    WIDTH,
    encoder_layer,
    graph_of,
    hidden,
    inputs_of,
    only,
    randomized,
    reason_of,
    same_gradients,
    weights,
)

# --- transformer layers ---------------------------------------------------------------------

LAYERS: Final[dict[str, tuple[Callable[..., nn.Module], int, int]]] = {
    "encoder layer": (lambda **o: nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **o), 1, 1),
    "decoder layer": (lambda **o: nn.TransformerDecoderLayer(WIDTH, HEADS, 32, **o), 2, 2),
    "encoder": (
        lambda **o: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **o), 2, enable_nested_tensor=False
        ),
        1,
        2,
    ),
    "decoder": (
        lambda **o: nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, **o), 2),
        2,
        4,
    ),
    "transformer": (lambda **o: nn.Transformer(WIDTH, HEADS, 1, 1, 32, **o), 2, 3),
}


def layer(name: str, **options: Any) -> tuple[nn.Module, list[Tensor], int]:
    """A module in training, its inputs, and how often it attends."""
    build, inputs, sites = LAYERS[name]
    module = randomized(build(dropout=0.0, batch_first=True, **options))
    return module, inputs_of(CROSS[:inputs]), sites


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_training(name: str, norm_first: bool) -> None:
    module, inputs, sites = layer(name, norm_first=norm_first)
    report = same_gradients(module, list(module.parameters()), inputs)
    assert len(report.rewritten) == sites


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_evaluation(name: str, norm_first: bool) -> None:
    module, inputs, sites = layer(name, norm_first=norm_first)
    module.eval()
    with torch.no_grad():
        report = check(module, *inputs)
    fast = {site.form for site in only(report, sites) if "fast path" in site.form}
    assert bool(fast) == (not name.startswith("decoder"))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_fast_path_of_an_encoder_layer(activation: str, norm_first: bool) -> None:
    options = {"activation": activation, "norm_first": norm_first, "layer_norm_eps": 0.1}
    module = encoder_layer(**options).eval()
    with torch.no_grad():
        (site,) = only(check(module, *inputs_of(SELF)))
    assert site.form == "transformer encoder layer, fast path"


def test_a_model_in_evaluation_with_gradients() -> None:
    module, inputs, sites = layer("transformer")
    report = same_gradients(module.eval(), list(module.parameters()), inputs)
    assert len(report.rewritten) == sites


@pytest.mark.parametrize("training", [False, True])
def test_masks_of_a_transformer(training: bool) -> None:
    module, (source, target), sites = layer("transformer")
    module.train(training)
    padding = hidden(BATCH, LENGTH), hidden(BATCH, KEYS)

    def function(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
        mask = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
        paddings = {"src_key_padding_mask": of_x, "tgt_key_padding_mask": of_y}
        paddings["memory_key_padding_mask"] = of_x
        return module(x, y, tgt_mask=mask, tgt_is_causal=True, **paddings)

    with torch.no_grad():
        report = check(function, source, target, *padding)
    assert sorted(site.mask for site in only(report, sites)) == [
        f"causal and explicit bool ({BATCH}, {KEYS}) key padding",
        f"explicit bool ({BATCH}, {LENGTH}) key padding",
        f"explicit bool ({BATCH}, {LENGTH}) key padding",
    ]


def test_dynamic_layers() -> None:
    module = encoder_layer()

    def function(x: Tensor, padding: Tensor) -> Tensor:
        return module(x, src_key_padding_mask=padding)

    with torch.no_grad():
        for training in (True, False):
            module.train(training)
            padding = hidden(BATCH, LENGTH)
            only(check(function, *inputs_of(SELF), padding, dynamic=True))


# --- the fast path --------------------------------------------------------------------------

FAST_MASKS: Final[dict[str, tuple[Tensor, int]]] = {
    "over queries": (hidden(LENGTH, LENGTH), 0),
    "over queries, numbers": (hidden(LENGTH, LENGTH) * normal(LENGTH, LENGTH), 0),
    "over queries, low numbers": (torch.full((LENGTH, LENGTH), -1e9).triu(1), 0),
    "padding": (hidden(BATCH, LENGTH), 1),
    "padding, numbers": (hidden(BATCH, LENGTH).float(), 1),
    "padding, integers": (hidden(BATCH, LENGTH).int(), 1),
    "whole": (hidden(BATCH, HEADS, LENGTH, LENGTH), 2),
    "whole, numbers": (hidden(BATCH, HEADS, LENGTH, LENGTH) * normal(LENGTH), 2),
    "whole, of another type": (hidden(BATCH, HEADS, LENGTH, LENGTH), 1),
    "dead rows": (torch.ones(BATCH, LENGTH, dtype=torch.bool), 1),
}


def native(
    x: Tensor,
    y: Tensor,
    given: dict[str, Tensor],
    mask: Tensor | None = None,
    kind: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    parameters = (given["packed"], given["bias"], given["out"], given["out_bias"])
    return torch._native_multi_head_attention(
        x, y, y, WIDTH, HEADS, *parameters, mask=mask, mask_type=kind, **options
    )


@pytest.mark.parametrize("name", FAST_MASKS)
def test_masks_of_the_fast_path(name: str) -> None:
    mask, kind = FAST_MASKS[name]
    x, y = inputs_of((SELF[0], SELF[0]))

    def function(x: Tensor, y: Tensor, given: dict[str, Tensor], mask: Tensor) -> Tensor:
        return native(x, x, given, mask, kind)[0] + native(x, y, given, mask, kind)[0]

    with torch.no_grad():
        sites = only(check(function, x, y, weights(), mask), 2)
        assert bool(native(x, x, weights(), mask, kind)[0].isnan().any()) == (name == "dead rows")
    assert {site.form for site in sites} == {"multi-head attention, fast path"}


def test_projections_of_the_fast_path() -> None:
    x, y, z = inputs_of((SELF[0],) * 3)

    def function(x: Tensor, y: Tensor, z: Tensor, given: dict[str, Tensor]) -> Tensor:
        parameters = (given["packed"], given["bias"], given["out"], given["out_bias"])
        first = torch._native_multi_head_attention(x, y, z, WIDTH, HEADS, *parameters)[0]
        return native(first, first, given)[0] + native(first, y, given)[0]

    with torch.no_grad():
        sites = only(check(function, x, y, z, weights()), 3)
    assert {site.form for site in sites} == {"multi-head attention, fast path"}


def test_masks_of_an_encoder() -> None:
    module = encoder_layer().eval()

    def function(x: Tensor, padding: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        x = module(x, src_mask=mask, is_causal=True)
        x = module(x, src_key_padding_mask=padding)
        zeros = torch.zeros(padding.shape).masked_fill(padding, -math.inf)
        return module(x, src_mask=mask, src_key_padding_mask=zeros)

    with torch.no_grad():
        report = check(function, *inputs_of(SELF), hidden(BATCH, LENGTH))
    masks = [site.mask for site in only(report, 3)]
    assert masks[:2] == ["causal", f"explicit bool ({BATCH}, {LENGTH}) key padding"]
    assert masks[2].startswith("causal and explicit")


def test_a_fast_path_mask_counts_as_bool() -> None:
    # PyTorch hides what is not zero, so a bias of the scores is none here.
    module = encoder_layer().eval()
    bias = normal(LENGTH, LENGTH).relu()

    def function(x: Tensor, bias: Tensor) -> Tensor:
        return module(x, src_mask=bias)

    with torch.no_grad():
        (site,) = only(check(function, *inputs_of(SELF), bias))
    assert site.mask.startswith("explicit")


@pytest.mark.parametrize("fill", [-1e9, -math.inf])
@pytest.mark.parametrize("diagonal", [0, 1])
def test_a_low_number_hides_as_infinity_does(diagonal: int, fill: float) -> None:
    # Added to the scores, a finite number in a whole row would make an average of it.
    def function(x: Tensor, given: dict[str, Tensor]) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), fill).triu(diagonal)
        return native(x, x, given, mask, 0)[0]

    x = normal(*SELF[0])
    with torch.no_grad():
        only(check(function, x, weights()))
        assert bool(function(x, weights()).isnan().any()) == (diagonal == 0)


def test_the_fast_path_in_bfloat16() -> None:
    module = encoder_layer(activation="gelu").eval().bfloat16()
    x = normal(*SELF[0]).bfloat16()
    with torch.no_grad():
        actual, report = rewritten(module, x, precision="exact")
        expected = module(x)
    only(report)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=6e-2)


def test_a_quantized_encoder() -> None:
    module, inputs, sites = layer("encoder")
    module.eval()
    with torch.no_grad():
        actual, report = rewritten(module, *inputs, precision="int8_fp8")
        expected = module(*inputs)
    assert {site.recipe for site in only(report, sites)} == {"int8_fp8"}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.15)
    assert not torch.equal(actual, expected)


# --- what is kept ---------------------------------------------------------------------------


def test_used_weights_of_the_fast_path_are_kept() -> None:
    with torch.no_grad():
        (reason,) = keeps(lambda x, given: native(x, x, given), normal(*SELF[0]), weights())
    assert reason == "the attention weights are used"


def test_the_fast_path_under_autocast_is_kept() -> None:
    module = encoder_layer().eval()

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    with torch.no_grad():
        _, report = rewritten(function, normal(*SELF[0]), precision="exact")
    assert [site.reason for site in report.kept] == [
        "autocast may be on, which the fast path obeys only in parts"
    ]


def test_a_nested_input_is_kept() -> None:
    gm, call = graph_of(encoder_layer().eval(), normal(*SELF[0]))
    source = call.args[0]
    assert isinstance(source, fx.Node)
    source.meta["example_value"] = torch.nested.nested_tensor([normal(2, WIDTH), normal(3, WIDTH)])
    reason = recognize_encoder_layer(call, Walk(gm.graph))
    assert reason == "src is nested, sparse or of a tensor subclass"


def test_an_unknown_device_is_kept() -> None:
    gm, call = graph_of(encoder_layer().eval(), normal(*SELF[0]))
    source = call.args[0]
    assert isinstance(source, fx.Node)
    source.meta["example_value"] = torch.empty(SELF[0], device="meta")
    assert reason_of(gm) == "what the fast path computes on meta is not known"


def test_inputs_of_different_lengths_are_kept() -> None:
    # PyTorch's fake implementation lets pass what its kernels refuse.
    inputs = normal(*SELF[0]), normal(BATCH, KEYS, WIDTH)
    with torch.no_grad():
        gm = captured(
            lambda x, y, given: native(x, x, given)[0].sum() + y.sum(), *inputs, weights()
        )
    (call,) = (n for n in gm.graph.nodes if n.target is torch._native_multi_head_attention)
    (other,) = (n for n in gm.graph.nodes if n.target == "L_y_")
    call.update_arg(1, other)
    call.update_arg(2, other)
    assert reason_of(gm) == "query, key and value are not provably of one shape (B, L, E)"


def test_a_mask_of_another_type() -> None:
    def function(x: Tensor, given: dict[str, Tensor], mask: Tensor) -> Tensor:
        return native(x, x, given, mask, 0)[0]

    with torch.no_grad():
        gm = captured(function, normal(*SELF[0]), weights(), hidden(LENGTH, LENGTH))
    (call,) = (n for n in gm.graph.nodes if n.target is torch._native_multi_head_attention)
    call.update_kwarg("mask_type", 1)
    assert reason_of(gm) == f"a mask of shape ({LENGTH}, {LENGTH}) and of type 1"
