"""What a call of sage::attention costs beside the aten operator that it dispatches to.

    python -m benchmarks.dispatch

One query, one key, head_dim 16, so that the time is all overhead; precision "exact", which ends
in the same scaled_dot_product_attention kernel. The difference is what the operator adds: its
dispatch in Python, validation, the choice of the kernel, the promise of its strides. The goal
is at most 3 us in inference mode and 8 us under no_grad with inputs that require grad.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Final

import torch

from benchmarks.measure import microseconds, save
from sage_compiler import ops as ops  # registers the operator

GOALS: Final = {"inference_mode": 3.0, "no_grad": 8.0}


def contexts() -> dict[str, AbstractContextManager[Any]]:
    return {"inference_mode": torch.inference_mode(), "no_grad": torch.no_grad()}


def main() -> None:
    torch.set_num_threads(1)
    ours = torch.ops.sage.attention.default
    aten = torch.ops.aten.scaled_dot_product_attention.default
    results: dict[str, dict[str, float]] = {}
    print("| mode | call | aten, us | sage, us | added, us | goal, us |")
    print("|---|---|---|---|---|---|")
    for mode, context in contexts().items():
        with context:
            x = torch.randn(1, 1, 1, 16).requires_grad_(mode == "no_grad")
            calls = {
                "plain": (lambda x=x: aten(x, x, x), lambda x=x: ours(x, x, x)),
                "causal, scale": (
                    lambda x=x: aten(x, x, x, None, 0.0, True, scale=0.3),
                    lambda x=x: ours(x, x, x, None, "causal", 0.3),
                ),
            }
            for name, (theirs, mine) in calls.items():
                found = microseconds({"aten": theirs, "sage": mine}, calls=3000, rounds=15)
                added = found["sage"] - found["aten"]
                results[f"{mode}, {name}"] = {**found, "added": added, "goal": GOALS[mode]}
                print(
                    f"| {mode} | {name} | {found['aten']:.2f} | {found['sage']:.2f} "
                    f"| {added:.2f} | {GOALS[mode]:.0f} |"
                )
    save("dispatch", {"microseconds": results})


if __name__ == "__main__":
    main()
