"""Kernel packs for tests: of nothing but names, and of host images."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from sage_compiler.kernels.cuda.binary import Binary
from sage_compiler.kernels.cuda.pack import build
from sage_compiler.kernels.cuda.preparation import preparation_specs
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.variants import variant
from tests.compiler.kernels.cuda.emulation import ARCH
from tests.compiler.kernels.cuda.toy import RESOURCES, FakeCompiler
from tests.cutlass_templates import host


class HostCompiler:
    """Makes host images, which the look-alike of the driver executes."""

    identity = "host"

    def compile(self, source: str, arch: str) -> Binary:
        found = re.search(r"SAGE_KERNEL\((\w+),", source)
        assert found is not None
        return Binary(host.compile_kernel(source, found.group(1)), RESOURCES, "")


def pack_of_names(specs: Sequence[KernelSpec], out: Path) -> Path:
    """A pack whose images are not code; the test driver loads them when it pretends."""
    build(specs, out, FakeCompiler(), jobs=1)
    os.chmod(out, 0o755)
    return out


def pack_of_host_images(specs: Sequence[KernelSpec], out: Path) -> Path:
    """A pack that the look-alike executes."""
    build(specs, out, HostCompiler(), jobs=1)
    return out


@dataclass(frozen=True)
class Case:
    """An attention whose kernels a pack of host images has.

    Attributes:
        plain: whether the kernel without a mask is there too.
    """

    recipe: str
    dtype: torch.dtype
    head_dim: int
    masked: bool = False
    window: bool = False
    softcap: bool = False
    plain: bool = False
    arch: str = ARCH

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def specs(self) -> tuple[KernelSpec, ...]:
        """Its kernels, and those that prepare operands."""
        kernels = [
            spec
            for masked in dict.fromkeys((self.masked, self.masked and not self.plain))
            for spec in variant(
                self.arch,
                self.dtype_name,
                self.head_dim,
                self.recipe,
                window=self.window,
                masked=masked,
                softcap=self.softcap,
            ).specs()
        ]
        return (*dict.fromkeys(kernels), *preparation_specs(self.arch))

    def __str__(self) -> str:
        extras = [name for name in ("masked", "window", "softcap") if getattr(self, name)]
        return "-".join((self.recipe, self.dtype_name, str(self.head_dim), *extras))


MASKED: Final = Case("int8_fp8", torch.float16, 64, masked=True, plain=True)

# Every recipe, dtype, dim, and what a kernel may have on top; few, since a kernel takes a second to
# build.
CASES: Final = (
    MASKED,
    Case("int8_fp8", torch.bfloat16, 128),
    Case("int8_fp16", torch.float16, 128, masked=True),
    Case("int8_fp16", torch.bfloat16, 64, window=True),
    Case("int4_fp8", torch.float16, 128),
    Case("int4_fp16", torch.float16, 64, softcap=True),
    Case("int4_fp16", torch.bfloat16, 128, masked=True, window=True),
)
