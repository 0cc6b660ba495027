"""A picture of how fast the kernels are: needs matplotlib, the extra ``bench``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.measure import shown

Row = dict[str, Any]


def plot(rows: Sequence[Row], machine: str, path: Path) -> None:
    """Self-attention by length, one panel for each head_dim and mask, into a PNG.

    A kernel has two lines: alone, and with quantization. Peers have one each.
    """
    drawn = [row for row in rows if row["queries"] == row["seq_len"]]
    panels = list(dict.fromkeys((row["head_dim"], row["mask"]) for row in drawn))
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(1.0 + 4.6 * columns, 1.0 + 3.4 * lines),
        squeeze=False,
        layout="constrained",
    )
    for place, panel in zip(axes.flat, panels, strict=False):
        _panel(place, [row for row in drawn if (row["head_dim"], row["mask"]) == panel])
        place.set_title(f"head_dim {panel[0]}, {panel[1]}", fontsize=9)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    figure.text(0.005, -0.02, machine, fontsize=7, color="gray")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    print(f"written: {shown(path)}", flush=True)


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        ours = [row for row in rows if row["kernel"] == kernel]
        _line(axes, ours, "tflops_kernel", f"{kernel}, alone", "--")
        _line(axes, ours, "tflops_total", f"{kernel}, with quantization", "-")
    for peer in dict.fromkeys(row["peer"] for row in rows if row["peer"] is not None):
        _line(axes, [row for row in rows if row["peer"] == peer], "tflops_peer", peer, ":")
    lengths = sorted({row["seq_len"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("TFLOPS", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)


def _line(axes: Axes, rows: Sequence[Row], field: str, label: str, style: str) -> None:
    """One number for each length."""
    found = {row["seq_len"]: row[field] for row in rows}
    lengths = sorted(found)
    axes.plot(lengths, [found[n] for n in lengths], style, marker="o", markersize=3, label=label)
