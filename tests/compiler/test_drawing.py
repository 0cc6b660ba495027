"""Drawings of graphs: all nodes, none on another, edges from top to bottom, valid XML."""

import random
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import fx, nn

from sage_compiler.drawing import draw, operation_text, value_text
from sage_compiler.drawing.layout import BOX_GAP, LONGEST_EDGE, arrange, levels
from sage_compiler.errors import InvalidOptionError
from sage_compiler.record import GraphPair
from tests.capture import rewritten
from tests.compiler.pages import decoder
from tests.compiler.sites import HOSTILE, pair_of, site

SVG = "{http://www.w3.org/2000/svg}"


def random_graph(nodes: int, seed: int) -> list[list[int]]:
    """For each node, up to three of the ten before it."""
    draw = random.Random(seed)
    return [
        sorted(draw.sample(range(max(0, node - 10), node), draw.randint(0, min(3, node))))
        for node in range(nodes)
    ]


def test_levels_follow_the_edges_and_inputs_stay_close_to_their_use() -> None:
    #        x   y     z   late   sum
    assert levels([[], [0], [1], [], [2, 3]]) == [0, 1, 2, 2, 3]
    assert levels([]) == [] and levels([[], []]) == [0, 0]
    for seed in range(20):
        inputs = random_graph(40, seed)
        found = levels(inputs)
        for node, sources in enumerate(inputs):
            assert all(found[source] < found[node] for source in sources)


@pytest.mark.parametrize("seed", range(10))
def test_boxes_do_not_overlap_and_edges_run_down(seed: int) -> None:
    inputs = random_graph(40, seed)
    sizes = [(20.0 + 7 * (node % 5), 30.0 + node % 3) for node in range(40)]
    layout = arrange(sizes, inputs, levels(inputs))
    assert [(box.width, box.height) for box in layout.boxes] == sizes
    for one, other in combinations(layout.boxes, 2):
        apart = (one.width + other.width) / 2 + BOX_GAP
        assert one.y != other.y or abs(one.x - other.x) >= apart - 1e-6
    for path in layout.paths:
        assert all(upper.y < lower.y for upper, lower in pairwise(path))
    assert len(layout.paths) == sum(map(len, inputs))
    for box in layout.boxes:
        assert box.x - box.width / 2 >= -1e-6 and box.x + box.width / 2 <= layout.width + 1e-6
        assert box.y >= 0 and box.y + box.height <= layout.height


def test_what_a_straight_chain_is_drawn_as() -> None:
    layout = arrange([(50.0, 20.0)] * 3, [[], [0], [1]], [0, 1, 2])
    assert len({box.x for box in layout.boxes}) == 1 and layout.width == 50


def labels(svg: ElementTree.Element) -> list[list[str]]:
    return [[str(text.text) for text in group.iter("text")] for group in svg.iter("g")]


def test_an_edge_too_long_to_follow_is_named() -> None:
    graph = fx.Graph()
    value = x = graph.placeholder("x")
    for _ in range(LONGEST_EDGE + 1):
        value = graph.call_function(torch.relu, (value,))
    value = graph.call_function(torch.add, (value, x))
    lines = labels(draw(list(graph.nodes), {}, "chain"))
    assert lines[-1] == ["add", "add", "\N{LEFTWARDS ARROW} x"]
    assert lines[-2] == [f"relu_{LONGEST_EDGE}", "relu"]


def test_what_nodes_are_called() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    calls: list[tuple[fx.Node, str]] = [
        (x, "placeholder"),
        (graph.get_attr("a.b"), "get_attr a.b"),
        (graph.call_method("chunk", (x, 3)), ".chunk"),
        (graph.call_function(torch.ops.aten.clone.default, (x,)), "aten.clone"),
        (graph.call_function(torch.ops.aten.add.Tensor, (x, x)), "aten.add.Tensor"),
        (graph.output(x), "output"),
    ]
    assert [operation_text(node) for node, _ in calls] == [text for _, text in calls]
    values: list[tuple[Any, str]] = [
        (torch.zeros(2, 3, dtype=torch.bfloat16), "bfloat16 (2, 3)"),
        ((1, 2), "tuple"),
        (7, "7"),
        (None, ""),
    ]
    for value, text in values:
        x.meta["val"] = value
        assert value_text(x) == text


# --- whole graphs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> GraphPair:
    with torch.no_grad():
        _, report = rewritten(decoder(2, 64), torch.randn(1, 32, 64), precision="exact")
    return report.graphs[0]


@pytest.mark.parametrize(("which", "kind"), [("before", "replaced"), ("after", "inserted")])
def test_a_whole_graph(pair: GraphPair, which: str, kind: str, tmp_path: Path) -> None:
    pair.to_svg(tmp_path / "graph.svg", which)
    root = ElementTree.parse(tmp_path / "graph.svg").getroot()
    assert root.tag == f"{SVG}svg" and root[0].tag == f"{SVG}style"
    groups = list(root.iter(f"{SVG}g"))
    graph = pair.graph(which)
    names = [str(next(group.iter(f"{SVG}title")).text).partition("\n")[0] for group in groups]
    assert names == [node.name for node in graph.nodes]
    classes = [group.get("class") for group in groups]
    found = {name for name, each in zip(names, classes, strict=True) if each == f"node {kind}"}
    if which == "before":
        assert found == {name for nodes in pair.nodes for name in nodes}
    else:
        assert found == {node.name for node in graph.nodes if "sage_layer" in node.meta}


def test_after_is_what_is_drawn_unless_asked(pair: GraphPair, tmp_path: Path) -> None:
    pair.to_svg(tmp_path / "asked.svg", which="after")
    pair.to_svg(tmp_path / "default.svg")
    assert (tmp_path / "asked.svg").read_bytes() == (tmp_path / "default.svg").read_bytes()


def test_another_graph_is_refused(pair: GraphPair, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"which='during'; known: 'before', 'after'"):
        pair.to_svg(tmp_path / "graph.svg", "during")
    assert not list(tmp_path.iterdir())


def test_graphs_print_as_code(pair: GraphPair) -> None:
    assert "torch.ops.sage.attention.default(" in pair.after.print_readable(print_output=False)
    assert "scaled_dot_product_attention(" in pair.before.print_readable(print_output=False)


def test_thousands_of_nodes(tmp_path: Path) -> None:
    shared = [f"given{number}" for number in range(20)]
    pair_of([site()], length=5000, shared=shared).to_svg(tmp_path / "graph.svg", "before")
    root = ElementTree.parse(tmp_path / "graph.svg").getroot()
    assert len(list(root.iter(f"{SVG}g"))) == 5022
    assert (tmp_path / "graph.svg").stat().st_size < 10 << 20


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:20])
def test_hostile_text_is_text(text: str, tmp_path: Path) -> None:
    pair_of([site(layer=text)], text=text).to_svg(tmp_path / "graph.svg", "before")
    root = ElementTree.parse(tmp_path / "graph.svg").getroot()
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        *("svg", "style", "g", "path", "rect", "text", "title")
    }
    first = next(root.iter(f"{SVG}title")).text
    assert first is not None and first.startswith("x\nplaceholder ")
    if text.isprintable():
        assert first == f"x\nplaceholder {text}"


def test_an_empty_graph(tmp_path: Path) -> None:
    assert labels(draw([], {}, "empty")) == []
    graph = fx.symbolic_trace(nn.Identity()).graph
    assert len(labels(draw(list(graph.nodes), {}, "identity"))) == 2
