"""The passes in order: detect, decide, rewrite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from sage_compiler.errors import RewriteError
from sage_compiler.passes.detect import detect
from sage_compiler.passes.rewrite import Replacement, rewrite
from sage_compiler.passes.rotary import Rotation, find_rotation
from sage_compiler.passes.site import AttentionSite, Finding
from sage_compiler.passes.snapshot import Snapshot
from sage_compiler.passes.walk import Walk


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one proved site.

    Attributes:
        recipe: the operator's recipe; None keeps the site as it is.
        reason: why, in one sentence.
        min_seq_len: the operator's run-time gate where lengths are not known; 0: none, -1: that
            of its kernel.
        step_recipes: by range of timesteps, where ``recipe`` is not the same in all of them;
            ``step_index`` is the tensor that holds the range at run time.
        guard: the operator's guard, "" for none.
        fuses_rotary: whether the kernel that serves the site rotates query and key itself, so that
            a rotary embedding in the graph is handed to it.
        rotary: what became of it, in a few words; "" where there is none. The passes say it.
    """

    recipe: str | None
    reason: str
    min_seq_len: int = 0
    step_index: Tensor | None = None
    step_recipes: tuple[str, ...] = ()
    guard: str = ""
    fuses_rotary: bool = False
    rotary: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the passes did.

    Attributes:
        findings: every attention in graph order, with its decision.
        before: the graph as it was.
    """

    findings: list[tuple[Finding, Decision]]
    before: Snapshot


def run(
    gm: fx.GraphModule,
    decide: Callable[[AttentionSite], Decision],
    accept: Callable[[Sequence[AttentionSite]], None] = lambda sites: None,
) -> Outcome:
    """Find every attention of ``gm``, decide on each, and rewrite its graph in place.

    ``accept``, which sees all proved sites at once, and ``decide`` may raise to refuse the whole
    graph; then nothing has happened. A rewrite that fails its checks is taken back, and the reasons
    say so.
    """
    before = Snapshot(gm.graph)
    findings = detect(gm)
    accept([finding for finding in findings if isinstance(finding, AttentionSite)])
    decided: list[tuple[Finding, Decision]] = [
        (finding, decide(finding))
        if isinstance(finding, AttentionSite)
        else (finding, Decision(None, finding.reason))
        for finding in findings
    ]
    rotations = _find_rotations(gm.graph, decided)
    decided = [
        (finding, replace(decision, rotary=rotations[finding][1]))
        if isinstance(finding, AttentionSite) and finding in rotations
        else (finding, decision)
        for finding, decision in decided
    ]
    replacements = [
        Replacement(
            finding,
            decision.recipe,
            decision.min_seq_len,
            step_index=decision.step_index,
            step_recipes=decision.step_recipes,
            guard=decision.guard,
            rotation=rotations[finding][0] if finding in rotations else None,
        )
        for finding, decision in decided
        if isinstance(finding, AttentionSite) and decision.recipe is not None
    ]
    if not replacements:
        return Outcome(decided, before)
    try:
        with _taken_back_on_failure(gm, before):
            failures = rewrite(gm.graph, replacements)
    except RewriteError as error:
        failures = {replacement.site: str(error) for replacement in replacements}
    checked: list[tuple[Finding, Decision]] = [
        (finding, Decision(None, failures[finding]))
        if isinstance(finding, AttentionSite) and finding in failures
        else (finding, decision)
        for finding, decision in decided
    ]
    return Outcome(checked, before)


def _find_rotations(
    graph: fx.Graph, decided: Sequence[tuple[Finding, Decision]]
) -> dict[AttentionSite, tuple[Rotation | None, str]]:
    """What ``find_rotation`` says of the sites whose kernel rotates."""
    sites = [
        finding
        for finding, decision in decided
        if isinstance(finding, AttentionSite) and decision.recipe and decision.fuses_rotary
    ]
    if not sites:
        return {}
    walk = Walk(graph)
    return {site: find_rotation(site, walk) for site in sites}


@contextlib.contextmanager
def _taken_back_on_failure(gm: fx.GraphModule, before: Snapshot) -> Iterator[None]:
    """Return the graph to what it was when the block raises."""
    with contextlib.ExitStack() as undo:
        undo.callback(lambda: setattr(gm, "graph", before.build()))
        yield
        undo.pop_all()
