"""Sites and reports made by hand, with names that want to be more than text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import fx, nn

from sage_compiler.metrics import EXACT_ERRORS
from sage_compiler.passes.rewrite import LAYER_KEY
from sage_compiler.passes.snapshot import Snapshot
from sage_compiler.policy import LayerPolicy, Policy
from sage_compiler.record import GraphPair, Site
from sage_compiler.report import Report

SITE: Final = Site(
    layer="layers.0#0",
    fingerprint="q2 kv2 d8 dv8 causal",
    form="sdpa",
    q_shape=(1, 2, 6, 8),
    kv_shape=(1, 2, 6, 8),
    heads="2",
    mask="causal",
    proof="is_causal=True: top-left by definition",
    recipe="int8_fp8",
    decision="rewrite",
    reason="because",
    source="model.py:1: attend()",
)

HOSTILE: Final = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "</style><img src=x onerror=alert(3)>",
    "</title></svg><iframe src=javascript:alert(4)>",
    '" onmouseover="alert(5)" x=\'',
    "{{7*7}}{% include 'page.css' %}",
    "]]><!--<script>",
    "&lt;b&gt;&amp;",
    "long" * 2000,
    "\u202emirrored\x00\x1b[31m\ud800",
)


def site(**changes: Any) -> Site:
    """A site that was rewritten, with these changes."""
    return replace(SITE, **changes)


def kept(**changes: Any) -> Site:
    """A site that was kept, with these changes."""
    return replace(SITE, **({"decision": "keep", "recipe": "", "fingerprint": ""} | changes))


def hostile_site(text: str) -> Site:
    """A site that says the same wherever it says anything, and was rewritten."""
    return site(
        layer=text,
        fingerprint=text,
        form=text,
        q_shape=(1, text, 6, 8),
        kv_shape=(text,),
        mask=text,
        proof=text,
        recipe=text,
        reason=text,
        source=text,
        cosine=0.5,
        rel_l1=0.5,
    )


def pair_of(
    sites: Sequence[Site], *, length: int = 1, text: str = "x", shared: Iterable[str] = ()
) -> GraphPair:
    """A graph for these sites: each one a chain of ``length`` nodes, after it a single node.

    Args:
        text: the target of the first node, and the code of all of them.
        shared: names of further inputs that every node of a chain reads.
    """
    before, after = fx.Graph(), fx.Graph()
    nodes = []
    for graph in (before, after):
        inputs = [graph.placeholder(name) for name in shared]
        value = graph.create_node("placeholder", text, name="x")
        for each in sites:
            chain = []
            for _ in range(length if graph is before else 1):
                value = graph.call_function(torch.add, (value, [value, *inputs]))
                value.meta["stack_trace"] = f'  File "{text}", line 1, in forward\n    {text}'
                chain.append(value.name)
            if graph is before:
                nodes.append(tuple(chain))
            else:
                value.meta[LAYER_KEY] = each.layer
        graph.output(value)
    return GraphPair(
        fx.GraphModule(nn.Module(), fx.Graph()), Snapshot(before), Snapshot(after), sites, nodes
    )


def hostile_report() -> Report:
    """Hostile text in every place where a report has text."""
    sites = [hostile_site(text) for text in HOSTILE]
    layers = {
        text: LayerPolicy((text,), ("int8_fp8",), text, ({"int8_fp8": EXACT_ERRORS},))
        for text in HOSTILE
    }
    policies = [Policy(layers, target=text) for text in HOSTILE]
    graphs = [
        pair_of([each], length=3, text=text) for each, text in zip(sites, HOSTILE, strict=True)
    ]
    return Report(sites, graphs, policies)
