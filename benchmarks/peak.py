"""The ceilings of a kernel: what one thread of this machine can multiply and add per second.

    python -m benchmarks.peak

Compiles benchmarks/native/peak.c with cc and runs it; x86-64 only. The figure of ``dpbusd_zmm`` (or
of the instruction that the chosen instruction set multiplies with) is what ``--peak`` of
benchmarks.kernels wants.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "native" / "peak.c"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        subprocess.run(["cc", "-O2", str(SOURCE), "-o", str(program)], check=True)
        print("billions of operations per second, one thread")
        subprocess.run([str(program)], check=True)


if __name__ == "__main__":
    main()
