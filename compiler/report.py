"""What was rewritten, what was kept, and why: one object, printed as text or JSON."""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import fx

from sage_compiler.passes.pipeline import Outcome
from sage_compiler.passes.site import AttentionSite, Shape
from sage_compiler.passes.snapshot import Snapshot

VERSION: Final = 1  # of the JSON form
REWRITE: Final = "rewrite"
KEEP: Final = "keep"


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of a compiled graph; every field is text or a tuple of sizes.

    Attributes:
        layer: qualified module name and ordinal, ``encoder.layer.0.attention.self#0``.
        fingerprint: heads, key/value heads, head_dims and mask class, ``q12 kv4 d64 dv64 causal``;
            "" when unknown.
        form: how it was written, e.g. ``sdpa``.
        q_shape: (B, H, Lq, D), symbolic sizes by name; () when unknown.
        kv_shape: (B, Hkv, Lk, Dv).
        heads: ``12`` or, grouped, ``32 over 8``.
        mask: the mask in a few words; proof: why it is that.
        recipe: the operator's recipe; "" when kept.
        decision: "rewrite" or "keep"; reason: why.
        source: ``file:line: code`` that wrote it.
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


class GraphPair:
    """One captured graph before and after rewriting."""

    def __init__(self, root: fx.GraphModule, before: Snapshot, after: Snapshot) -> None:
        self._root = root
        self._before = before
        self._after = after

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
    """

    def __init__(self, sites: Iterable[Site] = (), graphs: Iterable[GraphPair] = ()) -> None:
        self.sites: list[Site] = list(sites)
        self.graphs: list[GraphPair] = list(graphs)

    @property
    def rewritten(self) -> list[Site]:
        """The sites that now call sage::attention."""
        return [site for site in self.sites if site.decision == REWRITE]

    @property
    def kept(self) -> list[Site]:
        """The sites left as they were, each with a reason."""
        return [site for site in self.sites if site.decision == KEEP]

    def extend(self, other: Report) -> None:
        """Add the sites and graphs of another report."""
        self.sites.extend(other.sites)
        self.graphs.extend(other.graphs)

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
        found = _count(len(self.sites), "attention site")
        graphs = _count(len(self.graphs), "graph")
        lines = [
            f"sage: {found} in {graphs}: {len(self.rewritten)} rewritten, {len(self.kept)} kept"
        ]
        lines += _table(self.rewritten)
        return "\n".join(lines + _kept(self.kept))

    def __repr__(self) -> str:
        return f"Report({len(self.rewritten)} rewritten, {len(self.kept)} kept)"


def describe(gm: fx.GraphModule, outcome: Outcome) -> Report:
    """The report of one graph, which the passes have just left."""
    sites = []
    for finding, decision in outcome.findings:
        mask = finding.mask if isinstance(finding, AttentionSite) else None
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
                recipe=decision.recipe or "",
                decision=KEEP if decision.recipe is None else REWRITE,
                reason=decision.reason,
                source=finding.source,
            )
        )
    return Report(sites, [GraphPair(gm, outcome.before, Snapshot(gm.graph))])


def _heads(q_shape: Shape, kv_shape: Shape) -> str:
    if len(q_shape) != 4 or len(kv_shape) != 4:
        return ""
    query, key = q_shape[1], kv_shape[1]
    return f"{query}" if query == key else f"{query} over {key}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
    widths = [max(len(row[at]) for row in (_COLUMNS, *rows)) for at in range(len(_COLUMNS))]

    def line(row: tuple[str, ...]) -> str:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        return ("  " + "  ".join(cells)).rstrip()

    lines = ["rewritten:", line(_COLUMNS), *(line(row) for row in rows)]
    proofs = Counter((site.mask, site.proof) for site in sites)
    lines += [
        f"  mask {mask}: {proof} ({_count(number, 'site')})"
        for (mask, proof), number in proofs.items()
    ]
    reasons = Counter((site.recipe, site.reason) for site in sites)
    lines += [
        f"  recipe {recipe}: {reason} ({_count(number, 'site')})"
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
        lines.append(f"kept, {_count(len(members), 'site')} ({form}):")
        lines += textwrap.wrap(reason, 96, initial_indent="  ", subsequent_indent="  ")
        lines += [
            f"  - {site.layer} {_shape(site.q_shape)}".removesuffix(" ()") for site in members
        ]
        if source:
            lines.append(f"  at {source}")
    return lines
