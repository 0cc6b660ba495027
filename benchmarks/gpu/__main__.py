"""Check the CUDA kernels on this machine's GPU, then time them against PyTorch's attention.

    python -m benchmarks.gpu                          # all of it; `make gpu` sets up and does this
    python -m benchmarks.gpu --quick                  # fewer lengths
    python -m benchmarks.gpu --no-speed --sanitizer   # compute-sanitizer too; takes long

Writes <gpu>.json, <gpu>.md and, where there is matplotlib, <gpu>.png into a folder. Nothing is
timed, and no speed is written, unless every check passes. What matters most is timed first and
written at once, and what there is no time for is named. Exit status: 0, or 1 when a check fails, or
2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu import correctness, speed
from benchmarks.gpu.correctness import ALL_CHECKS
from benchmarks.gpu.device import CudaDevice, Device
from benchmarks.gpu.matrix import Subject, further_subjects, subjects, timed_subjects
from benchmarks.gpu.presence import NO_DEVICE
from benchmarks.gpu.publish import COLUMNS, describe, publish, summary, texts
from benchmarks.gpu.trial import Plan
from benchmarks.measure import RESULTS, Table
from sage_compiler.errors import KernelUnavailableError, UsageError

FAILED: Final = 1
FEW_CALLS: Final = 4


@dataclass(frozen=True)
class Work:
    """What is done.

    Attributes:
        subjects: of an architecture; all must pass.
        further: the same, if they can be compiled here.
        checks: keys of ``ALL_CHECKS``.
        grid: what is timed, None for nothing.
        minutes: no cell is begun later than so many after the start.
    """

    subjects: Callable[[str], Sequence[Subject]]
    further: Callable[[str], Sequence[Subject]]
    plan: Plan
    checks: Sequence[str]
    sanitizer: bool
    grid: speed.Grid | None
    minutes: float


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="where the results go")
    add("--device", type=int, default=0, metavar="N", help="which GPU, as PyTorch counts")
    add("--quick", action="store_true", help="time fewer lengths, for less long")
    add("--no-speed", action="store_true", help="check only")
    add("--checks", nargs="+", choices=tuple(ALL_CHECKS), help="only these, and no timing")
    add("--few", action="store_true", help=f"{FEW_CALLS} random calls of each, and no timing")
    add("--seed", type=int, default=0, help="of the inputs that are checked")
    add("--sanitizer", action="store_true", help=f"check under {correctness.SANITIZER} too")
    add("--minutes", type=float, default=9.0, help="begin no more timings after so many")
    return parser.parse_args(argv)


def chosen(arguments: argparse.Namespace) -> Work:
    """What the arguments ask for."""
    plan = Plan(seed=arguments.seed)
    if arguments.few:
        plan = Plan(seed=arguments.seed, random_calls=FEW_CALLS)
    # What was checked in part is not timed.
    no_speed = arguments.no_speed or arguments.few or arguments.checks
    grid = speed.QUICK if arguments.quick else speed.Grid()
    return Work(
        subjects,
        lambda arch: (*further_subjects(arch), *timed_subjects(arch)),
        plan,
        arguments.checks or tuple(ALL_CHECKS),
        arguments.sanitizer,
        None if no_speed else grid,
        arguments.minutes,
    )


def run(device: Device, work: Work, out: Path) -> int:
    """Do the work on a device and publish what comes of it; the exit status.

    Raises:
        UsageError: compute-sanitizer is asked for and not here.
    """
    sanitizer = correctness.find_sanitizer() if work.sanitizer else None
    start = time.monotonic()
    machine = device.machine()
    print(describe(machine), flush=True)
    chosen_subjects, further = [*work.subjects(device.arch)], work.further(device.arch)
    reason = device.no_compiler()
    if reason is None:
        chosen_subjects += further
    ready, results = correctness.prepare(device, chosen_subjects)
    if reason is not None:
        results += correctness.unavailable(further, reason)
    results += correctness.run(device, ready, work.plan, work.checks)
    if sanitizer is not None:
        results += correctness.sanitize(sanitizer, device.index)
    print(f"{summary(results)}, {time.monotonic() - start:.0f} s", flush=True)

    settings = {
        "seed": work.plan.seed,
        "checks": list(work.checks),
        "speed": work.grid is not None,
    }

    def keep(so_far: speed.Results) -> None:
        seconds = {"seconds": round(time.monotonic() - start)}
        rows = [] if so_far.failures else so_far.rows
        publish(out, machine, settings | seconds, results, rows, so_far.left_out, quiet=True)

    found = speed.Results()
    if work.grid is not None and all(result["passed"] for result in results):
        table = Table(**COLUMNS)
        deadline = start + 60 * work.minutes
        found = speed.run(device, ready, work.grid, deadline, lambda row: _print(table, row), keep)
        failures = found.failures
        results.append({"check": "speed", "passed": not failures, "failures": failures})
        for failure in failures:
            print(f"FAILED {failure}", flush=True)
        for reason in dict.fromkeys(found.left_out):
            print(f"left out: {reason}", flush=True)
    settings["seconds"] = round(time.monotonic() - start)
    path = publish(out, machine, settings, results, found.rows, found.left_out)
    if found.rows and not found.failures:
        if importlib.util.find_spec("matplotlib") is None:
            print("no plot: there is no matplotlib here", flush=True)
        else:
            from benchmarks.gpu.plot import plot  # an optional package

            plot(found.rows, describe(machine), path.with_suffix(".png"))
    return 0 if all(result["passed"] for result in results) else FAILED


def _print(table: Table, row: dict[str, Any]) -> None:
    table.print_row(*texts(row))


def main(argv: Sequence[str] | None = None, find: Callable[[int], Device] = CudaDevice) -> int:
    """The command.

    Args:
        find: the device of a number; raises KernelUnavailableError when there is none.
    """
    arguments = parse(argv)
    try:
        device = find(arguments.device)
    except KernelUnavailableError as error:
        print(f"no CUDA device: {error}", file=sys.stderr)
        return NO_DEVICE
    try:
        return run(device, chosen(arguments), arguments.out)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
