"""The command ``sagec bench``: eager, Inductor and sage on the same inputs, in one run."""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sage_compiler.backend import last_report
from sage_compiler.commands import options
from sage_compiler.commands.model import Built, build
from sage_compiler.errors import SageError, UsageError
from sage_compiler.machine import device_name
from sage_compiler.metrics import compare, output_rel_l1, tensors
from sage_compiler.report import Report
from sage_compiler.text import columns, count, duration

EAGER: Final = "eager"
INDUCTOR: Final = "inductor"
SAGE: Final = "sage"

_DESCRIPTION: Final = f"""\
Time a model in eager, with torch.compile's own backend and with backend="sage", on the same inputs.
The three take turns in one process; times are medians, ratios are medians of the rounds' ratios.
Beside them stand the time of the first call, which compiles from an empty cache, and how far the
output is from eager's.

    sagec bench model.py:build
    sagec bench model.py:build --precision int8_fp16 --rounds 30 --threads 4 --json

{options.MODEL_HELP}"""

Sync = Callable[[], None]  # waits for the device


@dataclass(frozen=True, slots=True)
class Timing:
    """One way to run the model.

    Attributes:
        seconds: median time of one call; p10, p90: percentiles around it.
        speedup: how many times as fast as eager, the median over the rounds.
        first_seconds: time of the first call, compilation included.
        rel_l1, cosine: of the output against eager's; None where it has no floating-point tensor.
    """

    name: str
    seconds: float
    p10: float
    p90: float
    speedup: float
    first_seconds: float
    rel_l1: float | None
    cosine: float | None


def add_command(commands: options.Commands) -> None:
    """Give ``sagec`` the command."""
    parser = options.add_command(
        commands,
        "bench",
        _bench,
        summary="time eager, Inductor and sage, and compare outputs",
        description=_DESCRIPTION,
    )
    options.add_model(parser)
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="rounds; default: 3")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's own number")
    options.add_json(parser)
    options.add_decision(parser)


def _bench(arguments: argparse.Namespace) -> int:
    for name, least in (("rounds", 1), ("warmup", 0), ("threads", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}; it must be at least {least}")
    decision = options.decision(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    built = build(arguments.model)
    with torch.no_grad():
        timings, report = bench(built, decision, rounds=arguments.rounds, warmup=arguments.warmup)
    found = machine(built)
    if arguments.json:
        options.print_json(
            {
                "machine": found,
                "rounds": arguments.rounds,
                "timings": [asdict(each) for each in timings],
                "report": report.to_dict(),
            }
        )
    else:
        print(_text(timings, report, found, arguments.rounds))
    return options.OK


def bench(
    built: Built, decision: Mapping[str, Any], *, rounds: int, warmup: int
) -> tuple[list[Timing], Report]:
    """Time the model in three ways; the report is of what ``sage`` made of it.

    Args:
        decision: options of the backend.
        rounds: how often each is timed; warmup: how often each runs before.

    Raises:
        SageError: what the backend raises.
    """
    model, sync = built.model, _sync(built)
    _start_inductor()
    torch.compiler.reset()
    ways: dict[str, Callable[..., Any]] = {
        EAGER: model,
        INDUCTOR: torch.compile(model, backend="inductor"),
        SAGE: torch.compile(model, backend="sage", options=dict(decision)),
    }
    calls = {name: partial(way, *built.args, **built.kwargs) for name, way in ways.items()}
    first, outputs = {}, {}
    for name, call in calls.items():
        first[name], outputs[name] = _first_call(call, sync)
    report = last_report()
    samples = interleave(calls, sync, rounds=rounds, warmup=warmup)
    timings = []
    for name, times in samples.items():
        p10, p90 = _percentiles(times)
        ratios = [eager / ours for eager, ours in zip(samples[EAGER], times, strict=True)]
        timings.append(
            Timing(
                name,
                seconds=statistics.median(times),
                p10=p10,
                p90=p90,
                speedup=statistics.median(ratios),
                first_seconds=first[name],
                rel_l1=_rel_l1(outputs[name], outputs[EAGER]),
                cosine=_cosine(outputs[name], outputs[EAGER]),
            )
        )
    return timings, report


def _start_inductor() -> None:
    """Pay what a process pays once (imports, a look at the compiler), so that no way is charged."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        torch.compile(lambda x: x + 1, backend="inductor")(torch.zeros(8))


def _first_call(call: Callable[[], Any], sync: Sync) -> tuple[float, list[Tensor]]:
    """Its seconds, with nothing compiled in earlier runs, and the tensors of its output."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        start = time.perf_counter()
        try:
            output = call()
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, SageError):
                raise error.inner_exception from None
            raise
        sync()
        seconds = time.perf_counter() - start
    # A copy: the next call may return the same memory.
    return seconds, [each.clone() for each in tensors(output)]


def interleave(
    calls: Mapping[str, Callable[[], Any]], sync: Sync, *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """The seconds of each call in each round.

    They take turns, so that a change of the machine's speed hits all of them; every other round
    goes backwards, so that none always runs after the same one. As in timeit, the garbage collector
    is off: it would charge one for everybody's objects.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    sync()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in order:
                start = time.perf_counter()
                call()
                sync()
                samples[name].append(time.perf_counter() - start)
            order.reverse()
    finally:
        if was_enabled:
            gc.enable()
    return samples


def _percentiles(times: list[float]) -> tuple[float, float]:
    """The 10th and the 90th."""
    if len(times) == 1:
        return times[0], times[0]
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def _devices(built: Built) -> set[torch.device]:
    """Where the model and its inputs are."""
    found = [
        x for x in pytree.tree_leaves((built.args, dict(built.kwargs))) if isinstance(x, Tensor)
    ]
    if isinstance(built.model, nn.Module):
        found += [*built.model.parameters(), *built.model.buffers()]
    return {x.device for x in found}


def _sync(built: Built) -> Sync:
    gpus = [device for device in _devices(built) if device.type == "cuda"]

    def sync() -> None:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)

    return sync


def _rel_l1(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    return output_rel_l1(actual, expected) if expected else None


def _cosine(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    if not expected:
        return None
    # (1, 1, 1, n): the whole output as one vector.
    flat = (torch.cat([x.double().flatten().cpu() for x in each]) for each in (actual, expected))
    return compare(*(vector[None, None, None] for vector in flat)).cosine


def machine(built: Built) -> dict[str, Any]:
    """What the numbers belong to: devices, the CPU always among them, threads and versions."""
    gpus = {device for device in _devices(built) if device.type == "cuda"}
    names = [device_name(device) for device in (*sorted(gpus, key=str), torch.device("cpu"))]
    return {
        "devices": list(dict.fromkeys(names)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _text(timings: Sequence[Timing], report: Report, found: Mapping[str, Any], rounds: int) -> str:
    rows = [
        (
            each.name,
            duration(each.seconds),
            f"[{duration(each.p10)}, {duration(each.p90)}]",
            f"{each.speedup:.2f}",
            duration(each.first_seconds),
            "" if each.rel_l1 is None else f"{each.rel_l1:.3g}",
            "" if each.cosine is None else f"{each.cosine:.6f}",
        )
        for each in timings
    ]
    heading = ("", "median", "10% to 90%", "speed-up", "first call", "rel_l1", "cosine")
    sites = count(len(report.sites), "attention site")
    recipes = Counter(site.recipe for site in report.rewritten)
    made = "".join(f", {number} as {recipe}" for recipe, number in recipes.items())
    lines = [
        f"{', '.join(found['devices'])}, torch {found['torch']}, {count(rounds, 'round')}",
        *columns([heading, *rows], "  "),
        f"{SAGE}: {sites}, {len(report.rewritten)} rewritten{made}",
    ]
    reasons = Counter(site.reason for site in report.kept)
    return "\n".join(
        [*lines, *(f"  kept, {count(number, 'site')}: {why}" for why, number in reasons.items())]
    )
