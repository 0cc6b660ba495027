"""What was rewritten, what was kept, and why: one object, printed as text or JSON."""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import fx

from sage_compiler.passes.pipeline import Outcome
from sage_compiler.passes.site import AttentionSite, Shape
from sage_compiler.passes.snapshot import Snapshot
from sage_compiler.policy import LayerPolicy, Policy
from sage_compiler.precision import EXACT
from sage_compiler.text import columns, count

VERSION: Final = 1  # of the JSON form
REWRITE: Final = "rewrite"
KEEP: Final = "keep"


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of a compiled graph; fields are text or tuples of sizes, but for measurements.

    Attributes:
        layer: qualified module name and ordinal, ``encoder.layer.0.attention.self#0``.
        fingerprint: heads, key/value heads, head_dims and mask class, ``q12 kv4 d64 dv64 causal``;
            "" when unknown.
        form: how it was written, e.g. ``sdpa``.
        q_shape: (B, H, Lq, D), symbolic sizes by name; () when unknown.
        kv_shape: (B, Hkv, Lk, Dv).
        heads: ``12`` or, grouped, ``32 over 8``.
        mask: the mask in a few words; proof: why it is that.
        recipe: the operator's recipe, those of the ranges of timesteps by "/" where they differ;
            "" when kept.
        decision: "rewrite" or "keep"; reason: why.
        source: ``file:line: code`` that wrote it.
        cosine, rel_l1: errors of the recipe in calibration, the worst over its inputs; None where
            no policy says.
        seconds, exact_seconds: time of the layer's attention for one input, with the recipe and
            exact, as the policy predicts it; None where no policy says.
    """

    layer: str
    fingerprint: str
    form: str
    q_shape: Shape
    kv_shape: Shape
    heads: str
    mask: str
    proof: str
    recipe: str
    decision: str
    reason: str
    source: str
    cosine: float | None = None
    rel_l1: float | None = None
    seconds: float | None = None
    exact_seconds: float | None = None


class GraphPair:
    """One captured graph before and after rewriting.

    Attributes:
        sites: the attentions of this graph, in its order.
        nodes: for each of them, the names of the nodes of ``before`` that compute it, first to
            last. In ``after``, what was inserted for it has its layer as ``meta["sage_layer"]``.
    """

    def __init__(
        self,
        root: fx.GraphModule,
        before: Snapshot,
        after: Snapshot,
        sites: Sequence[Site],
        nodes: Sequence[tuple[str, ...]],
    ) -> None:
        self._root = root
        self._before = before
        self._after = after
        self.sites = tuple(sites)
        self.nodes = tuple(nodes)

    @property
    def before(self) -> fx.GraphModule:
        """The graph as it was captured."""
        return fx.GraphModule(self._root, self._before.build())

    @property
    def after(self) -> fx.GraphModule:
        """The graph that was handed to Inductor."""
        return fx.GraphModule(self._root, self._after.build())


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

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, without the graphs."""
        return {
            "version": VERSION,
            "graphs": len(self.graphs),
            "rewritten": len(self.rewritten),
            "kept": len(self.kept),
            "sites": [asdict(site) for site in self.sites],
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report, without the graphs, as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, indent=2)
            file.write("\n")

    def __str__(self) -> str:
        found = count(len(self.sites), "attention site")
        graphs = count(len(self.graphs), "graph")
        lines = [
            f"sage: {found} in {graphs}: {len(self.rewritten)} rewritten, {len(self.kept)} kept"
        ]
        lines += _table(self.rewritten)
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


def _shape(shape: Shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


_COLUMNS: Final = ("layer", "query", "key/value", "mask", "recipe")


def _table(sites: list[Site]) -> list[str]:
    if not sites:
        return []
    rows = [
        (site.layer, _shape(site.q_shape), _shape(site.kv_shape), site.mask, site.recipe)
        for site in sites
    ]
    lines = ["rewritten:", *columns([_COLUMNS, *rows], "  ")]
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
        lines += [
            f"  - {site.layer} {_shape(site.q_shape)}".removesuffix(" ()") for site in members
        ]
        if source:
            lines.append(f"  at {source}")
    return lines
