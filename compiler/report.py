"""What was rewritten, what was kept, and why: one object, as text, as JSON and as a page."""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Final

from torch import fx

from sage_compiler import files
from sage_compiler.drawing import clip
from sage_compiler.passes.pipeline import Outcome
from sage_compiler.passes.site import AttentionSite, Shape
from sage_compiler.passes.snapshot import Snapshot
from sage_compiler.policy import LayerPolicy, Policy
from sage_compiler.precision import EXACT
from sage_compiler.record import KEEP, REWRITE, GraphPair, Site, plain, shape_text
from sage_compiler.report_diff import ReportDiff, compare_sites
from sage_compiler.text import columns, count, duration
from sage_compiler.verdict import error_text, judge

__all__ = ["KEEP", "REWRITE", "VERSION", "GraphPair", "Report", "ReportDiff", "Site", "describe"]

VERSION: Final = 2  # of the JSON form
_LONGEST_LAYER: Final = 72  # characters of a name in the table of the text


class Report:
    """Every attention found in one or more captured graphs.

    Attributes:
        sites: all of them, in order of capture.
        graphs: before and after of each captured graph.
        policies: those that chose recipes, each once.
    """

    def __init__(
        self,
        sites: Iterable[Site] = (),
        graphs: Iterable[GraphPair] = (),
        policies: Iterable[Policy] = (),
    ) -> None:
        self.sites: list[Site] = list(sites)
        self.graphs: list[GraphPair] = list(graphs)
        self.policies: list[Policy] = list(policies)

    @property
    def rewritten(self) -> list[Site]:
        """The sites that now call sage::attention."""
        return [site for site in self.sites if site.decision == REWRITE]

    @property
    def kept(self) -> list[Site]:
        """The sites left as they were, each with a reason."""
        return [site for site in self.sites if site.decision == KEEP]

    def extend(self, other: Report) -> None:
        """Add the sites, graphs and policies of another report."""
        self.sites.extend(other.sites)
        self.graphs.extend(other.graphs)
        self.policies.extend(each for each in other.policies if each not in self.policies)

    def diff(self, other: Report) -> ReportDiff:
        """What ``other`` has otherwise; sites are matched by layer, in the order they occur in.

        Raises:
            TypeError: ``other`` is no report.
        """
        if not isinstance(other, Report):
            raise TypeError(f"diff() takes a sage.Report; this is {type(other).__name__}")
        return compare_sites(self.sites, other.sites)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, without the graphs; what is no number is None.

        The verdict of a policy is what became of its bound on the model's output, None without one.
        """
        verdicts = [policy.calibration.end_to_end for policy in self.policies]
        return {
            "version": VERSION,
            "graphs": len(self.graphs),
            "rewritten": len(self.rewritten),
            "kept": len(self.kept),
            "policies": [
                {"target": policy.target, "verdict": None if verdict is None else str(verdict)}
                for policy, verdict in zip(self.policies, verdicts, strict=True)
            ],
            "sites": [plain(asdict(site)) for site in self.sites],
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report, without the graphs, as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        files.write(path, f"{text}\n".encode())

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one page for a browser, which loads nothing else: docs/inspection.md.

        Raises:
            OSError: the file cannot be written.
        """
        from sage_compiler.page import render

        page = render(self.sites, self.graphs, self.policies)
        # Half of a surrogate pair, which a name may hold, is shown as its number.
        files.write(path, page.encode(errors="backslashreplace"))

    def __str__(self) -> str:
        found = count(len(self.sites), "attention site")
        graphs = count(len(self.graphs), "graph")
        lines = [
            f"sage: {found} in {graphs}: {len(self.rewritten)} rewritten, {len(self.kept)} kept"
        ]
        lines += judge(self.sites, self.policies).sentences
        lines += _table(self.rewritten, _COLUMNS | (_MEASURED if self.policies else {}))
        return "\n".join(lines + _kept(self.kept))

    def __repr__(self) -> str:
        return f"Report({len(self.rewritten)} rewritten, {len(self.kept)} kept)"


def describe(gm: fx.GraphModule, outcome: Outcome, policy: Policy | None = None) -> Report:
    """The report of one graph, which the passes have just left, deciding by ``policy`` if any."""
    sites, nodes = [], []
    for finding, decision in outcome.findings:
        mask = finding.mask if isinstance(finding, AttentionSite) else None
        interior = finding.interior if isinstance(finding, AttentionSite) else ()
        nodes.append(tuple(node.name for node in (*interior, finding.node)))
        choice = None if policy is None else policy.layers.get(finding.layer)
        if choice is not None and finding.fingerprint not in choice.fingerprints:
            choice = None  # of another layer, which has this name
        errors = None if choice is None or decision.recipe is None else choice.errors
        sites.append(
            Site(
                layer=finding.layer,
                fingerprint=finding.fingerprint,
                form=finding.form,
                q_shape=finding.q_shape,
                kv_shape=finding.kv_shape,
                heads=_heads(finding.q_shape, finding.kv_shape),
                mask=mask.text if mask else "",
                proof=mask.proof if mask else "",
                recipe="/".join(decision.step_recipes) or decision.recipe or "",
                decision=KEEP if decision.recipe is None else REWRITE,
                reason=decision.reason,
                source=finding.source,
                cosine=None if errors is None else errors.cosine,
                rel_l1=None if errors is None else errors.rel_l1,
                seconds=_seconds(choice, decision.recipe),
                exact_seconds=None if choice is None else choice.seconds.get(EXACT),
                rotary=decision.rotary,
            )
        )
    pair = GraphPair(gm, outcome.before, Snapshot(gm.graph), sites, nodes)
    return Report(sites, [pair], [] if policy is None else [policy])


def _seconds(choice: LayerPolicy | None, recipe: str | None) -> float | None:
    """The predicted time of what became of a layer."""
    if choice is None:
        return None
    return choice.seconds.get(EXACT) if recipe is None else choice.predicted_seconds


def _heads(q_shape: Shape, kv_shape: Shape) -> str:
    if len(q_shape) != 4 or len(kv_shape) != 4:
        return ""
    query, key = q_shape[1], kv_shape[1]
    return f"{query}" if query == key else f"{query} over {key}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


# Heading -> the text of a cell.
_COLUMNS: Final[dict[str, Callable[[Site], str]]] = {
    "layer": lambda site: clip(site.layer, _LONGEST_LAYER),
    "query": lambda site: shape_text(site.q_shape),
    "key/value": lambda site: shape_text(site.kv_shape),
    "mask": lambda site: site.mask,
    "recipe": lambda site: site.recipe,
}
# What a policy adds.
_MEASURED: Final[dict[str, Callable[[Site], str]]] = {
    "cosine": lambda site: error_text(site.cosine, 6),
    "rel_l1": lambda site: error_text(site.rel_l1, 4),
    "time": lambda site: _time(site.seconds),
    "exact": lambda site: _time(site.exact_seconds),
}


def _table(sites: list[Site], shown: dict[str, Callable[[Site], str]]) -> list[str]:
    if not sites:
        return []
    rows = [[cell(site) for cell in shown.values()] for site in sites]
    lines = ["rewritten:", *columns([list(shown), *rows], "  ")]
    proofs = Counter((site.mask, site.proof) for site in sites)
    lines += [
        f"  mask {mask}: {proof} ({count(number, 'site')})"
        for (mask, proof), number in proofs.items()
    ]
    reasons = Counter((site.recipe, site.reason) for site in sites)
    lines += [
        f"  recipe {recipe}: {reason} ({count(number, 'site')})"
        for (recipe, reason), number in reasons.items()
    ]
    rotations = Counter(site.rotary for site in sites if site.rotary)
    lines += [
        f"  rotary {rotary} ({count(number, 'site')})" for rotary, number in rotations.items()
    ]
    return lines


def _kept(sites: list[Site]) -> list[str]:
    """Kept sites by what they have in common: form, reason and source."""
    groups: dict[tuple[str, str, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.form, site.reason, site.source), []).append(site)
    lines = []
    for (form, reason, source), members in groups.items():
        lines.append(f"kept, {count(len(members), 'site')} ({form}):")
        lines += textwrap.wrap(reason, 96, initial_indent="  ", subsequent_indent="  ")
        lines += [f"  - {site.layer} {shape_text(site.q_shape)}".rstrip() for site in members]
        if source:
            lines.append(f"  at {source}")
    return lines
