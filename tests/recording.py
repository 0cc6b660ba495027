"""A torch.compile backend with the passes and without Inductor, that several models can share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.precision import EXACT
from sage_compiler.report import Report


class Recorder:
    """Rewrites every graph with precision="exact", and keeps account.

    Attributes:
        report: on everything compiled.
        runs: how often each graph has run, by its number.
    """

    def __init__(self) -> None:
        self.report = Report()
        self.runs: Counter[int] = Counter()

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        number = len(self.report.graphs)
        self.report.extend(transform(gm, parse_options({"precision": EXACT})))

        def run(*inputs: Any) -> Any:
            self.runs[number] += 1
            return gm.forward(*inputs)

        return run

    @property
    def layers(self) -> list[str]:
        """The names of all sites so far, in order of compilation."""
        return [site.layer for site in self.report.sites]
