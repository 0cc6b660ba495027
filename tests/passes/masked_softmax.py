"""Check mask analyses against plain arithmetic: what the masks did to a softmax before and after.

A function of scores (..., Lq, Lk) and other inputs returns masks; they are applied to the scores as
they are, and as the analysis says, and the softmaxes must agree, rows without a visible key too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sage_compiler.passes.effects import Effects
from sage_compiler.passes.masks import Analysis, MaskContext, Term, TermKind, analyze
from sage_compiler.passes.normalize import tensor_of
from sage_compiler.passes.values import Apply
from sage_compiler.semantics import Semantics

VISIBLE, HIDDEN, ADDITIVE = TermKind
Kind = tuple[TermKind, float]


def kind_of(mask: Tensor) -> Kind:
    return (VISIBLE if mask.dtype == torch.bool else ADDITIVE, -math.inf)


class Masks:
    """A function that returns one mask or a tuple of them, compiled, analyzed and checked.

    ``analysis`` is that of the latest graph. ``readable`` is False when an explicit term has
    changed by the time that the operator would read it: whoever asked for the analysis must refuse.
    """

    def __init__(
        self, function: Callable[..., Any], kinds: Sequence[Kind] | None = None, **options: Any
    ) -> None:
        self.analysis = Analysis()
        self.graphs = 0
        self.readable = True
        self._kinds = kinds

        def scores_and_masks(scores: Tensor, *inputs: Any) -> Any:
            masks = function(scores, *inputs)
            return scores + 0, *(masks if isinstance(masks, tuple) else (masks,))

        torch._dynamo.reset()
        self._call = torch.compile(
            scores_and_masks, backend=self._backend, fullgraph=True, **options
        )

    def __call__(self, *inputs: Any) -> Analysis:
        self._call(*inputs)
        return self.analysis

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        scores, *masks = (tensor_of(node) for node in output.args[0])
        assert scores is not None
        kinds = self._kinds or [kind_of(mask) for mask in masks if mask is not None]
        nodes = output.args[0][1:]
        terms = [
            Term(node, kind, output, fill) for node, (kind, fill) in zip(nodes, kinds, strict=True)
        ]
        effects = Effects(gm.graph)
        found = analyze(terms, *scores.shape[-2:], MaskContext(effects))
        self.analysis = found
        self.readable = not any(effects.changed(t.node, t.reader, output) for t in found.terms)

        def run(*args: Any) -> Any:
            interpreter = Recorder(gm)
            result = interpreter.run(*args)
            if self.readable:
                compare(result[0], terms, found, interpreter.values)
            return result

        return run


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value, as it is when the output is returned."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.values[n] = result
        return result


def compare(
    scores: Tensor, terms: Sequence[Term], analysis: Analysis, values: dict[fx.Node, Any]
) -> None:
    """The softmax under the terms must be the one under the band and the explicit terms."""
    query, key = scores.shape[-2:]
    expected = apply(scores, terms, values)
    actual = apply(scores, analysis.terms, values)
    actual = actual.masked_fill(~band(analysis, query, key), -math.inf)
    torch.testing.assert_close(
        *torch.broadcast_tensors(actual.softmax(-1), expected.softmax(-1)),
        rtol=0,
        atol=1e-5,
        equal_nan=True,
    )
    if analysis.live:
        assert bool((expected > -math.inf).any(-1).all())


def apply(scores: Tensor, terms: Sequence[Term], values: dict[fx.Node, Any]) -> Tensor:
    """The scores after these terms, in order."""
    for term in terms:
        mask = evaluate(term.node if term.value is None else term.value, values)
        if term.kind is ADDITIVE:
            scores = scores + mask
        else:
            hidden = mask if term.kind is HIDDEN else ~mask
            scores = scores.masked_fill(hidden, term.fill)
    return scores


def evaluate(value: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, Apply):
        return value.target(*(evaluate(part, values) for part in value.args), **dict(value.kwargs))
    return value


def band(analysis: Analysis, query: int, key: int) -> Tensor:
    """bool (Lq, Lk): what the operator's mask class shows, from its definition."""
    semantics = Semantics(analysis.mask_class, analysis.window_left, analysis.window_right)
    found = semantics.band(query, key)
    distance = torch.arange(key) - torch.arange(query).unsqueeze(1)
    visible = torch.ones(query, key, dtype=torch.bool)
    if found is not None and found.left is not None:
        visible &= distance - found.offset >= -found.left
    if found is not None and found.right is not None:
        visible &= distance - found.offset <= found.right
    return visible
