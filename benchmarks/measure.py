"""Timing for the benchmarks: candidates in turn, medians, ratios, and the machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from sage_compiler.kernels.cpu.library import Library, load

RESULTS: Final = Path(__file__).parent / "results"
# Of the CPU's flags, those that decide which kernels run, here and in torch.
FLAGS: Final = (
    "avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16",
)  # fmt: skip

# Times of one candidate, one number per round, in microseconds per call.
Samples = Mapping[str, list[float]]


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, calls: int, rounds: int
) -> dict[str, list[float]]:
    """The time per call of each candidate in each round, in microseconds.

    The candidates take turns, so that a change of the machine's speed hits all of them. In every
    other round neighbours change places: of two that read the same tensors, which is what
    neighbours do, the first finds them in the cache as rarely as the second. As in timeit, the
    garbage collector is off: it would charge one candidate for everybody's objects.
    """
    for function in candidates.values():
        for _ in range(max(1, calls // 10)):
            function()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in order:
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                samples[name].append((time.perf_counter() - start) / calls * 1e6)
            order = [item for i in range(0, len(order), 2) for item in order[i : i + 2][::-1]]
    finally:
        if was_enabled:
            gc.enable()
    return samples


def microseconds(
    candidates: Mapping[str, Callable[[], object]], *, calls: int, rounds: int
) -> dict[str, float]:
    """Median time of one call of each candidate, taken as ``interleave`` does."""
    samples = interleave(candidates, calls=calls, rounds=rounds)
    return {name: statistics.median(found) for name, found in samples.items()}


def interleave_for(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least_rounds: int = 7,
    most_rounds: int = 101,
) -> dict[str, list[float]]:
    """``interleave`` for about so many seconds: calls and rounds follow from a first look.

    One sample lasts at least 2 ms, far above the clock's resolution. Long calls may exceed
    ``seconds``: there are never fewer than ``least_rounds`` rounds.
    """
    # Each of these begins with a call that does not count: threads, caches, what is built lazily.
    look = interleave(candidates, calls=1, rounds=1)
    calls = max(1, round(2_000 / max(found[0] for found in look.values())))
    if calls > 1:  # so short that one call says little
        look = interleave(candidates, calls=calls, rounds=1)
    one_round = sum(found[0] for found in look.values()) * calls / 1e6
    rounds = min(most_rounds, max(least_rounds, round(seconds / one_round)))
    return interleave(candidates, calls=calls, rounds=rounds)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the 10th and 90th percentile around it."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), cuts[0], cuts[-1])

    def fields(self, name: str) -> dict[str, float]:
        """As fields of a result: NAME, NAME_p10, NAME_p90."""
        return {name: self.median, f"{name}_p10": self.p10, f"{name}_p90": self.p90}


def ratio(samples: Samples, baseline: str, candidate: str) -> Spread:
    """How many times faster the candidate is than the baseline, round by round."""
    pairs = zip(samples[baseline], samples[candidate], strict=True)
    return Spread.of([theirs / ours for theirs, ours in pairs])


def added(samples: Samples, baseline: str, candidate: str) -> Spread:
    """How many microseconds the candidate takes beyond the baseline, round by round."""
    pairs = zip(samples[baseline], samples[candidate], strict=True)
    return Spread.of([ours - theirs for theirs, ours in pairs])


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    fields = _cpuinfo()
    names = fields.get("model name", [])
    library = load()
    flags = set(" ".join(fields.get("flags", []) + fields.get("Features", [])).split())
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "sage_isa": library.isa_name if isinstance(library, Library) else None,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpuinfo() -> dict[str, list[str]]:
    """The fields of /proc/cpuinfo, with one value per core; empty where there is none."""
    fields: dict[str, list[str]] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), []).append(value.strip())
    return fields


def describe(found: Mapping[str, Any]) -> str:
    """The machine in one line, for the head of tables and plots."""
    cores = f"{found['cores']} cores" if found["cores"] else "cores unknown"
    return f"{found['cpu']}, {cores}, torch {found['torch']}, {found['date']}"


class Table:
    """A markdown table that is printed row by row, while the benchmark runs."""

    def __init__(self, **columns: int) -> None:
        """The columns' titles, underscores for spaces, and their widths; 0: that of the title."""
        titles = [title.replace("_", " ") for title in columns]
        pairs = zip(titles, columns.values(), strict=True)
        self._widths = [max(len(title), width) for title, width in pairs]
        self.print_row(*titles)
        print("|" + "|".join("-" * (width + 2) for width in self._widths) + "|", flush=True)

    def print_row(self, *cells: str) -> None:
        """One cell for each column."""
        padded = [cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)]
        print("| " + " | ".join(padded) + " |", flush=True)


def save(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write results with the machine to FOLDER/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    print(f"written: {shown(path)}")
    return path


def shown(path: Path) -> Path:
    """A path as the reader of a message wants it: relative where it can be."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
