"""Run the model zoo, count what is rewritten, and write docs/model-zoo.md.

    python -m benchmarks.zoo
    python -m benchmarks.zoo --only BERT "nanoGPT" --expect

Every case of tests/zoo runs in eager mode and rewritten with precision="exact"; outputs and
gradients are compared. Beside the rewritten sites stands how many Inductor's own fuse_attention
pass matches: its counter after the passes over the joint graph, without code generation.
With --only, nothing but the table that is printed, and with --expect the rows of
tests/zoo/expectations.txt. A case that fails is printed, is no part of the page, and fails the run.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import logging
import multiprocessing
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers, which reads it once

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx

from benchmarks.measure import Table, shown
from tests.zoo import expectations
from tests.zoo.architecture import SDPA, Architecture
from tests.zoo.harness import (
    CIRCUMSTANCES,
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    PADDED,
    PLAIN,
    Case,
    built,
    cases_of,
    run,
)
from tests.zoo.registry import ARCHITECTURES, BY_NAME, unavailable

PAGE: Final = Path(__file__).parents[1] / "docs" / "model-zoo.md"
COMPARED: Final = (PLAIN, PADDED)  # with Inductor
PACKAGES: Final = ("torch", "transformers", "diffusers", "timm")


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of one case.

    Attributes:
        key: architecture, implementation, circumstances.
        rewritten, kept: numbers of sites.
        reasons: why sites were kept, and how many for each.
        inductor: how many attentions Inductor's pass matched; None where it was not asked.
        failure: what was wrong; "" when nothing was.
    """

    key: expectations.Key
    rewritten: int = 0
    kept: int = 0
    reasons: tuple[tuple[str, int], ...] = ()
    inductor: int | None = None
    failure: str = ""


def fuse_attention_matches(module: nn.Module, arguments: dict[str, Any]) -> int:
    """How many attentions Inductor's fuse_attention pass matches in a module's graphs.

    Inductor runs until the graph would be lowered; caches are off, for they hide matches.
    """

    def stop(gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        compiled = compile_fx(gm, example_inputs, inner_compile=stop)
        assert callable(compiled)
        return compiled

    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), inductor_config.patch(fx_graph_cache=False):
        torch.compile(lambda given: module(**given), backend=backend)(copy.deepcopy(arguments))
    return counters["inductor"]["fuse_attention"]


def measure(case: Case) -> Measured:
    """Run one case."""
    key = expectations.key_of(case)
    try:
        result = run(case)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        return Measured(key, failure=f"{type(error).__name__}: {error}".partition("\n")[0])
    report = result.report
    inductor = None
    if case.circumstances in COMPARED:
        inputs = case.architecture.inputs(case.padded)
        inductor = fuse_attention_matches(built(case), inputs)
    failures = []
    if result.output_error > OUTPUT_TOLERANCE:
        failures.append(f"outputs differ by {result.output_error:.1e}")
    if result.gradient_error > GRADIENT_TOLERANCE:
        failures.append(f"gradients differ by {result.gradient_error:.1e}")
    if result.with_us != result.without_us:
        failures.append("other graph breaks than without the passes")
    if not all(site.reason for site in report.kept):
        failures.append("a site is kept without a reason")
    return Measured(
        key,
        rewritten=len(report.rewritten),
        kept=len(report.kept),
        reasons=tuple(Counter(site.reason for site in report.kept).items()),
        inductor=inductor,
        failure="; ".join(failures),
    )


def measure_all(name: str, circumstances: Sequence[str]) -> list[Measured]:
    """All cases of one architecture, in these circumstances."""
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    cases = cases_of(BY_NAME[name])
    return [measure(case) for case in cases if case.circumstances in circumstances]


# --- the page -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture and implementation with its cases, by circumstances."""

    architecture: Architecture
    implementation: str
    cases: dict[str, Measured]

    def total(self, what: Callable[[Measured], int]) -> int:
        """A number summed over the cases that are compared with Inductor."""
        return sum(what(self.cases[each]) for each in COMPARED if each in self.cases)

    @property
    def true_sites(self) -> int:
        return self.total(lambda case: self.architecture.true_sites)

    @property
    def rewritten(self) -> int:
        return self.total(lambda case: case.rewritten)

    @property
    def inductor(self) -> int:
        return self.total(lambda case: case.inductor or 0)

    def cells(self) -> list[str]:
        """The cells of the page's table."""
        entry = self.architecture
        counts = [
            f"{case.rewritten} of {case.rewritten + case.kept}" if case else ""
            for case in (self.cases.get(each) for each in CIRCUMSTANCES)
        ]
        matches = [
            "" if case is None else str(case.inductor)
            for case in (self.cases.get(each) for each in COMPARED)
        ]
        return [
            entry.name,
            self.implementation,
            str(entry.true_sites),
            *counts,
            *matches,
            self.why(),
        ]

    def why(self) -> str:
        """The reasons of the plain cases, with the circumstances of those that are only there."""
        seen: dict[str, str] = {}
        for circumstances, case in self.cases.items():
            for reason, _ in case.reasons:
                seen.setdefault(reason, "" if circumstances == PLAIN else f"{circumstances}: ")
        reasons = [f"{where}{reason}" for reason, where in seen.items()]
        notes = [f"*{text}*" for text in (self.architecture.note, self.architecture.keeps) if text]
        return "; ".join(notes + reasons).replace("|", "\\|")


def rows_of(measured: Iterable[Measured]) -> list[Row]:
    """The cases that nothing was wrong with, by architecture and implementation."""
    found: dict[tuple[str, str], dict[str, Measured]] = {}
    for case in measured:
        if not case.failure:
            name, implementation, circumstances = case.key
            found.setdefault((name, implementation), {})[circumstances] = case
    return [
        Row(BY_NAME[name], implementation, cases) for (name, implementation), cases in found.items()
    ]


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def summary(rows: Sequence[Row]) -> list[str]:
    """Totals by family; Inductor's part is of what is not scaled_dot_product_attention already."""

    def line(title: str, members: Sequence[Row]) -> list[str]:
        true, ours = (sum(row.true_sites for row in members), sum(row.rewritten for row in members))
        written = [row for row in members if row.implementation != SDPA]
        chains = sum(row.true_sites for row in written)
        caught, inductor = (
            sum(row.rewritten for row in written),
            sum(row.inductor for row in written),
        )
        number = len({row.architecture.name for row in members})
        return [
            title,
            str(number),
            f"{ours} of {true}",
            percent(ours, true),
            f"{caught} of {chains}",
            f"{inductor} of {chains}",
        ]

    families = itertools.groupby(rows, key=lambda row: row.architecture.family)
    lines = [line(family, list(members)) for family, members in families]
    titles = (
        "family",
        "architectures",
        "true sites rewritten",
        "",
        "of these not written as SDPA",
        "Inductor matches",
    )
    return table(titles, [*lines, line("**all**", rows)])


def versions() -> str:
    """The versions that the numbers belong to."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


HEAD: Final = """\
# The model zoo

Which attention of which models is rewritten, counted by running them. Written by
`python -m benchmarks.zoo`; `tests/zoo` asserts each number.

Each architecture is a tiny random configuration (a few layers, width about 32) of the library's own
code. A case runs it in eager mode and rewritten with `precision="exact"`, and compares: outputs to
1e-5 and, in training mode without dropout, the gradients of all parameters to 1e-4, both relative
to max(1, largest value), in float32. Graph breaks must be those of the model without the backend.
Weights are drawn so that attention is sharp: a scale that is wrong by 5 % fails every model.

- **true sites** are softmax attentions that one forward executes, found by reading the model;
  softmaxes of routers, classifiers and the like are none, and must be kept.
- A cell says *rewritten of found*: found are all softmaxes and attention calls of the captured
  graphs. `dynamic` is `torch.compile(dynamic=True)`; with a cache, a prompt and four single tokens
  are decoded, in as many graphs as Dynamo makes of them.
- **Inductor** is how many of the same sites its own `fuse_attention` pass matches: its counter
  after the passes over the joint graph. Calls of `scaled_dot_product_attention` it takes as they
  are.
- Totals count the plain and the padded cases.
"""


def page(rows: Sequence[Row], skipped: Sequence[Architecture]) -> str:
    """docs/model-zoo.md."""
    lines = [HEAD, f"Versions: {versions()}.", "", "## Totals", "", *summary(rows)]
    titles = (
        "architecture",
        "attention",
        "true sites",
        *CIRCUMSTANCES,
        "Inductor",
        "Inductor, padded",
        "*notes*, and why sites are kept",
    )
    for family, members in itertools.groupby(rows, key=lambda row: row.architecture.family):
        lines += ["", f"## {family}", "", *table(titles, (row.cells() for row in members))]
    if skipped:
        lines += ["", "## Not run", ""]
        lines += [f"- {entry.name}: {unavailable(entry)}" for entry in skipped]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=tuple(BY_NAME), metavar="NAME", help="these; no page")
    add("--circumstances", nargs="+", choices=CIRCUMSTANCES, default=CIRCUMSTANCES)
    add("--expect", action="store_true", help="write tests/zoo/expectations.txt too")
    add("--page", type=Path, default=PAGE)
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args(argv)

    chosen = [BY_NAME[name] for name in arguments.only] if arguments.only else ARCHITECTURES
    skipped = [entry for entry in chosen if unavailable(entry)]
    names = [entry.name for entry in chosen if not unavailable(entry)]
    measured: list[Measured] = []
    printed = Table(architecture=34, attention=0, circumstances=14, rewritten=0, kept=4, Inductor=0)
    # Spawned: what one process has compiled is no concern of another's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context) as pool:
        every = itertools.repeat(arguments.circumstances)
        for found in pool.map(measure_all, names, every):
            measured += found
            for case in found:
                inductor = "" if case.inductor is None else str(case.inductor)
                printed.print_row(*case.key, str(case.rewritten), str(case.kept), inductor)
    failures = [case for case in measured if case.failure]
    for case in failures:
        print(f"FAILED: {', '.join(case.key)}: {case.failure}")
    if arguments.expect:
        counts = {case.key: (case.rewritten, case.kept) for case in measured if not case.failure}
        expectations.write((expectations.read() if expectations.PATH.exists() else {}) | counts)
        print(f"written: {shown(expectations.PATH)}")
    if not arguments.only and not failures:
        arguments.page.write_text(page(rows_of(measured), skipped), encoding="utf-8")
        print(f"written: {shown(arguments.page)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
