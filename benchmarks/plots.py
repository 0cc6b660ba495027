"""The pictures of the benchmarks' results. Needs matplotlib: the extra ``bench``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")  # files only, no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.measure import describe, machine, shown
from benchmarks.presets import LEAST_RATIO, LONG_ENOUGH, MOST_ADDED

Row = dict[str, Any]

STYLES: Final = {"float32": "-", "bfloat16": "--", "float16": ":"}
PASS, FAIL = "tab:blue", "tab:red"


def plot_kernels(kind: str, rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of benchmarks/kernels.py, as suits the preset, into a PNG."""
    match kind:
        case "grid":
            figure = _grid(rows)
        case "decode":
            figure = _decode(rows)
        case "recipes":
            figure = _recipes(rows)
        case _:
            figure = _lengths(rows)
    _finish(figure, path)


def values(rows: Iterable[Row], field: str) -> list[Any]:
    """The distinct values of a field, in order of appearance."""
    return list(dict.fromkeys(row[field] for row in rows))


def where(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def _panels(count_rows: int, count_columns: int) -> tuple[Figure, Any]:
    size = (1.5 + 4.6 * count_columns, 1.0 + 3.4 * count_rows)
    figure, axes = plt.subplots(
        count_rows, count_columns, figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    return figure, axes


def _finish(figure: Figure, path: Path) -> None:
    figure.text(0.005, -0.02, describe(machine()), fontsize=7, color="gray")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    print(f"written: {shown(path)}")


def _baseline(axes: Axes, label: str) -> None:
    axes.axhline(1.0, color="black", linewidth=1)
    axes.annotate(label, (0.01, 1.0), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    axes.grid(alpha=0.3)


def _powers_of_two(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _logarithmic(axes: Axes) -> None:
    """Twice as fast as far from 1 as half as fast."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _line(axes: Axes, rows: Sequence[Row], x: str, label: str, **style: Any) -> None:
    """Medians of the ratio as a line, from the 10th to the 90th percentile as bars."""
    rows = sorted(rows, key=lambda row: row[x])
    ratios = [row["ratio"] for row in rows]
    below = [row["ratio"] - row["ratio_p10"] for row in rows]
    above = [row["ratio_p90"] - row["ratio"] for row in rows]
    at = [row[x] for row in rows]
    axes.errorbar(at, ratios, [below, above], label=label, capsize=2, marker="o", ms=4, **style)


def _lengths(rows: Sequence[Row]) -> Figure:
    """The ratio over the length: a panel for each head_dim and number of threads."""
    head_dims, threads = values(rows, "head_dim"), values(rows, "threads")
    lines = list(dict.fromkeys((row["mask"], row["precision"]) for row in rows))
    several = len(values(rows, "precision")) > 1
    figure, panels = _panels(len(head_dims), len(threads))
    for i, head_dim in enumerate(head_dims):
        for j, count in enumerate(threads):
            axes, cells = panels[i][j], where(rows, head_dim=head_dim, threads=count)
            for color, (mask, precision) in enumerate(lines):
                for dtype in values(cells, "dtype"):
                    found = where(cells, mask=mask, precision=precision, dtype=dtype)
                    name = "full" if mask == "none" else mask
                    label = f"{name}, {dtype}" + (f", {precision}" if several else "")
                    _line(axes, found, "kv_len", label, color=f"C{color}", ls=STYLES[dtype])
            _baseline(axes, "SDPA, same dtype")
            _powers_of_two(axes, sorted(values(cells, "kv_len")))
            axes.set_ylim(bottom=0)
            axes.set_title(f"head_dim {head_dim}, {count} thread{'s' if count > 1 else ''}")
            axes.set_xlabel("length of query and keys")
            if j == 0:
                axes.set_ylabel("times faster than SDPA")
    title = " and ".join(values(rows, "precision"))
    figure.suptitle(f"Quantized attention ({title}) against scaled_dot_product_attention")
    _legend(figure, panels)
    return figure


def _legend(figure: Figure, panels: Any) -> None:
    handles = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", fontsize=8, handlelength=4
    )


def _grid(rows: Sequence[Row]) -> Figure:
    """Every cell as a point: how long SDPA takes, and how many times faster ours is."""
    figure, panels = _panels(1, len(values(rows, "dtype")))
    for axes, dtype in zip(panels[0], values(rows, "dtype"), strict=True):
        for kernel in ("sdpa", "quantized"):
            for outcome in (True, False):
                found = [
                    row
                    for row in where(rows, dtype=dtype, passed=outcome)
                    if (row["kernel"] == "sdpa") == (kernel == "sdpa")
                ]
                axes.scatter(
                    [row["sdpa_us"] for row in found],
                    [row["ratio"] for row in found],
                    s=14,
                    marker="x" if kernel == "sdpa" else "o",
                    color=PASS if outcome else FAIL,
                    label=f"{'left to SDPA' if kernel == 'sdpa' else 'quantized'}, "
                    f"{'pass' if outcome else 'FAIL'} ({len(found)})",
                )
        shortest, longest = (f(row["sdpa_us"] for row in rows) for f in (min, max))
        times = [shortest * (LONG_ENOUGH / shortest) ** (i / 50) for i in range(51)]
        limit = [time / (time + MOST_ADDED) for time in times]
        times, limit = [*times, LONG_ENOUGH, longest], [*limit, LEAST_RATIO, LEAST_RATIO]
        axes.plot(times, limit, color="gray", lw=1, label="the limit")
        _baseline(axes, "")
        axes.set_xscale("log")
        _logarithmic(axes)
        axes.set_title(dtype)
        axes.set_xlabel("time of SDPA, us")
        axes.legend(fontsize=7, loc="lower right")
    panels[0][0].set_ylabel("times faster than SDPA")
    figure.suptitle("Never slower: precision 'auto' over lengths, shapes and masks")
    return figure


def _decode(rows: Sequence[Row]) -> Figure:
    """The ratio over the context: a panel for each head layout and number of threads."""
    layouts = list(dict.fromkeys((r["heads"], r["kv_heads"], r["head_dim"]) for r in rows))
    threads = values(rows, "threads")
    figure, panels = _panels(len(threads), len(layouts))
    for i, count in enumerate(threads):
        for j, (heads, kv_heads, head_dim) in enumerate(layouts):
            axes = panels[i][j]
            cells = where(rows, threads=count, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
            for color, dtype in enumerate(values(cells, "dtype")):
                found = where(cells, dtype=dtype)
                _line(axes, found, "kv_len", f"{dtype}: attend", color=f"C{color}")
                axes.plot(
                    [row["kv_len"] for row in found],
                    [row["step_ratio"] for row in found],
                    color=f"C{color}",
                    ls=":",
                    label=f"{dtype}: append and attend,\nSDPA's best form",
                )
            _baseline(axes, "SDPA, same dtype")
            _powers_of_two(axes, sorted(values(cells, "kv_len")))
            _logarithmic(axes)
            axes.set_title(f"H={heads}/{kv_heads}, D={head_dim}, {count} thread(s)")
            axes.set_xlabel("tokens of context")
            if j == 0:
                axes.set_ylabel("times faster than SDPA")
    figure.suptitle("Decoding one token: packed INT8 keys and values against SDPA")
    _legend(figure, panels)
    return figure


def _recipes(rows: Sequence[Row]) -> Figure:
    """Bars for each instruction set: a panel for each head_dim, longest length, full attention."""
    head_dims = values(rows, "head_dim")
    figure, panels = _panels(1, len(head_dims))
    for axes, head_dim in zip(panels[0], head_dims, strict=True):
        length = max(row["kv_len"] for row in rows)
        cells = where(rows, head_dim=head_dim, kv_len=length, mask="none")
        kernels = values(cells, "kernel")
        bars = [(p, d) for p in values(cells, "precision") for d in values(cells, "dtype")]
        width = 0.8 / max(1, len(bars))
        for number, (precision, dtype) in enumerate(bars):
            found = where(cells, precision=precision, dtype=dtype)
            at = [kernels.index(row["kernel"]) + (number + 0.5) * width - 0.4 for row in found]
            ratios = [row["ratio"] for row in found]
            drawn = axes.bar(at, ratios, width, label=f"{precision}, {dtype}")
            axes.bar_label(drawn, fmt="%.2g", fontsize=7)
        axes.set_xticks(range(len(kernels)), kernels)
        _baseline(axes, "SDPA, same dtype")
        axes.set_title(f"head_dim {head_dim}, length {length}")
    panels[0][0].set_ylabel("times faster than SDPA")
    figure.suptitle("Recipes and instruction sets, one thread")
    _legend(figure, panels)
    return figure


def plot_models(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of benchmarks/models.py: bars beside eager, and what is at most possible."""
    figure, panels = _panels(1, 1)
    axes = panels[0][0]
    for number, (backend, color) in enumerate((("inductor", "tab:gray"), ("sage", PASS))):
        at = [i + (number - 0.5) * 0.35 for i in range(len(rows))]
        ratios = [row[f"{backend}_vs_eager"] for row in rows]
        below = [row[f"{backend}_vs_eager"] - row[f"{backend}_vs_eager_p10"] for row in rows]
        above = [row[f"{backend}_vs_eager_p90"] - row[f"{backend}_vs_eager"] for row in rows]
        drawn = axes.bar(at, ratios, 0.35, yerr=[below, above], label=backend, color=color)
        axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    for i, row in enumerate(rows):
        limit = 1.0 / (1.0 - row["attention_share"])  # Amdahl's law
        label = "eager, if attention took no time" if i == 0 else None
        axes.hlines(limit, i - 0.4, i + 0.4, color="tab:red", ls="--", label=label)
    names = [f"{row['title']}\nattention {row['attention_share']:.0%} of eager" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylabel("times faster than eager")
    _baseline(axes, "eager")
    _legend(figure, panels)
    figure.set_size_inches(4.0 + 2.0 * len(rows), 4.5)
    axes.set_title(f"Whole models, {rows[0]['dtype']}, {rows[0]['threads']} thread(s)")
    _finish(figure, path)
