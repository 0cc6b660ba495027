"""A report as one page: everything in the file, nothing loaded, nothing trusted.

All names, reasons and code come from users; Jinja escapes them, also in the JSON of the drawings.
The page's policy names the hashes of its script and stylesheet, so that a browser would run nothing
else even if it got through.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sage_compiler.drawing import stylesheet
from sage_compiler.page.heat import STEPS, heat_maps
from sage_compiler.page.views import view_sites
from sage_compiler.policy import Policy
from sage_compiler.record import KEEP, REWRITE, GraphPair, Site, shape_text
from sage_compiler.text import count, duration
from sage_compiler.verdict import error_text, judge


def render(sites: Sequence[Site], graphs: Sequence[GraphPair], policies: Sequence[Policy]) -> str:
    """The page of a report.

    Args:
        sites: all of them; those of ``graphs`` are drawn.
        graphs: before and after of the captured graphs.
        policies: those that chose recipes.
    """
    environment = Environment(
        loader=PackageLoader(__name__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shape": shape_text, "duration": duration, "error": error_text}
    views = view_sites(sites, graphs)
    # A browser reads a string of JSON far faster than the elements that it stands for: drawings
    # become elements when somebody opens them.
    drawings = dict.fromkeys(each.svg for view in views for each in view.drawings)
    style, script = stylesheet() + _resource("page.css"), _resource("page.js")
    return environment.get_template("page.html.jinja").render(
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        verdict=judge(sites, policies),
        graphs=count(len(graphs), "graph"),
        targets=", ".join(dict.fromkeys(policy.target for policy in policies)),
        decisions=(REWRITE, KEEP),
        sites=views,
        drawings=list(drawings),
        number_of={svg: number for number, svg in enumerate(drawings)},
        heat_maps=[each for policy in policies for each in heat_maps(policy)],
        heat_steps=STEPS,
    )


def _resource(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline script or stylesheet."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
