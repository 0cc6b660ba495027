"""What a turn of the attention kernel's loop costs: its instructions by class, and the least there
could be. docs/cuda-costs.md says how to read it, and has the table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import partial
from typing import Any, Final

from sage_compiler import rates
from sage_compiler.kernels.cuda.loops import (
    CodeError,
    Instruction,
    is_product,
    parse,
    steady_path,
)
from sage_compiler.kernels.cuda.parallel import each
from sage_compiler.kernels.cuda.render import render
from sage_compiler.kernels.cuda.sass import Disassembler
from sage_compiler.kernels.cuda.spec import AttendSpec, padded_dim
from sage_compiler.kernels.cuda.toolchain import Compiler
from sage_compiler.precision import TILE_MMA, Accumulator, Format


class Class(StrEnum):
    """What an instruction is for."""

    TENSOR = "tensor"
    EXP2 = "exp2"
    CONVERSION = "conversion"
    FLOAT = "float"
    INTEGER = "integer"
    MOVE = "move"
    MEMORY = "memory"
    CONTROL = "control"


# By name, without modifiers, and on all architectures that there are kernels for; what has a U
# before it is the same in uniform registers.
_NAMES: Final[Mapping[Class, str]] = {
    Class.CONVERSION: "F2F F2FP F2I F2IP FRND I2F I2FP I2IP",
    Class.FLOAT: "FADD FADD2 FCHK FFMA FFMA2 FMNMX FMNMX3 FMUL FMUL2 FSEL FSET FSETP FSWZADD "
    "HADD2 HFMA2 HMNMX2 HMUL2 HSETP2 MUFU",
    Class.INTEGER: "BMSK BREV FLO IABS IADD IADD3 IDP IMAD IMNMX ISETP LEA LOP LOP3 PLOP3 POPC "
    "PRMT SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3",
    Class.MOVE: "CS2R MOV P2R R2P R2UR S2R S2UR",
    Class.MEMORY: "LD LDC LDCU LDG LDGSTS LDL LDS LDSM LDTM SHFL ST STG STL STS",
    Class.CONTROL: "BAR BMOV BRA BREAK BRX BSSY BSYNC CALL CCTL DEPBAR ELECT ERRBAR EXIT LDGDEPBAR "
    "MEMBAR NOP RET VOTE WARPSYNC YIELD",
}
_CLASSES: Final[Mapping[str, Class]] = {
    name: kind for kind, names in _NAMES.items() for name in names.split()
}
_NEVER: Final = ("!PT", "!UPT")  # as a predicate: an instruction that only fills a slot
_TO_FLOAT: Final = "HADD2.F32"  # how half becomes float
# Of zeros and a constant: IMAD.MOV and what else ptxas moves by, to spread it over the pipes.
_MOVES: Final = re.compile(r"\S+, -?RZ, RZ, |IMAD\.MOV")

_INTEGER_PRODUCT: Final = "IMMA"
_FEEDING: Final = ("LDSM", "LDGSTS")
_WARP: Final = 32
_SCHEDULERS: Final = 4  # of a multiprocessor, each with a slot a clock
_SHARED_BYTES: Final = 128  # that shared memory passes a clock
_ACCESS_BYTES: Final = 16  # of a thread in LDSM and LDGSTS
_STEP_BYTES: Final = 32  # of the contracted dim in one product, whatever the format
# NVIDIA's whitepapers on Ada and RTX Blackwell: E4M3 products with accumulators of 16 bits.
_HALF_ACCUMULATOR_GAIN: Final = 2


def classify(instruction: Instruction) -> Class:
    """The class of an instruction.

    Raises:
        CodeError: it is none that is known here.
    """
    name, opcode = instruction.name, instruction.opcode
    if instruction.predicate in _NEVER:
        return Class.CONTROL
    if is_product(instruction):
        return Class.TENSOR
    if opcode == "MUFU.EX2":
        return Class.EXP2
    if opcode.startswith(_TO_FLOAT):
        return Class.CONVERSION
    if opcode.startswith("IMAD.MOV") or (
        name in ("HFMA2", "IMAD") and _MOVES.match(instruction.operands)
    ):
        return Class.MOVE
    found = _CLASSES.get(name) or _CLASSES.get(name.removeprefix("U"))
    if found is None:
        raise CodeError(f"{opcode} is of no class that is known here")
    return found


def minimum(spec: AttendSpec) -> dict[Class, int]:
    """The instructions that a warp cannot do without for a tile of keys, by this algorithm.

    For each score: the bias of its integer, a maximum, an FMA, exp2, the row sum, half a packing;
    another FMA where there is a delta. For each element of the output: its decay. Each operand is
    read once. Addresses, branches and moves could all be had for nothing.
    """
    bands, atoms = spec.warp_rows // 16, TILE_MMA.kv_block // 8
    tile, value_padded = spec.tile, padded_dim(spec.value_head_dim)
    key_row = tile.value_offset // TILE_MMA.kv_block * spec.head_dim // padded_dim(spec.head_dim)
    value_row = (tile.scales_offset - tile.value_offset) // value_padded
    qk_steps, pv_steps = -(-key_row // _STEP_BYTES), value_row // _STEP_BYTES
    value_atoms = spec.value_head_dim // 8
    scores = bands * atoms * 4  # of a thread, as is all that follows
    outputs = bands * value_atoms * 4
    rows = bands * 2
    has_delta = spec.qk is Format.INT4
    queries = 0 if spec.head_dim > 128 else bands * qk_steps  # a longer one stays in registers
    copied = tile.bytes - value_row * (value_padded - spec.value_head_dim)
    copies = -(-copied // (spec.threads * _ACCESS_BYTES)) + has_delta
    return {
        Class.TENSOR: bands * (atoms * qk_steps + value_atoms * pv_steps),
        Class.EXP2: scores + rows,
        Class.CONVERSION: scores // 2 + (outputs if spec.accumulator is Accumulator.FP16 else 0),
        Class.FLOAT: scores * (5 if has_delta else 4) + outputs,
        Class.INTEGER: 0,
        Class.MOVE: 0,
        Class.MEMORY: queries
        + atoms // 2 * qk_steps
        + value_atoms // 2 * pv_steps
        + (1 + atoms if has_delta else 1)
        + copies
        + 2 * rows,  # shuffles
        Class.CONTROL: 0,
    }


@dataclass(frozen=True, slots=True)
class Clocks:
    """What a tile of 128 queries and 64 keys takes of each part of a multiprocessor, in clocks.

    Attributes:
        tensor: of the tensor cores.
        issue: of the schedulers' slots, one for each instruction of each warp.
        exp2: of the units that have MUFU.
        floats: of the FP32 lanes.
        shared: of shared memory.
        softmax: of the slots between the last product of Q K^T and the first of P V.
    """

    tensor: float
    issue: float
    exp2: float
    floats: float
    shared: float
    softmax: float

    @property
    def bound(self) -> float:
        """The most of them: nothing is faster, however well the parts overlap."""
        return max(self.tensor, self.issue, self.exp2, self.floats, self.shared)

    @property
    def in_step(self) -> float:
        """The same where all warps do their softmax at once, and the tensor cores wait for it."""
        return max(self.bound, self.tensor + max(self.softmax, self.exp2))


@dataclass(frozen=True, slots=True)
class Cost:
    """What was found of one kernel.

    Attributes:
        counts: instructions of a warp in a steady turn of its main loop, by class.
        names: the same, by their opcodes without modifiers.
        minimum: as ``minimum``.
        softmax: instructions between the last product of Q K^T and the first of P V.
        registers: of a thread.
    """

    spec: AttendSpec
    counts: Mapping[Class, int]
    names: Mapping[str, int]
    minimum: Mapping[Class, int]
    softmax: int
    registers: int

    @property
    def clocks(self) -> Clocks:
        """What the counts take at the rates of ``rates.per_clock``."""
        spec, per_clock = self.spec, rates.per_clock(self.spec.arch)
        pairs = TILE_MMA.q_block * TILE_MMA.kv_block
        steps = -(-spec.head_dim // 64) * 64 if spec.qk is Format.INT4 else spec.head_dim
        gain = _HALF_ACCUMULATOR_GAIN if spec.accumulator is Accumulator.FP16 else 1
        warps = spec.threads // _WARP
        wide = self.names.get("LDSM", 0) + self.names.get("LDGSTS", 0)
        return Clocks(
            tensor=pairs * steps / per_clock.products[spec.qk]
            + pairs * spec.value_head_dim / (gain * per_clock.products[spec.pv]),
            issue=warps * sum(self.counts.values()) / _SCHEDULERS,
            exp2=warps * _WARP * self.counts[Class.EXP2] / per_clock.exp2,
            floats=warps * _WARP * self.counts[Class.FLOAT] / per_clock.floats,
            shared=warps
            * (wide * _WARP * _ACCESS_BYTES / _SHARED_BYTES + self.names.get("LDS", 0)),
            softmax=warps * self.softmax / _SCHEDULERS,
        )

    def to_dict(self) -> dict[str, Any]:
        """Its members, as JSON has them."""
        clocks = self.clocks
        return {
            "arch": self.spec.arch,
            "symbol": self.spec.symbol,
            "registers": self.registers,
            "instructions": dict(self.counts),
            "minimum": dict(self.minimum),
            "opcodes": dict(self.names),
            "softmax": self.softmax,
            "clocks": {field.name: getattr(clocks, field.name) for field in fields(clocks)}
            | {"bound": clocks.bound, "in_step": clocks.in_step},
        }


def costs(
    specs: Sequence[AttendSpec], compiler: Compiler, disassembler: Disassembler, jobs: int
) -> Iterator[Cost]:
    """Compile and look at kernels, in ``jobs`` processes.

    Raises:
        KernelUnavailableError: one does not compile, or cannot be disassembled.
        CodeError: the code of one has not the form that it is read by.
    """
    return each(partial(_examine, compiler, disassembler), specs, jobs)


def of_listing(spec: AttendSpec, listing: str, registers: int) -> Cost:
    """What a kernel costs, from its machine code.

    Raises:
        CodeError: it has not the form that it is read by.
    """
    try:
        path = steady_path(parse(listing), _is_work)
        counts = Counter(map(classify, path))
    except CodeError as error:
        raise CodeError(f"{spec.symbol}: {error}") from None
    return Cost(
        spec,
        {kind: counts[kind] for kind in Class},
        Counter(instruction.name for instruction in path),
        minimum(spec),
        _between_products(path),
        registers,
    )


def _between_products(path: Sequence[Instruction]) -> int:
    """How many instructions are between the products of integers and those of floats."""
    products = [at for at, each in enumerate(path) if is_product(each)]
    of_scores = [at for at in products if path[at].name == _INTEGER_PRODUCT]
    of_values = [at for at in products if path[at].name != _INTEGER_PRODUCT]
    return max(0, min(of_values) - max(of_scores) - 1) if of_scores and of_values else 0


def _is_work(instruction: Instruction) -> bool:
    """What every tile of keys takes, special or not."""
    return classify(instruction) in (Class.TENSOR, Class.EXP2) or instruction.name in _FEEDING


def _examine(compiler: Compiler, disassembler: Disassembler, spec: AttendSpec) -> Cost:
    binary = compiler.compile(render(spec), spec.arch)
    return of_listing(spec, disassembler.listing(binary.image), binary.resources.registers)
