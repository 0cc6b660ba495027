"""Reports to look at: a small random model, with a policy of errors and times measured here.

``python -m tests.compiler.pages report.html`` writes the page that docs/report.png shows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sage_compiler as sage
from sage_compiler.metrics import Errors, compare, output_rel_l1
from sage_compiler.policy import Calibration, EndToEnd, LayerPolicy, Policy
from sage_compiler.precision import EXACT, RECIPES
from sage_compiler.report import Report

FAST = ("int8_int8", "int8_int16")  # fastest first: what has a kernel on every CPU


class Attention(nn.Module):
    """Causal attention of 4 heads, by the call or written out."""

    def __init__(self, width: int, sharpness: float, *, written_out: bool) -> None:
        super().__init__()
        self.written_out = written_out
        self.sharpness = sharpness
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return q * self.sharpness, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        if self.written_out:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            at = torch.arange(x.shape[1])
            scores = scores.masked_fill(at[:, None] < at, float("-inf"))
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Layers of attention, and a pooling that has to be kept: it drops weights out."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Attention(width, 1.0 + 4.0 * number, written_out=number % 2 == 1)
            for number in range(layers)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]))
        pooled = F.scaled_dot_product_attention(x[:, :1], x, x, dropout_p=0.1)
        return x, pooled


def decoder(layers: int = 6, width: int = 256) -> Decoder:
    """The same random model every time."""
    torch.manual_seed(0)
    return Decoder(layers, width).eval()


def measured_policy(model: Decoder, x: Tensor, *, rel_l1: float = 0.02, ranges: int = 1) -> Policy:
    """For each layer the first of ``FAST`` whose error on ``x`` is within the limit, else exact.

    With several ranges of timesteps, ``x`` is taken for the first and doubled for each later one.
    """
    fingerprints = {
        site.layer: site.fingerprint
        for site in sage.explain(model, x, options={"precision": EXACT}).rewritten
    }
    inputs: dict[str, list[Tensor]] = {f"layers.{at}#0": [] for at in range(len(model.layers))}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0]))
        for name, layer in zip(inputs, model.layers, strict=True)
    ]
    with torch.no_grad():
        for at in range(ranges):
            model(x * 2**at)
        for hook in hooks:
            hook.remove()
        layers = {
            name: _choose(
                fingerprints[name], [layer.project(each) for each in inputs[name]], rel_l1
            )
            for name, layer in zip(inputs, model.layers, strict=True)
        }
    return Policy(layers, target="cpu", timestep_ranges=ranges)


def _choose(
    fingerprint: str, inputs: list[tuple[Tensor, Tensor, Tensor]], limit: float
) -> LayerPolicy:
    measured = tuple({recipe: _errors(recipe, *qkv) for recipe in RECIPES} for qkv in inputs)
    recipes = tuple(
        next((each for each in FAST if errors[each].rel_l1 <= limit), EXACT) for errors in measured
    )
    seconds = {recipe: _seconds(recipe, *inputs[0]) for recipe in (EXACT, *FAST)}
    return LayerPolicy((fingerprint,), recipes, f"rel_l1 at most {limit}", measured, seconds)


def _attend(recipe: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sage.attention(q, k, v, is_causal=True, precision=recipe)


def _errors(recipe: str, q: Tensor, k: Tensor, v: Tensor) -> Errors:
    return compare(_attend(recipe, q, k, v), _attend(EXACT, q, k, v))


def _seconds(recipe: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    return fastest(lambda: _attend(recipe, q, k, v))


def fastest(call: Callable[[], object], repeats: int = 5) -> float:
    """The least time of a call, which other work on the machine disturbs least."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def report_by(model: Decoder, x: Tensor, policy: Policy) -> Report:
    """The report of a model with a policy; nothing is compiled."""
    return sage.explain(model, x, options={"policy": policy, "min_seq_len": 0})


def verified(model: Decoder, x: Tensor, policy: Policy, limit: float = 0.05) -> Policy:
    """The policy with what it does to the whole, compiled model: its error and its time."""
    run = {
        EXACT: torch.compile(model, backend="inductor"),
        "policy": torch.compile(
            model, backend="sage", options={"policy": policy, "min_seq_len": 0}
        ),
    }
    with torch.no_grad():
        # Without what is pooled, which dropout makes random.
        outputs = {name: call(x)[0] for name, call in run.items()}
        seconds = dict.fromkeys(run, inf)
        for _ in range(10):  # in turns: what else the machine does, it does to both
            for name, call in run.items():
                seconds[name] = min(seconds[name], fastest(lambda call=call: call(x), repeats=1))
    worst = output_rel_l1([outputs["policy"]], [outputs[EXACT]])
    verdict = EndToEnd("output_rel_l1", limit, 1.0, worst, worst <= limit, rounds=1)
    made = Calibration(inputs=1, end_to_end=verdict, model_seconds=seconds)
    return Policy(policy.layers, target=policy.target, calibration=made)


def main() -> None:
    torch.set_num_threads(1)
    model, x = decoder(), torch.randn(1, 1024, 256)
    with torch.no_grad():
        policy = verified(model, x, measured_policy(model, x))
        report_by(model, x, policy).to_html(sys.argv[1])


if __name__ == "__main__":
    main()
