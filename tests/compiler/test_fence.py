"""Inductor's fuse_attention stays off our graphs, and on everybody else's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

from sage_compiler import fence

TOLERANCE = 1e-4


def softmax_over(dim: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What looks like attention; only dim -1 is one."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.2).softmax(dim) @ v

    return function


def fused(backend: str, function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, int]:
    """The compiled result, and how often fuse_attention matched."""
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        result = torch.compile(function, backend=backend)(*inputs)
    return result, counters["inductor"]["fuse_attention"]


@pytest.mark.parametrize("dim", [-2, -1, 0, 1])
def test_kept_softmax_is_right(dim: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 32, 32, requires_grad=True) for _ in range(3)]
    function = softmax_over(dim)
    expected = function(*inputs)
    actual, matches = fused("sage", function, *inputs)
    assert matches == 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y in (expected, actual)]
    for wanted, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


def test_plain_inductor_is_left_as_it_was() -> None:
    inputs = torch.randn(3, 2, 4, 32, 32).unbind()
    function = softmax_over(-1)
    _, before = fused("inductor", function, *inputs)
    _, ours = fused("sage", function, *inputs)
    _, after = fused("inductor", function, *inputs)
    assert (before, ours, after) == (1, 0, 1)


class Recorder(CustomGraphPass):
    """A user's own pass, which must still run and still see the true graph."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.seen: list[bool] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(any(node.target is fence.hidden_exp for node in graph.nodes))

    def uuid(self) -> str | None:
        return self.name


def test_passes_of_others_run_outside_the_fence() -> None:
    first, last = Recorder("first"), Recorder("last")
    passes = {"joint_custom_pre_pass": first, "joint_custom_post_pass": last}
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(softmax_over(-1), backend="sage", options={"inductor": passes})
        compiled(*torch.randn(3, 2, 4, 8, 8).unbind())
    assert first.seen == last.seen == [False]


def test_cache_key_follows_the_passes_within() -> None:
    name = "joint_custom_pre_pass"
    plain = fence.patches({})[name].uuid()
    assert plain == fence.patches({})[name].uuid() is not None
    assert plain != fence.patches({name: Recorder("a")})[name].uuid()
    assert fence.patches({name: Recorder(None)})[name].uuid() is None
    assert fence.patches({name: lambda graph: None})[name].uuid() is None
