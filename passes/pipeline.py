"""The passes in order: detect, decide, rewrite. One call, no side effect on the input graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from sage_compiler.errors import RewriteError
from sage_compiler.passes.detect import detect
from sage_compiler.passes.rewrite import Replacement, rewrite
from sage_compiler.passes.site import AttentionSite, Finding


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one proved site.

    Attributes:
        recipe: the operator's recipe; None keeps the site as it is.
        reason: why, in one sentence.
        min_seq_len: the operator's run-time gate where lengths are not known; 0: none.
    """

    recipe: str | None
    reason: str
    min_seq_len: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Findings in graph order, each with its decision, and the graph to compile."""

    findings: list[tuple[Finding, Decision]]
    graph: fx.Graph


def run(gm: fx.GraphModule, decide: Callable[[AttentionSite], Decision]) -> Outcome:
    """Find every attention of ``gm``, decide on each, and rewrite a copy of its graph.

    ``decide`` may raise to refuse the whole graph; then nothing has happened. A rewrite that
    fails its checks leaves the original graph and says so in the reasons.
    """
    found = detect(gm)
    decided: list[tuple[Finding, Decision]] = [
        (finding, decide(finding))
        if isinstance(finding, AttentionSite)
        else (finding, Decision(None, finding.reason))
        for finding in found
    ]
    replacements = [
        Replacement(finding, decision.recipe, decision.min_seq_len)
        for finding, decision in decided
        if isinstance(finding, AttentionSite) and decision.recipe is not None
    ]
    if not replacements:
        return Outcome(decided, gm.graph)
    try:
        graph, failures = rewrite(gm.graph, replacements)
    except RewriteError as error:
        kept: list[tuple[Finding, Decision]] = [
            (finding, Decision(None, f"not rewritten: {error}")) for finding, _ in decided
        ]
        return Outcome(kept, gm.graph)
    checked: list[tuple[Finding, Decision]] = [
        (finding, Decision(None, failures[finding]))
        if isinstance(finding, AttentionSite) and finding in failures
        else (finding, decision)
        for finding, decision in decided
    ]
    return Outcome(checked, graph)
