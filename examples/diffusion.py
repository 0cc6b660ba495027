"""A diffusion transformer whose attention is quantized by timestep, and compiled once.

A tiny model is trained for some seconds: it turns noise into swarms, clouds of points that gather
around a centre, so every point must attend to all others. Calibration follows a sampling run and
gives every layer a recipe for each quarter of the steps. Then other swarms are sampled through the
model, compiled once and told the step, and compared with exact sampling. Runs in the kernels of
this CPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sage_compiler as sage

WIDTH, HEADS, LAYERS = 64, 2, 2
POINTS = 1024  # of a sampled cloud; training takes fewer, attention does not care
STEPS = 16  # of sampling
SPREAD = 0.1  # of a swarm
LIMIT = 0.0005  # relative L1 of the model's output, at every step


def perceptron(inputs: int, outputs: int) -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(inputs, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, outputs))


class Block(nn.Module):
    """Attention and a multilayer perceptron, each added to its input (clouds, points, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = perceptron(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Denoiser(nn.Module):
    """The velocity (clouds, points, 2) of points at a time (clouds,), from 0: noise to 1: data."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.time = perceptron(2, WIDTH), perceptron(16, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.velocity = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))

    def forward(self, points: Tensor, when: Tensor) -> Tensor:
        angles = when[:, None] * torch.arange(1, 9) * math.pi / 2
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.velocity(self.blocks(self.points(points) + self.time(waves)[:, None]))


def swarms(clouds: int, points: int) -> Tensor:
    """Clouds (clouds, points, 2), each SPREAD wide around a centre of its own."""
    return torch.randn(clouds, 1, 2) + SPREAD * torch.randn(clouds, points, 2)


def train(model: nn.Module, steps: int) -> None:
    """Flow matching (Lipman et al., 2023): predict data - noise from a point between the two."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="training", leave=False):
        data, when = swarms(16, 64), torch.rand(16)
        noise, part = torch.randn_like(data), when[:, None, None]
        loss = F.mse_loss(model((1 - part) * noise + part * data, when), data - noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


def schedule(clouds: int) -> Iterator[Tensor]:
    """The times (clouds,) of a sampling run, each as the step that sage is told of."""
    for step in range(STEPS):
        sage.set_step(step, STEPS)
        yield torch.full((clouds,), step / STEPS)


def sample(model: Callable[..., Tensor], points: Tensor) -> Tensor:
    """The clouds (clouds, points, 2) that noise becomes, by Euler's method."""
    for when in schedule(len(points)):
        points = points + model(points, when) / STEPS
    return points


def trajectory(model: Callable[..., Tensor], points: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The model's inputs in a sampling run: what calibration draws, with the step set."""
    for when in schedule(len(points)):
        yield points, when
        points = points + model(points, when) / STEPS


def spread(clouds: Tensor) -> float:
    """The mean over clouds of the deviation of points from their centre."""
    return float(clouds.std(1).mean())


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=250, help="steps of training")
    parser.add_argument("--html", type=Path, help="write the report with the policy here")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = Denoiser()
    with torch.enable_grad():
        train(model, arguments.train)

    policy = sage.calibrate(
        model,
        trajectory(model, torch.randn(2, POINTS, 2)),
        budget={"output_rel_l1": LIMIT},
        timestep_ranges=4,
    )
    print(policy)

    noise = torch.randn(2, POINTS, 2)  # not that of the calibration
    compiled = torch.compile(model, backend="sage", options={"policy": policy})
    sage.set_step(0, STEPS)
    compiled(noise, torch.zeros(len(noise)))
    found, times = [], []
    with torch.compiler.set_stance("fail_on_recompile"):
        for each in (model, compiled):
            start = time.perf_counter()
            found.append(sample(each, noise))
            times.append(time.perf_counter() - start)
    exact, actual = found
    moved = float((actual - exact).norm(dim=-1).mean())
    print(f"\n{STEPS} steps of sampling, nothing compiled after the first call")
    print(f"spread: noise {spread(noise):.4f}, exact {spread(exact):.4f}, ", end="")
    print(f"policy {spread(actual):.4f}; points moved by {moved:.6f}")
    print(f"time: eager {times[0]:.2f} s, compiled with the policy {times[1]:.2f} s")
    if arguments.html is not None:
        at = torch.zeros(len(noise))
        sage.explain(model, noise, at, options={"policy": policy}).to_html(arguments.html)

    made = policy.calibration.end_to_end
    if made is None or not made.holds or moved > SPREAD / 10:
        print(
            "failed: the policy must hold, and move points by less than a tenth of a swarm's spread"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
