"""The page of a report: what it says, and that it runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest
import torch

import sage_compiler as sage
from sage_compiler.metrics import EXACT_ERRORS, Errors
from sage_compiler.page.views import MOST_CONTEXT, MOST_NODES
from sage_compiler.policy import Calibration, EndToEnd, LayerPolicy, Policy
from sage_compiler.record import GraphPair, Site
from sage_compiler.report import Report
from tests.compiler.pages import decoder, measured_policy, report_by
from tests.compiler.sites import HOSTILE, hostile_report, kept, pair_of, site

TIMES: Final = "\N{MULTIPLICATION SIGN}"


class Page(HTMLParser):
    """A page as a browser reads it: elements with their attributes, and text by element."""

    def __init__(self, report: Report, folder: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self._open = [""]
        report.to_html(folder / "report.html")
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        data = "".join(text for tag, text in self.text if tag == "script json")
        self.drawings = [ElementTree.fromstring(svg) for svg in json.loads(data)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        data = dict(attrs).get("type") == "application/json"
        self._open.append(f"{tag} json" if data else tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop().partition(" ")[0] != tag:
            pass

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append((self._open[-1], data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The attributes of the elements of this tag that have these ones; ``class_`` is class."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            found
            for name, found in self.elements
            if name == tag and wanted.items() <= found.items()
        ]

    def said(self) -> str:
        """All text that is shown, with one space where there is any."""
        shown = (text for tag, text in self.text if not tag.startswith(("script", "style")))
        return " ".join("".join(shown).split())

    def drawn(self, tag: str, **attributes: str) -> list[ElementTree.Element]:
        """The elements of this tag with these attributes in all drawings."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            found
            for svg in self.drawings
            for found in svg.iter(f"{{http://www.w3.org/2000/svg}}{tag}")
            if wanted.items() <= found.attrib.items()
        ]


LAYER = LayerPolicy(
    ("q2 kv2 d8 dv8 causal",),
    ("int8_fp8",),
    measured=(
        {
            "int8_fp8": Errors(0.9995, 0.0312, 0.1, 0.99, 0.05, 0.9995, 0.0312),
            "int4_fp8": Errors(-1.0, float("inf"), float("inf"), -1.0, float("inf"), -1.0, 1.0),
        },
    ),
    seconds={"exact": 3e-3, "int8_fp8": 2e-3},
)


def test_it_opens_with_the_verdict(tmp_path: Path) -> None:
    verdict = EndToEnd("output_rel_l1", 0.01, 0.9, 0.004, True, 1)
    made = Calibration(end_to_end=verdict, model_seconds={"exact": 0.5, "policy": 0.4})
    policy = Policy({"layers.0#0": LAYER}, target="cpu", calibration=made)
    sites = [
        site(cosine=0.9995, rel_l1=0.0312, seconds=2e-3, exact_seconds=3e-3),
        site(layer="better", cosine=0.9999, rel_l1=0.01, seconds=1e-3, exact_seconds=3e-3),
        kept(layer="other#0"),
    ]
    said = Page(Report(sites, [], [policy]), tmp_path).said()
    assert "2 of 3 attention sites rewritten 0 graphs, policy for cpu" in said
    assert f"Predicted gain of attention 2.00{TIMES} 6 ms exact, 3 ms by the policy" in said
    assert f"Measured gain of the model 1.25{TIMES} 500 ms exact, 400 ms by the policy" in said
    assert "Worst error 0.0312 rel L1 cosine 0.999500, in layers.0#0" in said
    assert f"End to end: {verdict}" in said


@pytest.mark.parametrize("sites", [[], [kept()], [site(recipe="int4_fp8")], [site(layer="other")]])
def test_a_policy_that_is_not_applied_gains_nothing(sites: list[Site], tmp_path: Path) -> None:
    made = Calibration(model_seconds={"exact": 0.5, "policy": 0.4})
    report = Report(sites, [], [Policy({"layers.0#0": LAYER}, target="cpu", calibration=made)])
    said = Page(report, tmp_path).said()
    assert "Predicted gain of attention not predicted" in said
    assert "Measured gain of the model not measured" in said
    assert "times as fast" not in str(report)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (Report(), "0 of 0 attention sites rewritten 0 graphs, no policy"),
        (Report(), "No attention was found."),
        (Report([site()]), "The report has no graph of this site."),
        (Report([site()]), "Predicted gain of attention not predicted"),
        (Report([], [pair_of([])]), "0 of 0 attention sites rewritten 1 graph, no policy"),
        (Report([site()], [], [Policy({}, target="cpu")]), "Worst error not measured"),
        (Report([kept(source="", form="")]), "0 of 1 attention sites rewritten"),
    ],
)
def test_whatever_a_report_lacks_the_page_says(report: Report, words: str, tmp_path: Path) -> None:
    assert words in Page(report, tmp_path).said()


def test_the_table_has_the_values_to_sort_by(tmp_path: Path) -> None:
    sites = [site(cosine=0.9995, rel_l1=0.03125, seconds=2e-3, exact_seconds=3e-3), kept()]
    page = Page(Report(sites), tmp_path)
    values = [cell.get("data-value") for cell in page.all("td", class_="number")]
    assert values == ["0.9995", "0.03125", "0.002", None, None, None]
    assert Counter(cell.get("data-kind") for cell in page.all("th", scope="col")) == {
        "text": 7,
        "number": 3,
    }
    assert [row["data-decision"] for row in page.all("tr") if row] == ["rewrite", "keep"]
    for words in ("is_causal=True: top-left by definition", "0.0312", "2 ms exact 3 ms", "because"):
        assert words in re.sub(r"\s+", " ", page.source.replace("<small>", " ")), words


def test_one_map_of_errors_for_each_range_of_timesteps(tmp_path: Path) -> None:
    measured = (LAYER.measured[0], {"int8_fp8": EXACT_ERRORS})
    layer = LayerPolicy(LAYER.fingerprints, ("exact", "int8_fp8"), measured=measured)
    policy = Policy({"layers.0#0": layer}, target="sm_89", timestep_ranges=2)
    page = Page(Report([site()], [], [policy]), tmp_path)
    assert "outlined cell is the recipe that was chosen; none where exact was" in page.said()
    assert "timestep range 1 of 2" in page.said() and "timestep range 2 of 2" in page.said()
    cells = [found["class"] for tag, found in page.elements if tag == "td" and "class" in found]
    # int4_fp8 and int8_fp8 of the first range, where exact was chosen; int8_fp8 of the second.
    assert [name for name in cells if name and name.startswith("heat-")] == [
        "heat-8",
        "heat-5",
        "heat-0 chosen",
    ]
    assert "inf" in page.said()


def test_a_policy_without_measurements_has_no_map(tmp_path: Path) -> None:
    layer = LayerPolicy(("q2 kv2 d8 dv8 causal",), ("int8_fp8",))
    page = Page(Report([site()], [], [Policy({"layers.0#0": layer}, target="cpu")]), tmp_path)
    assert "Errors by layer" not in page.said()


def test_a_real_model_with_both_graphs_of_every_site(tmp_path: Path) -> None:
    model, x = decoder(2, 64), torch.randn(1, 32, 64)
    report = report_by(model, x, measured_policy(model, x, rel_l1=1.0, ranges=2))
    page = Page(report, tmp_path)
    assert [each.decision for each in report.sites] == ["rewrite", "rewrite", "keep"]
    assert len(page.drawings) == 5  # before and after of two, before of the one that is kept
    said = page.said()
    for words in ("scores.softmax(-1) @ v", "before and after: kept", "masked_fill"):
        assert words in said
    labels = [text.text for text in page.drawn("text")]
    for words in ("sage.attention", ".softmax", "float32 (1, 4, 32, 16)"):
        assert words in labels
    assert len(page.drawn("g", class_="node inserted")) >= 2
    assert len(page.drawn("g", class_="node replaced")) >= 6


def test_a_long_attention_and_its_surroundings_are_cut(tmp_path: Path) -> None:
    sites = [site()]
    many = [f"given{number}" for number in range(50)]
    page = Page(Report(sites, [pair_of(sites, length=500, shared=many)]), tmp_path)
    assert len(page.drawn("g", class_="node replaced")) == MOST_NODES
    around = 50 + 1  # the inputs that all share, and the output
    assert f"{500 - MOST_NODES + around - MOST_CONTEXT} more nodes are not drawn" in page.said()


def test_a_graph_is_built_once_for_all_its_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    graph = GraphPair.graph
    monkeypatch.setattr(
        GraphPair, "graph", lambda self, which: (built.append(which), graph(self, which))[1]
    )
    sites = [site(layer=f"layers.{number}#0") for number in range(20)]
    stranger = pair_of([site()])
    page = Page(Report(sites, [pair_of(sites), stranger]), tmp_path)
    assert built == ["before", "after"]
    assert len(page.drawings) == 40


# --- hostile text ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(hostile_report(), tmp_path_factory.mktemp("hostile"))


def test_hostile_text_makes_no_element_and_no_attribute(hostile: Page, tmp_path: Path) -> None:
    sites = [site(cosine=0.5, rel_l1=0.5)]
    harmless = Page(Report(sites, [pair_of(sites)], [Policy({}, target="cpu")]), tmp_path)
    names = Counter(tag for tag, _ in hostile.elements)
    assert (names["script"], names["style"], names["title"]) == (2, 1, 1)
    assert not {"img", "iframe"} & names.keys()
    # It has maps of errors too, with a legend.
    assert names.keys() - {tag for tag, _ in harmless.elements} <= {"ol"}
    drawn = {element.tag.partition("}")[2] for svg in hostile.drawings for element in svg.iter()}
    assert drawn == {"svg", "g", "rect", "path", "text", "title"}
    for _, attributes in hostile.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert "style" not in attributes


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:20])
def test_hostile_text_is_shown_as_it_is(hostile: Page, text: str) -> None:
    shown = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    # layer, form, mask, proof, recipe, reason, and the lines of code
    assert hostile.said().count(shown) >= 6


def test_nothing_is_loaded(hostile: Page) -> None:
    for tag, attributes in hostile.elements:
        assert "src" not in attributes, tag
        link = attributes.get("href")
        assert link is None or link == "data:," or re.fullmatch(r"#site-\d+", link)
    style = next(text for tag, text in hostile.text if tag == "style")
    assert "url(" not in style and "@import" not in style


def test_the_policy_of_the_page_names_its_script_and_style(hostile: Page) -> None:
    (policy,) = hostile.all("meta", **{"http-equiv": "Content-Security-Policy"})
    for tag in ("script", "style"):
        text = "".join(part for at, part in hostile.text if at == tag)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in str(policy["content"])
    assert str(policy["content"]).startswith("default-src 'none'; ")


def test_it_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    sage.Report().to_html(str(tmp_path / "text.html"))
    assert (tmp_path / "text.html").read_bytes().startswith(b"<!DOCTYPE html>\n<html lang=")
    with pytest.raises(FileNotFoundError):
        Report().to_html(tmp_path / "missing" / "report.html")
