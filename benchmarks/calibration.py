"""What a calibration costs, in ordinary runs of the model over the same inputs.

With kernels at hand, all candidates together may cost at most their number + 2 such runs. Where
the reference emulates them, the time of each part is shown, and what a subset of queries saves.

    python -m benchmarks.calibration
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import sage_compiler as sage
from benchmarks.architectures import Transformer
from benchmarks.measure import RESULTS, Table, save

INPUTS: Final = 6
BUDGETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "layers": {"cosine": 0.998},
    "output": {"output_rel_l1": 0.01},
}


def model_and_inputs(width: int, layers: int, length: int) -> tuple[nn.Module, list[tuple[Tensor]]]:
    """A transformer with random weights and head_dim 64, and sequences of random tokens."""
    torch.manual_seed(0)
    model = Transformer(width, width // 64, layers).eval()
    return model, [(torch.randn(1, length, width),) for _ in range(INPUTS)]


@torch.no_grad()
def ordinary(model: nn.Module, inputs: list[tuple[Tensor]]) -> float:
    """Seconds of one eager run over all inputs, the better of two."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        for item in inputs:
            model(*item)
        found.append(time.perf_counter() - start)
    return min(found)


def measure(
    model: nn.Module, inputs: list[tuple[Tensor]], budget: str, **arguments: Any
) -> dict[str, Any]:
    """One calibration, and an ordinary run before and after it."""
    before = ordinary(model, inputs)
    start = time.perf_counter()
    policy = sage.calibrate(model, inputs, budget=BUDGETS[budget], progress=False, **arguments)
    seconds = time.perf_counter() - start
    run = (before + ordinary(model, inputs)) / 2
    made = policy.calibration
    return {
        "target": policy.target,
        "budget": budget,
        "subset": made.subset,
        "candidates": list(made.candidates),
        "ordinary_run_s": run,
        "calibration_s": seconds,
        "runs": seconds / run,
        "rounds": 0 if made.end_to_end is None else made.end_to_end.rounds,
        "parts_s": dict(made.parts),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where kernels are at hand and calibrating layers costs more than it may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the results")
    arguments = parser.parse_args(argv)
    model, inputs = model_and_inputs(arguments.width, arguments.layers, arguments.length)
    table = Table(target=6, budget=6, subset=20, candidates=0, ordinary_run_s=0, runs=6, parts_s=60)
    rows = []
    for budget, extra in (
        ("layers", {}),
        ("output", {}),
        ("layers", {"target": "sm_89", "candidates": ("int4_fp8", "int8_fp8")}),
        (
            "layers",
            {
                "target": "sm_89",
                "candidates": ("int4_fp8", "int8_fp8"),
                "heads": 1,
                "queries": 256,
            },
        ),
    ):
        row = measure(model, inputs, budget, **extra)
        rows.append(row)
        parts = ", ".join(f"{name} {taken:.2f}" for name, taken in row["parts_s"].items())
        table.print_row(
            row["target"],
            budget,
            row["subset"] or "all",
            str(len(row["candidates"])),
            f"{row['ordinary_run_s']:.2f}",
            f"{row['runs']:.2f}",
            parts,
        )
    shape = {name: getattr(arguments, name) for name in ("width", "layers", "length")}
    save("calibration", {**shape, "inputs": INPUTS, "rows": rows}, arguments.folder)
    here = rows[0]
    return 0 if here["runs"] <= len(here["candidates"]) + 2 else 1


if __name__ == "__main__":
    sys.exit(main())
