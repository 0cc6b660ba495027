"""All checks of all kernels that a device offers, whatever fails in between."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import torch

from benchmarks.gpu.checks import CHECKS
from benchmarks.gpu.device import Device
from benchmarks.gpu.matrix import Subject, dtype_name
from benchmarks.gpu.serving import SERVING_CHECKS
from benchmarks.gpu.trial import Plan, Trial
from sage_compiler.errors import SageError, UsageError

# Read outside of what is registered, races in shared memory, barriers. Reads of what nothing wrote
# are not among them: scratch memory holds garbage that was written.
SANITIZER: Final = "compute-sanitizer"
SANITIZER_TOOLS: Final = ("memcheck", "racecheck", "synccheck")
_SANITIZER_CHECKS: Final = ("random", "special")
_TOLD_LINES: Final = 6
_TOLD_FAILURES: Final = 5

ALL_CHECKS: Final = {**CHECKS, **SERVING_CHECKS}

Result = dict[str, Any]


def prepare(device: Device, subjects: Sequence[Subject]) -> tuple[list[Subject], list[Result]]:
    """The subjects whose kernels are there, compiled if need be, and the failures of the others."""
    specs = list(dict.fromkeys(s for x in subjects for s in x.kernels.specs()))
    start = time.monotonic()
    print(f"{len(specs)} kernels for {device.arch}: finding or compiling them", flush=True)
    reasons = dict(zip(specs, device.build(specs), strict=True))
    print(f"ready after {time.monotonic() - start:.0f} s", flush=True)
    ready, failed = [], []
    for subject in subjects:
        wanting = {reasons[spec] for spec in subject.kernels.specs()} - {None}
        if wanting:
            failures = sorted(str(reason) for reason in wanting)
            failed.append(_result("build", subject, failures=failures))
            _tell(failed[-1])
        else:
            ready.append(subject)
    return ready, failed


def run(
    device: Device, subjects: Sequence[Subject], plan: Plan, chosen: Collection[str]
) -> Iterator[Result]:
    """One result for each subject and check, printed as they come.

    An error of the CUDA driver is a failure of the check that met it. Where the device answers no
    more afterwards, as after an access out of bounds, there are no further results than that.
    """
    for subject in subjects:
        for name, check in ALL_CHECKS.items():
            if name not in chosen:
                continue
            trial = Trial(device, subject, plan)
            try:
                check(trial)
                device.synchronize()
            except (SageError, torch.AcceleratorError, torch.OutOfMemoryError) as error:
                trial.failures.append(f"{type(error).__name__}: {_first_line(error)}")
            is_lost = bool(trial.failures) and not _answers(device)
            if is_lost:
                trial.failures.append("the device answers no more; nothing else was checked")
            found = _result(
                name,
                subject,
                calls=trial.calls,
                distance=trial.distance,
                failures=trial.failures,
                skipped=trial.skipped,
            )
            _tell(found)
            yield found
            if is_lost:
                return


def find_sanitizer() -> str:
    """The path of NVIDIA's compute-sanitizer; UsageError when it is not here."""
    path = shutil.which(SANITIZER)
    if path is None:
        raise UsageError(f"there is no {SANITIZER} on PATH; it is part of the CUDA toolkit")
    return path


def sanitize(path: str, index: int) -> Iterator[Result]:
    """Some of the checks under compute-sanitizer, in processes of their own.

    Args:
        path: of it.
        index: of the device.
    """
    for tool in SANITIZER_TOOLS:
        print(f"{SANITIZER} {tool}: minutes", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [path, "--tool", tool, "--error-exitcode", "9", sys.executable]
            command += ["-m", "benchmarks.gpu", "--device", str(index), "--out", folder]
            command += ["--no-speed", "--few", "--checks", *_SANITIZER_CHECKS]
            # Each tensor its own allocation, so that the tool sees where it ends.
            environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
        lines = (done.stdout + done.stderr).splitlines()
        failures = [" / ".join(lines[-_TOLD_LINES:])] if done.returncode else []
        result = {"check": f"{SANITIZER} {tool}", "passed": not failures, "failures": failures}
        _tell(result)
        yield result


def unavailable(subjects: Sequence[Subject], reason: str) -> Iterator[Result]:
    """What is not checked, since no pack has it and nothing here compiles it."""
    for subject in subjects:
        result = _result("build", subject, failures=[], skipped=reason)
        _tell(result)
        yield result


def _result(
    check: str,
    subject: Subject,
    *,
    calls: int = 0,
    distance: float = 0.0,
    failures: list[str],
    skipped: str = "",
) -> Result:
    return {
        "check": check,
        "kernel": subject.kernel,
        "head_dim": subject.head_dims[0],
        "value_head_dim": subject.head_dims[1],
        "dtype": dtype_name(subject.dtype),
        "calls": calls,
        "distance": distance,
        "passed": not failures,
        "failures": failures,
        "skipped": skipped,
    }


def _tell(result: Result) -> None:
    """One line, and the first failures."""
    where = ""
    if "kernel" in result:
        dims = f"{result['head_dim']}/{result['value_head_dim']}"
        where = f"{result['kernel']} D={dims} {result['dtype']}: "
    failures: list[str] = result["failures"]
    word = f"FAILED, {len(failures)}" if failures else "ok"
    if result.get("skipped"):
        word = f"skipped, {result['skipped']}"
    elif result.get("distance"):
        word += f" ({result['calls']} calls, within {result['distance']:.2g} of the reference)"
    print(f"{where}{result['check']} {word}", flush=True)
    for failure in failures[:_TOLD_FAILURES]:
        print(f"    {failure}", flush=True)
    if len(failures) > _TOLD_FAILURES:
        print(f"    and {len(failures) - _TOLD_FAILURES} more", flush=True)


def _answers(device: Device) -> bool:
    """Whether the device still works; an error of a kernel can end its context."""
    try:
        device.synchronize()
    except torch.AcceleratorError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
