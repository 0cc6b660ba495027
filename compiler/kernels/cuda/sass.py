"""The machine code of a cubin, as counts of its opcodes."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import headers

# "/*1ab0*/  @!P0 IMMA.16832.S8.S8 R80, ... ;": an address, a predicate or none, the opcode.
_INSTRUCTION: Final = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", re.MULTILINE
)
_PADDING: Final = "NOP"


@dataclass(frozen=True, slots=True)
class Disassembler:
    """nvdisasm or cuobjdump."""

    command: tuple[str, ...]

    @classmethod
    def find(cls) -> Disassembler:
        """The one that is here.

        Raises:
            KernelUnavailableError: neither is, with what installs one.
        """
        for name, option in (("nvdisasm", "--print-code"), ("cuobjdump", "--dump-sass")):
            path = headers.tool(name)
            if path is not None:
                return cls((str(path), option))
        raise KernelUnavailableError(
            "disassembling a kernel takes nvdisasm or cuobjdump; "
            "pip install nvidia-cuda-nvdisasm, or install a CUDA toolkit"
        )

    def listing(self, image: bytes) -> str:
        """The code of a cubin as text, one instruction a line.

        Raises:
            KernelUnavailableError: it cannot be disassembled.
        """
        with tempfile.TemporaryDirectory(prefix="sage-sass-") as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(image)
            done = subprocess.run(
                [*self.command, str(cubin)], capture_output=True, text=True, errors="replace"
            )
        if done.returncode or not count(done.stdout):
            raise KernelUnavailableError(f"{self.command[0]} finds no code: {done.stderr.strip()}")
        return done.stdout


def count(listing: str) -> Counter[str]:
    """How often each opcode is in a listing, with all its modifiers: ``HMMA.16816.F32``.

    NOP, which fills up the code, is not counted.
    """
    counts = Counter(_INSTRUCTION.findall(listing))
    del counts[_PADDING]
    return counts


def before(listing: str, prefix: str) -> Counter[str]:
    """The opcodes of a listing that come before the first ``prefix``; all, if it is not there."""
    names = itertools.takewhile(
        lambda name: not f"{name}.".startswith(f"{prefix}."), _INSTRUCTION.findall(listing)
    )
    return Counter(name for name in names if name != _PADDING)


def occurrences(opcodes: Counter[str], prefix: str) -> int:
    """How many instructions are ``prefix``, with whatever modifiers after it."""
    return sum(n for name, n in opcodes.items() if f"{name}.".startswith(f"{prefix}."))
