"""The instruction sets of the CPU kernel, as tests go through them."""

from __future__ import annotations

from typing import Final

import pytest

from sage_compiler.kernels.cpu.kernel import need

ISAS: Final = ("portable", "avx2", "avxvnni", "avx512vnni")

every_isa = pytest.mark.parametrize("isa_name", ISAS)


def number_of(isa_name: str) -> int:
    """The number of an instruction set; skips the test where this machine or build lacks it."""
    isas = need().isas()
    if isa_name not in isas:
        pytest.skip(f"no {isa_name} here")
    return isas[isa_name]
