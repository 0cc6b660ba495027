"""The results: a file for programs, a table for readers, and nothing fast that is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.measure import shown

# Stands in the folder until the first run on a GPU: benchmarks/results/cuda.json.
MISSING: Final = "cuda.json"
COLUMNS: Final[Mapping[str, int]] = {
    "kernel": 14, "D": 3, "length": 7, "mask": 7, "BxH": 6, "kernel_TFLOPS": 0, "total_TFLOPS": 0,
    "total_ms": 9, "peer": 13, "peer_TFLOPS": 0, "total_vs_peer": 18, "cosine": 8, "rel_L1": 7,
    "peer_rel_L1": 0,
}  # fmt: skip


def texts(row: Mapping[str, Any]) -> list[str]:
    """A row as the table shows it."""
    against = ""
    if row["peer"] is not None:
        against = f"{row['ratio_total']:.2f}"
        against += f" [{row['ratio_total_p10']:.2f}, {row['ratio_total_p90']:.2f}]"
    return [
        row["kernel"],
        str(row["head_dim"]),
        _lengths(row),
        row["mask"],
        f"{row['batch']}x{_heads(row)}",
        f"{row['tflops_kernel']:.1f}",
        f"{row['tflops_total']:.1f}",
        f"{row['ms_total']:.4g}",
        row["peer"] or "",
        "" if row["tflops_peer"] is None else f"{row['tflops_peer']:.1f}",
        against,
        f"{row['cosine']:.6f}",
        f"{row['rel_l1']:.4f}",
        "" if row["rel_l1_peer"] is None else f"{row['rel_l1_peer']:.4f}",
    ]


def _lengths(row: Mapping[str, Any]) -> str:
    """Of queries, where they are others, and of keys."""
    if row["queries"] == row["seq_len"]:
        return str(row["seq_len"])
    return f"{row['queries']}x{row['seq_len']}"


def _heads(row: Mapping[str, Any]) -> str:
    """Of Q, and of K and V where they are fewer."""
    if row["kv_heads"] == row["heads"]:
        return str(row["heads"])
    return f"{row['heads']}/{row['kv_heads']}"


def describe(machine: Mapping[str, str]) -> str:
    """The machine in one line."""
    return (
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, "
        f"CUDA {machine['cuda']}, {machine['date']}"
    )


def summary(correctness: Sequence[Mapping[str, Any]]) -> str:
    """How much was checked, in one line."""
    failed = sum(not result["passed"] for result in correctness)
    skipped = sum(bool(result.get("skipped")) for result in correctness)
    calls = sum(result.get("calls", 0) for result in correctness)
    return (
        f"correctness: {len(correctness) - failed - skipped} checks passed, {failed} failed, "
        f"{skipped} skipped; {calls} comparisons"
    )


def _markdown(results: Mapping[str, Any]) -> str:
    lines = [f"# {describe(results['machine'])}", "", summary(results["correctness"]), ""]
    for result in results["correctness"]:
        if not result["passed"]:
            where = " ".join(str(result[k]) for k in ("kernel", "head_dim", "dtype") if k in result)
            lines.append(f"- FAILED {result['check']} {where}".rstrip())
            lines += (f"  - {failure}" for failure in result["failures"])
    if results["rows"]:
        titles = [name.replace("_", " ") for name in COLUMNS]
        lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        lines += ("| " + " | ".join(texts(row)) + " |" for row in results["rows"])
    else:
        lines.append("No speed is published: something failed, or it was not asked for.")
    left_out = dict.fromkeys(results["left_out"])
    if left_out:
        lines += ["", "Left out:", "", *(f"- {reason}" for reason in left_out)]
    return "\n".join(lines).rstrip() + "\n"


def publish(
    folder: Path,
    machine: Mapping[str, str],
    settings: Mapping[str, Any],
    correctness: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    left_out: Sequence[str],
    *,
    quiet: bool = False,
) -> Path:
    """Write FOLDER/<gpu>.json and .md, without rows if a check failed.

    Args:
        quiet: while the run goes on.

    The file that says that no run on a GPU has been made is removed from the folder.
    """
    results = {
        "machine": dict(machine),
        "settings": dict(settings),
        "correctness": list(correctness),
        "rows": list(rows) if all(result["passed"] for result in correctness) else [],
        "left_out": list(left_out),
    }
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub("[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(results), encoding="utf-8")
    (folder / MISSING).unlink(missing_ok=True)
    if not quiet:
        print(f"written: {shown(path)} and {path.with_suffix('.md').name}", flush=True)
    return path
