"""What a call of sage::attention costs beside the aten operator that it dispatches to.

    python -m benchmarks.dispatch

One query, one key, head_dim 16, so that the time is all overhead; precision "exact", which ends
in the same scaled_dot_product_attention kernel. The difference is what the operator adds: its
dispatch in Python, validation, the choice of the kernel, the promise of its strides. The goal
is at most 3 us in inference mode and 8 us under no_grad with inputs that require grad.

Then a few queries on 80 keys, 8 heads of 64 channels, which the operator finds to be too small for
quantizing when it is called: beside scaled_dot_product_attention, which serves them; and both in
a graph for all lengths (``dynamic=True``), where Inductor calls the aten kernel itself. The goal is
at most 8 us more than scaled_dot_product_attention. In the graph, Inductor also turns a bool mask
into the float one that the aten kernel wants, which the operator leaves to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import microseconds, save
from sage_compiler import ops as ops  # registers the operator

GOALS: Final = {"inference_mode": 3.0, "no_grad": 8.0}
SMALL_GOAL: Final = 8.0

HEADS: Final = 8
KEYS: Final = 80
QUERIES: Final = (3, 16)  # the shipped gates begin at 32
FORMS: Final[dict[str, dict[str, Any]]] = {
    "no mask": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.2},
    "bool mask": {"mask": torch.bool},
    "float mask": {"mask": torch.float32},
    "grouped heads": {"enable_gqa": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


def contexts() -> dict[str, AbstractContextManager[Any]]:
    return {"inference_mode": torch.inference_mode(), "no_grad": torch.no_grad()}


def added_to_a_call() -> dict[str, dict[str, float]]:
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
    return results


@torch.inference_mode()
def added_to_a_small_attention() -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    print("\n| small | queries | SDPA, us | added, us | goal, us | Inductor, us | in a graph, us |")
    print("|---|---|---|---|---|---|---|")
    for name, form in FORMS.items():
        torch._dynamo.reset()
        attention, operator = _attention(form), _operator(form)
        candidates = {
            "sdpa": attention,
            "sage": operator,
            "inductor": torch.compile(attention, backend="inductor", dynamic=True),
            "sage in a graph": torch.compile(attention, backend="sage", dynamic=True),
        }
        for queries in QUERIES:
            inputs = _inputs(form, queries)
            found = microseconds(
                {which: partial(call, *inputs) for which, call in candidates.items()},
                calls=1000,
                rounds=15,
            )
            added = found["sage"] - found["sdpa"]
            in_graph = found["sage in a graph"] - found["inductor"]
            results[f"{name}, {queries} queries"] = {
                **found,
                "added": added,
                "added in a graph": in_graph,
                "goal": SMALL_GOAL,
            }
            print(
                f"| {name} | {queries} | {found['sdpa']:.1f} | {added:.1f} | {SMALL_GOAL:.0f} "
                f"| {found['inductor']:.1f} | {in_graph:.1f} |"
            )
    return results


def _operator(form: dict[str, Any]) -> Callable[..., Tensor]:
    """The call that the rewritten graph makes."""
    operator = torch.ops.sage.attention.default
    mask_class, scale = "causal" if "is_causal" in form else "none", form.get("scale")

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        output: Tensor = operator(q, k, v, mask, mask_class, scale, "int8_int8", ops.SHIPPED_GATE)
        return output

    return attention


def _attention(form: dict[str, Any]) -> Callable[..., Tensor]:
    words = {name: form[name] for name in form.keys() - {"mask", "dtype"}}

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, **words)

    return attention


def _inputs(form: dict[str, Any], queries: int) -> list[Tensor]:
    dtype = form.get("dtype", torch.float32)
    heads = HEADS // 4 if "enable_gqa" in form else HEADS
    inputs = [torch.randn(1, HEADS, queries, 64, dtype=dtype)]
    inputs += (torch.randn(1, heads, KEYS, 64, dtype=dtype) for _ in range(2))
    if "mask" in form:
        mask = torch.randn(1, 1, queries, KEYS)
        inputs.append(mask > 0 if form["mask"] is torch.bool else mask)
    return inputs


def main() -> None:
    torch.set_num_threads(1)
    calls = added_to_a_call()
    small = added_to_a_small_attention()
    save("dispatch", {"microseconds": calls, "small": small})


if __name__ == "__main__":
    main()
