"""nn.MultiheadAttention, the transformer layers around it, and their fast path in evaluation."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.passes.detect import detect
from sage_compiler.passes.site import AttentionSite
from sage_compiler.passes.values import Apply
from tests.capture import operator_calls, rewritten
from tests.passes.checks import captured, check, keeps, normal
from tests.passes.torch_layers import (
    BATCH,
    CROSS,
    HEADS,
    KEYS,
    LENGTH,
    SELF,
    WIDTH,
    attention,
    encoder_layer,
    forward,
    graph_of,
    hidden,
    inputs_of,
    only,
    reason_of,
    same_gradients,
    weights,
)

# --- nn.MultiheadAttention ------------------------------------------------------------------

THREE: Final = ((BATCH, LENGTH, WIDTH), (BATCH, KEYS, WIDTH), (BATCH, KEYS, WIDTH))
MODULES: Final[dict[str, tuple[dict[str, Any], tuple[tuple[int, ...], ...]]]] = {
    "self": ({"batch_first": True}, SELF),
    "length first": ({}, SELF),
    "cross": ({"batch_first": True}, CROSS),
    "three inputs": ({"batch_first": True}, THREE),
    "other widths": (
        {"kdim": 6, "vdim": 9},
        ((LENGTH, BATCH, WIDTH), (KEYS, BATCH, 6), (KEYS, BATCH, 9)),
    ),
    "other widths, no bias": (
        {"kdim": 6, "vdim": 9, "bias": False},
        ((LENGTH, BATCH, WIDTH), (KEYS, BATCH, 6), (KEYS, BATCH, 9)),
    ),
    "no bias": ({"bias": False, "batch_first": True}, CROSS),
    "appended key": ({"add_bias_kv": True, "batch_first": True}, CROSS),
    "appended zero": ({"add_zero_attn": True, "batch_first": True}, CROSS),
    "both appended": ({"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}, CROSS),
    "unbatched": ({}, ((LENGTH, WIDTH),)),
    "unbatched, cross, appended": ({"add_bias_kv": True}, ((LENGTH, WIDTH), (KEYS, WIDTH))),
}


def filled(inputs: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; what is missing is the input before it."""
    query, key, value = (*inputs, *inputs[-1:] * (3 - len(inputs)))
    return query, key, value


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, need_weights: bool) -> None:
    options, shapes = MODULES[name]
    module = attention(**options)

    def function(*inputs: Tensor) -> Tensor:
        return module(*filled(inputs), need_weights=need_weights)[0]

    report = check(function, *inputs_of(shapes))
    (site,) = only(report)
    assert site.mask == "none"
    assert site.form == "multi_head_attention_forward"
    assert operator_calls(report) == 1
    after = report.graphs[0].after.graph
    assert not any(n.target is F.multi_head_attention_forward for n in after.nodes)


def test_shapes_in_the_report() -> None:
    module = attention(add_bias_kv=True, batch_first=True)
    report = check(lambda *given: module(*filled(given))[0], *inputs_of(CROSS))
    (site,) = only(report)
    assert site.q_shape == (BATCH, HEADS, LENGTH, WIDTH // HEADS)
    assert site.kv_shape == (BATCH, HEADS, KEYS + 1, WIDTH // HEADS)


def test_equal_inputs_share_one_projection() -> None:
    def projections(function: Callable[..., Any], *inputs: Tensor) -> int:
        (site,) = detect(captured(function, *inputs))
        assert isinstance(site, AttentionSite)
        found: set[int] = set()
        stack: list[Any] = [site.query, site.key, site.value]
        while stack:
            value = stack.pop()
            if isinstance(value, Apply):
                stack.extend(value.args)
                if value.target is torch.ops.aten.linear.default:
                    found.add(id(value))
        return len(found)

    module = attention(batch_first=True)
    x, y, z = inputs_of(THREE)
    assert projections(lambda x: module(x, x, x)[0], x) == 1
    assert projections(lambda x, y: module(x, y, y)[0], x, y) == 2
    assert projections(lambda x, y, z: module(x, y, z)[0], x, y, z) == 3


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["self", "other widths", "both appended"])
def test_gradients(name: str, need_weights: bool) -> None:
    options, shapes = MODULES[name]
    module = attention(**options)
    mask = hidden(LENGTH, LENGTH if name == "self" else KEYS)
    # A learned bias of the scores has a gradient too.
    bias = nn.Parameter(torch.zeros(mask.shape).masked_fill(mask, -math.inf))

    def function(*inputs: Tensor) -> Tensor:
        return module(*filled(inputs), attn_mask=bias, need_weights=need_weights)[0]

    same_gradients(function, [*module.parameters(), bias], inputs_of(shapes))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dynamic_shapes(need_weights: bool) -> None:
    module = attention(batch_first=True, add_bias_kv=True)

    def function(x: Tensor, y: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
        options = {"need_weights": need_weights, "key_padding_mask": padding, "attn_mask": mask}
        return module(x, y, y, **options)[0]

    masks = normal(BATCH, KEYS), normal(BATCH * HEADS, LENGTH, KEYS)
    (site,) = only(check(function, *inputs_of(CROSS), *masks, dynamic=True))
    assert not all(isinstance(size, int) for size in site.q_shape)


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights: bool) -> None:
    module = attention(batch_first=True, add_bias_kv=True)

    def function(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x, y, y, attn_mask=mask, need_weights=need_weights)[0]

    inputs = (*inputs_of(CROSS), normal(LENGTH, KEYS))
    actual, report = rewritten(function, *inputs, precision="exact")
    only(report)
    expected = function(*inputs)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=4e-2)
    assert not torch.equal(actual.float(), module(*filled(inputs[:2]), attn_mask=inputs[2])[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast_of_the_lowest_number(need_weights: bool) -> None:
    # A row of float32's minimum is a uniform average; as bfloat16 it is -inf, and the row is dead.
    module = attention(batch_first=True)

    def function(x: Tensor) -> Tensor:
        mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x, x, x, attn_mask=mask, need_weights=need_weights)[0]

    x = normal(*SELF[0])
    actual, report = rewritten(function, x, precision="exact")
    only(report)
    assert bool(actual.isnan().all()) == need_weights
    torch.testing.assert_close(actual, function(x), rtol=2e-2, atol=4e-2, equal_nan=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_bfloat16(need_weights: bool) -> None:
    module = attention(batch_first=True).bfloat16()
    x, mask = normal(*SELF[0]).bfloat16(), hidden(LENGTH, LENGTH)

    def function(x: Tensor, mask: Tensor) -> Tensor:
        return module(x, x, x, attn_mask=mask, need_weights=need_weights)[0]

    actual, report = rewritten(function, x, mask, precision="exact")
    only(report)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, function(x, mask), rtol=2e-2, atol=4e-2)


# --- the function itself --------------------------------------------------------------------


def test_positional_arguments() -> None:
    def function(x: Tensor, w: dict[str, Tensor], mask: Tensor, padding: Tensor) -> Tensor:
        projections = (w["packed"], w["bias"], None, None, False, 0.3, w["out"], w["out_bias"])
        last = (False, padding, False, mask, False, None, None, None, None, None, True, False)
        return F.multi_head_attention_forward(x, x, x, WIDTH, HEADS, *projections, *last)[0]

    masks = hidden(LENGTH, LENGTH), hidden(BATCH, LENGTH)
    only(check(function, normal(LENGTH, BATCH, WIDTH), weights(), *masks))


@pytest.mark.parametrize("need_weights", [True, False])
def test_static_keys_and_values(need_weights: bool) -> None:
    static = normal(BATCH * HEADS, KEYS, WIDTH // HEADS, seed=3)

    def function(x: Tensor, given: dict[str, Tensor], static: Tensor) -> Tensor:
        both = forward(x, x, given, static_k=static, static_v=static + 1, need_weights=need_weights)
        zero = forward(x, x, given, static_k=static, static_v=static, add_zero_attn=True)
        return both[0] + zero[0]

    only(check(function, normal(LENGTH, BATCH, WIDTH), weights(), static), 2)


@pytest.mark.parametrize("index", [0, -2])
def test_spellings_of_the_output(index: int) -> None:
    x = normal(LENGTH, BATCH, WIDTH)
    only(check(lambda x, given: forward(x, x, given)[index], x, weights()))


# --- what is kept ---------------------------------------------------------------------------


def test_dropout_in_training_is_kept() -> None:
    module = attention(dropout=0.5)
    x = normal(LENGTH, BATCH, WIDTH)
    for need_weights in (True, False):
        (reason,) = keeps(lambda x, n=need_weights: module(x, x, x, need_weights=n)[0], x)
        assert reason == "dropout_p=0.5 in training"
    module.eval()
    only(check(lambda x: module(x, x, x)[0], x))


@pytest.mark.parametrize("average", [True, False])
def test_used_weights_are_kept(average: bool) -> None:
    module = attention()
    x = normal(LENGTH, BATCH, WIDTH)
    (reason,) = keeps(lambda x: module(x, x, x, average_attn_weights=average), x)
    assert reason == "the attention weights are used"


def test_another_dtype_is_kept() -> None:
    module = attention().double()
    (reason,) = keeps(lambda x: module(x, x, x)[0], normal(LENGTH, BATCH, WIDTH).double())
    assert "torch.float64" in reason


def test_a_chosen_backend_is_kept() -> None:
    module = attention()

    def function(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return module(x, x, x, need_weights=False)[0]

    (reason,) = keeps(function, normal(LENGTH, BATCH, WIDTH))
    assert "sdpa_kernel" in reason


@pytest.mark.parametrize("argument", ["query", "in_proj_weight", "out_proj_bias"])
def test_what_changes_before_the_output_is_taken(argument: str) -> None:
    module = attention()
    places = {"query": 0, "in_proj_weight": 5, "out_proj_bias": 12}
    gm, call = graph_of(_Output(module), normal(LENGTH, BATCH, WIDTH))
    assert isinstance(detect(gm)[0], AttentionSite)
    changed = call.args[places[argument]]
    assert isinstance(changed, fx.Node)
    with gm.graph.inserting_after(call):
        write = gm.graph.call_method("add_", (changed, 1))
        write.meta = dict(changed.meta)
    assert reason_of(gm).endswith("is changed in place before the output is taken")


def test_a_result_that_is_used_whole() -> None:
    gm, call = graph_of(_Output(attention()), normal(LENGTH, BATCH, WIDTH))
    with gm.graph.inserting_after(call):
        gm.graph.call_function(list, (call,))
    assert reason_of(gm).startswith("its result is also used whole")


def test_weights_that_nothing_reads() -> None:
    x = normal(LENGTH, BATCH, WIDTH)
    gm, call = graph_of(_Output(attention()), x)
    with gm.graph.inserting_after(call):
        gm.graph.call_function(operator.getitem, (call, 1))
    only(transform(gm, parse_options({"precision": "exact"})))
    assert not any(n.target is F.multi_head_attention_forward for n in gm.graph.nodes)


class _Output(nn.Module):
    """The output of self-attention, without the weights."""

    def __init__(self, inner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


# --- hostile models -------------------------------------------------------------------------


def test_weights_that_change_between_two_calls() -> None:
    module = attention()

    def function(x: Tensor) -> Tensor:
        first = module(x, x, x)[0]
        with torch.no_grad():
            module.in_proj_weight.add_(0.1)
        second = module(first, x, x)[0]
        with torch.no_grad():
            module.in_proj_weight.sub_(0.1)
        return second

    with torch.no_grad():
        only(check(function, normal(LENGTH, BATCH, WIDTH)), 2)


def test_inputs_and_masks_that_change_after_the_call() -> None:
    module = attention()

    def function(x: Tensor, padding: Tensor) -> Tensor:
        output = module(x, x, x, key_padding_mask=padding)[0]
        x.mul_(2)
        padding.logical_not_()
        return output + x

    with torch.no_grad():
        only(check(function, normal(LENGTH, BATCH, WIDTH), hidden(BATCH, LENGTH)))


def test_a_padding_mask_that_changes_before_it_is_read() -> None:
    module = attention()

    def function(x: Tensor, padding: Tensor) -> Tensor:
        zeros = torch.zeros_like(padding, dtype=x.dtype).masked_fill_(padding, -math.inf)
        padding.logical_not_()
        first = module(x, x, x, key_padding_mask=zeros)[0]
        zeros[:, 0] = 2.0
        return first + module(x, x, x, key_padding_mask=zeros)[0]

    with torch.no_grad():
        only(check(function, normal(LENGTH, BATCH, WIDTH), hidden(BATCH, LENGTH)), 2)


def test_tied_weights() -> None:
    first, second = attention(), attention()
    second.in_proj_weight = first.in_proj_weight
    second.out_proj = first.out_proj

    def function(x: Tensor) -> Tensor:
        return second(first(x, x, x)[0], x, x)[0]

    report = same_gradients(function, list(first.parameters()), [normal(LENGTH, BATCH, WIDTH)])
    assert len(report.rewritten) == 2


def test_hooks_run() -> None:
    module = attention()
    module.register_forward_pre_hook(lambda _, given: tuple(2 * each for each in given))
    module.register_forward_hook(lambda *given: (given[2][0] + 1, None))
    report = check(lambda x: module(x, x, x)[0], normal(LENGTH, BATCH, WIDTH))
    only(report)
    layer = encoder_layer().eval()
    layer.self_attn.register_forward_hook(lambda *given: (given[2][0] * 3, None))
    with torch.no_grad():
        only(check(layer, normal(*SELF[0])))


def test_an_output_that_is_written_to() -> None:
    module = attention()

    def function(x: Tensor) -> Tensor:
        output = module(x, x, x)[0]
        output.add_(x)
        return output.relu_()

    with torch.no_grad():
        only(check(function, normal(LENGTH, BATCH, WIDTH)))
