"""What a device is called: in reports, in policies, as the target of a calibration."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from sage_compiler.errors import InvalidOptionError, KernelUnavailableError
from sage_compiler.kernels.cpu.kernel import KERNELS
from sage_compiler.kernels.cuda.arch import ARCHS, PORTABLE, arch_of
from sage_compiler.text import count


def device_name(device: torch.device) -> str:
    """The device with all that a time on it depends on: ``AMD EPYC (cpu-avx2, 2 threads)``."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    threads = torch.get_num_threads()
    return f"{_processor()} ({KERNELS[0].name()}, {count(threads, 'thread')})"


def target_of(device: torch.device) -> str:
    """What a policy for this device is made for: "cpu", or its architecture, ``sm_89``.

    Raises:
        InvalidOptionError: a device that no recipe has a kernel for.
        KernelUnavailableError: an NVIDIA GPU whose compute capability is none of a target's.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = arch_of((major, minor))
        if arch is PORTABLE:
            raise KernelUnavailableError(
                f"compute capability {major}.{minor} has no times to choose recipes by; calibrate "
                f"the model on the CPU, for the closest target of {', '.join(ARCHS)}"
            )
        return arch.name
    raise InvalidOptionError(
        f"a model on {device}; there are recipes for CPUs and NVIDIA GPUs: move it there"
    )


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
