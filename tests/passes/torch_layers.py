"""For tests of torch.nn's attention: modules, inputs, masks, and what to check of a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sage_compiler.passes.detect import detect
from sage_compiler.passes.site import Rejected
from sage_compiler.report import Report
from tests.capture import rewritten
from tests.passes.checks import captured, normal

BATCH: Final = 2
LENGTH: Final = 5
KEYS: Final = 7
WIDTH: Final = 16
HEADS: Final = 4


def randomized(module: nn.Module) -> Any:
    """The module with parameters of ordinary size: biases too, which begin as zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def attention(**options: Any) -> nn.MultiheadAttention:
    module: nn.MultiheadAttention = randomized(nn.MultiheadAttention(WIDTH, HEADS, **options))
    return module


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    options = {"dropout": 0.0, "batch_first": True, **options}
    module: nn.TransformerEncoderLayer = randomized(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **options)
    )
    return module


def hidden(*size: int, seed: int = 0) -> Tensor:
    """A bool mask, True where hidden, with a visible key in every row."""
    mask = normal(*size, seed=seed) > 0.5
    mask[..., 0] = False
    return mask


def only(report: Report, count: int = 1) -> list[Any]:
    """The sites, all of which must be rewritten."""
    assert len(report.rewritten) == count, str(report)
    assert not report.kept, str(report)
    return report.rewritten


def mask_of(report: Report) -> str:
    (site,) = only(report)
    text: str = site.mask
    return text


SELF: Final = ((BATCH, LENGTH, WIDTH),)
CROSS: Final = ((BATCH, LENGTH, WIDTH), (BATCH, KEYS, WIDTH))


def inputs_of(shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    return [normal(*shape, seed=at) for at, shape in enumerate(shapes)]


def weights() -> dict[str, Tensor]:
    return {
        "packed": normal(3 * WIDTH, WIDTH, seed=11) * 0.3,
        "bias": normal(3 * WIDTH, seed=12),
        "out": normal(WIDTH, WIDTH, seed=13) * 0.3,
        "out_bias": normal(WIDTH, seed=14),
    }


def forward(x: Tensor, y: Tensor, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Any]:
    """multi_head_attention_forward with defaults for what a test does not care about."""
    arguments = {
        "embed_dim_to_check": WIDTH,
        "num_heads": HEADS,
        "in_proj_weight": given["packed"],
        "in_proj_bias": given["bias"],
        "bias_k": None,
        "bias_v": None,
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weight": given["out"],
        "out_proj_bias": given["out_bias"],
    }
    return F.multi_head_attention_forward(x, y, y, **{**arguments, **options})


def same_gradients(
    function: Callable[..., Tensor], parameters: list[nn.Parameter], inputs: list[Tensor]
) -> Report:
    """Eager and rewritten gradients of parameters and inputs must agree."""
    inputs = [given.requires_grad_() for given in inputs]
    wanted = [*parameters, *inputs]
    expected = function(*inputs)
    weight = normal(*expected.shape, seed=5)
    expected_gradients = torch.autograd.grad(expected, wanted, weight)
    actual, report = rewritten(function, *inputs, precision="exact")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for found, right in zip(
        torch.autograd.grad(actual, wanted, weight), expected_gradients, strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert report.rewritten and not report.kept, str(report)
    return report


def graph_of(module: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, fx.Node]:
    """The graph of a module, and the one call in it that attends."""
    with torch.no_grad():
        gm = captured(module, *inputs)
    names = ("multi_head_attention_forward", "_transformer_encoder_layer_fwd")
    (call,) = (n for n in gm.graph.nodes if getattr(n.target, "__name__", "") in names)
    return gm, call


def reason_of(gm: fx.GraphModule) -> str:
    (finding,) = detect(gm)
    assert isinstance(finding, Rejected), finding
    return finding.reason
