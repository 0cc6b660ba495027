"""The kernels that prepare operands for hosts without torch; what they find is tested where a host
launches them, in tests/compiler/onnx/cuda."""

from __future__ import annotations

import pytest

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import toolchain
from sage_compiler.kernels.cuda.check import check
from sage_compiler.kernels.cuda.preparation import preparation_specs
from sage_compiler.kernels.cuda.sass import Disassembler


@pytest.mark.parametrize("arch", ["sm_80", "sm_120a"])
def test_their_machine_code(arch: str) -> None:
    """No call: on the older architectures ptxas makes calls of shuffles that follow a loop which
    threads may leave at different turns."""
    try:
        compiler, disassembler = toolchain.find("nvrtc"), Disassembler.find()
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    rows = list(check(preparation_specs(arch), compiler, disassembler, jobs=1))
    assert [row.problems for row in rows] == [()] * 4
    assert all(row.warnings == "" for row in rows)
