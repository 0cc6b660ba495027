"""A small kernel, its spec, and a compiler that compiles nothing: for what is around kernels."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda.binary import Binary, Resources
from sage_compiler.kernels.cuda.spec import OperandSpec

RESOURCES = Resources(registers=8, spill_stores=0, spill_loads=0, stack=0, static_shared=0)

# Thread i of the grid stores scale * i at out[i], for i < count.
SOURCE = """\
#include <sage/arch.cuh>

#include <cstdint>

namespace sage {

template <int kBlock, int kBytes>
struct Toy {
    struct Params {
        float* out;
        int64_t count;
        float scale;
        float reserved_alignment;
    };
    static constexpr int kThreads = kBlock;
    static constexpr int kSharedBytes = kBytes;
    static constexpr int kMinBlocks = 1;

    SAGE_DEVICE static void run(Params const& params) {
        int64_t const index = arch::block_index() * kThreads + arch::thread_index();
        if (index < params.count) {
            arch::store_global(params.out + index, params.scale * static_cast<float>(index));
        }
    }
};

}  // namespace sage

"""


@dataclass(frozen=True, slots=True)
class ToySpec(OperandSpec):
    """The kernel of ``SOURCE``; its shared memory is only there to be asked for."""

    bytes: int = 0

    kind: ClassVar[str] = "toy"
    template: ClassVar[str] = "Toy"
    params: ClassVar[struct.Struct] = struct.Struct("@Pq2f")

    @property
    def threads(self) -> int:
        return 64

    @property
    def shared_bytes(self) -> int:
        return self.bytes

    @property
    def arguments(self) -> tuple[str, ...]:
        return (str(self.threads), str(self.bytes))


TOY = ToySpec("sm_80", "float16", 64)


def source(spec: ToySpec) -> str:
    """The kernel in one file, as a compiler or the host takes it."""
    arguments = ", ".join(spec.arguments)
    numbers = f"{spec.threads}, {spec.shared_bytes}, {spec.params.size}"
    return f"{SOURCE}SAGE_KERNEL({spec.symbol}, {numbers}, sage::Toy<{arguments}>)\n"


class FakeCompiler:
    """Its image is the source; it counts what it compiles."""

    def __init__(self, identity: str = "fake 1.0", broken: str = "", lacks: str = "") -> None:
        """A source with ``broken`` in it does not compile, nor does any for the arch ``lacks``."""
        self.identity = identity
        self.compiled: list[str] = []
        self._broken = broken
        self._lacks = lacks

    def compile(self, source: str, arch: str) -> Binary:
        self.compiled.append(source)
        if self._broken and self._broken in source:
            raise KernelUnavailableError(f"fake cannot compile a kernel for {arch}: it is broken")
        return Binary(f"{self.identity} {arch}\n{source}".encode(), RESOURCES, "")

    def lacking(self, arch: str) -> str | None:
        return f"fake is older than {arch}" if arch == self._lacks else None


def listed(*opcodes: str) -> str:
    """Machine code as a disassembler lists it."""
    return "".join(f"        /*{at * 16:04x}*/   {name} ;\n" for at, name in enumerate(opcodes))
