"""Each site with what the page shows of it: source lines, and its part of the graph, drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from torch import fx

from sage_compiler.drawing import draw
from sage_compiler.passes.normalize import source_of
from sage_compiler.passes.rewrite import LAYER_KEY
from sage_compiler.record import AFTER, BEFORE, GraphPair, Site

MOST_NODES: Final = 60  # of one attention that are drawn
MOST_CONTEXT: Final = 12  # of the nodes around it


@dataclass(frozen=True, slots=True)
class Drawing:
    """A part of a graph.

    Attributes:
        svg: the drawing, as XML.
        omitted: how many nodes it lacks, because it would be too large.
        source: the lines that wrote its nodes, ``file:line: code``, each once.
    """

    svg: str
    omitted: int
    source: list[str]


@dataclass(frozen=True, slots=True)
class SiteView:
    """A site and its drawings; None where the report has no graph of it, or nothing changed."""

    site: Site
    before: Drawing | None
    after: Drawing | None

    @property
    def drawings(self) -> list[Drawing]:
        """Those that there are."""
        return [each for each in (self.before, self.after) if each is not None]


def view_sites(sites: Sequence[Site], graphs: Sequence[GraphPair]) -> list[SiteView]:
    """All sites, in order. A graph is built once, however many sites it has."""
    drawn: dict[int, tuple[Drawing | None, Drawing | None]] = {}  # by identity of the site
    wanted = {id(site) for site in sites}
    for pair in graphs:
        if wanted.isdisjoint(map(id, pair.sites)):
            continue
        before, after = _Graph(pair.graph(BEFORE)), _Graph(pair.graph(AFTER))
        for site, names in zip(pair.sites, pair.nodes, strict=True):
            replaced = [before.by_name[name] for name in names]
            inserted = after.by_layer[site.layer]
            drawn[id(site)] = (
                before.draw(replaced, "replaced", f"{site.layer} before"),
                after.draw(inserted, "inserted", f"{site.layer} after"),
            )
    return [SiteView(site, *drawn.get(id(site), (None, None))) for site in sites]


class _Graph:
    """A graph, with its nodes by name and by the layer they were inserted for."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph  # which its nodes do not keep alive
        self.position = {node: at for at, node in enumerate(graph.nodes)}
        self.by_name = {node.name: node for node in graph.nodes}
        self.by_layer: defaultdict[str, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if LAYER_KEY in node.meta:
                self.by_layer[node.meta[LAYER_KEY]].append(node)

    def draw(self, nodes: Sequence[fx.Node], kind: str, title: str) -> Drawing | None:
        """The nodes with what they read and what reads them; None where there are none."""
        if not nodes:
            return None
        # The last ones: there is the softmax, and what comes out.
        shown = list(nodes)[-MOST_NODES:]
        around = _neighbors(shown, set(nodes))
        context = around[:MOST_CONTEXT]
        kinds = {node.name: "context" for node in context} | {node.name: kind for node in shown}
        ordered = sorted([*shown, *context], key=self.position.__getitem__)
        return Drawing(
            svg=ElementTree.tostring(draw(ordered, kinds, title), encoding="unicode"),
            omitted=len(nodes) - len(shown) + len(around) - len(context),
            source=[text for text in dict.fromkeys(map(source_of, nodes)) if text],
        )


def _neighbors(nodes: Sequence[fx.Node], inside: Collection[fx.Node]) -> list[fx.Node]:
    """Producers, then consumers, each once."""
    producers = [source for node in nodes for source in node.all_input_nodes]
    consumers = [user for node in reversed(nodes) for user in node.users]
    return [each for each in dict.fromkeys([*producers, *consumers]) if each not in inside]
