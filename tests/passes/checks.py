"""What the tests of the passes share: run a function both ways, and look at its graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.precision import EXACT
from sage_compiler.report import Report
from tests.capture import rewritten

sdpa = F.scaled_dot_product_attention
TOLERANCE = 1e-5


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))


def check(function: Callable[..., Any], *inputs: Any, seed: int = 3, **options: Any) -> Report:
    """Eager and rewritten results, strides and inputs changed in place must agree."""
    expected_inputs, actual_inputs = (
        [given.clone() if isinstance(given, Tensor) else given for given in inputs]
        for _ in range(2)
    )
    torch.manual_seed(seed)
    expected = function(*expected_inputs)
    torch.manual_seed(seed)
    actual, report = rewritten(function, *actual_inputs, precision=EXACT, **options)
    same(actual, expected)
    same(actual_inputs, expected_inputs)
    return report


def same(actual: Any, expected: Any) -> None:
    for found, wanted in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if isinstance(wanted, Tensor):
            assert found.stride() == wanted.stride()
            torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE, equal_nan=True)
        else:
            assert found == wanted


def keeps(function: Callable[..., Any], *inputs: Any, **options: Any) -> list[str]:
    """The reasons why the function's attention is kept; none of it may be rewritten."""
    report = check(function, *inputs, **options)
    assert not report.rewritten, str(report)
    assert report.kept
    return [site.reason for site in report.kept]


class Compiled:
    """A function compiled with the passes and without Inductor, to be called several times."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.report = Report()

        def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
            self.report.extend(transform(gm, parse_options({"precision": EXACT})))
            return gm.forward

        torch._dynamo.reset()
        self._call = torch.compile(function, backend=backend, **options)

    def __call__(self, *inputs: Any) -> Any:
        return self._call(*inputs)


def captured(function: Callable[..., Any], *inputs: Any, **options: Any) -> fx.GraphModule:
    """The one graph that Dynamo captures of a function, as the backend gets it."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, **options)(*inputs)
    (gm,) = graphs
    return gm
