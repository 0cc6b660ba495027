"""What compiling, finding and launching the CUDA kernels costs on the CPU's side. Needs no GPU.

    python -m benchmarks.launch

Launches go to the driver look-alike (cutlass_templates/host/), which only logs them here: what is
timed is Python and ctypes. Compiling is NVRTC's, from scratch, into an empty cache; loading is from
that cache, in a process that has found its compiler. The goals: 6 s, 5 ms, 5 us for each kernel.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from benchmarks.measure import microseconds, save
from sage_compiler.kernels.cuda import kernel, toolchain
from sage_compiler.kernels.cuda.cache import Cache
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.variants import variant
from tests.compiler.kernels.cuda.emulation import ARCH, loader, the_host
from tests.compiler.kernels.cuda.test_attention import make_call

GOALS: Final = {"compile, s": 6.0, "load from the cache, ms": 5.0, "launch, us": 5.0}
LOADS: Final = 20


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    print("| what | kernel | measured | goal |")
    print("|---|---|---|---|")

    def show(what: str, name: str, measured: float) -> None:
        results.setdefault(what, {})[name] = measured
        goal = f"{GOALS[what]:.0f}" if what in GOALS else ""
        print(f"| {what} | {name} | {measured:.2f} | {goal} |", flush=True)

    compiler = toolchain.find("nvrtc")
    specs = variant(ARCH, "bfloat16", 128, "int8_fp8").specs()
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder) / "cache")

        def image(spec: KernelSpec) -> bytes:
            return cache.image(
                spec, compiler.identity, lambda source: compiler.compile(source, spec.arch)
            )

        for spec in specs:
            show("compile, s", spec.kind, _seconds(lambda spec=spec: image(spec)))
        for spec in specs:
            times = [_seconds(lambda spec=spec: image(spec)) * 1e3 for _ in range(LOADS)]
            show("load from the cache, ms", spec.kind, statistics.median(times))

    call = make_call(128, 128, 128, torch.bfloat16)
    target = kernel.Target(ARCH, 0, 0, loader())

    def attention() -> object:
        return kernel.run(
            target,
            call.query,
            call.key,
            call.value,
            call.semantics,
            want_lse=False,
            recipe="int8_fp8",
        )

    the_host().reset()
    attention()  # loads the kernels
    the_host().library.sage_host_dry_run(True)
    running = kernel.Call(
        target,
        variant(ARCH, "bfloat16", 128, "int8_fp8"),
        call.query,
        call.key,
        call.value,
        call.semantics,
        torch.empty_like(call.query),
        None,
    )
    candidates: dict[str, Callable[[], object]] = {
        **{step.__name__.strip("_"): step for step in running.steps()},
        "all, with scratch and output": attention,
    }
    for name, measured in microseconds(candidates, calls=2000, rounds=15).items():
        what = "launch, us" if name in {spec.kind for spec in specs} else "attention, us"
        show(what, name, measured)
    the_host().reset()
    save("launch", {"goals": GOALS, "measured": results})


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
