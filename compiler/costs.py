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
from itertools import pairwise
from typing import Any, Final

from sage_compiler import rates
from sage_compiler.kernels.cuda.loops import (
    CodeError,
    Instruction,
    Mark,
    is_product,
    parse,
    steady_path,
)
from sage_compiler.kernels.cuda.parallel import each
from sage_compiler.kernels.cuda.render import render
from sage_compiler.kernels.cuda.sass import Disassembler
from sage_compiler.kernels.cuda.spec import AttendSpec, HopperAttendSpec, padded_dim
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
    Class.MEMORY: "BLKCP LD LDC LDCU LDG LDGSTS LDL LDS LDSM LDTM SHFL ST STG STL STS",
    Class.CONTROL: "BAR BMOV BRA BREAK BRX BSSY BSYNC CALL CCTL DEPBAR ELECT ERRBAR EXIT FENCE "
    "LDGDEPBAR MEMBAR NOP RET SETMAXREG SYNCS VOTE VOTEU WARPGROUP WARPSYNC YIELD",
}
_CLASSES: Final[Mapping[str, Class]] = {
    name: kind for kind, names in _NAMES.items() for name in names.split()
}
_NEVER: Final = ("!PT", "!UPT")  # as a predicate: an instruction that only fills a slot
_TO_FLOAT: Final = "HADD2.F32"  # how half becomes float
# Of zeros and a constant: IMAD.MOV and what else ptxas moves by, to spread it over the pipes.
_MOVES: Final = re.compile(r"\S+, -?RZ, RZ, |IMAD\.MOV")

_INTEGER_PRODUCTS: Final = ("IMMA", "IGMMA")
_FEEDING: Final = ("LDSM", "LDGSTS")
_GLOBAL_LOAD: Final = "LDG"
_WIDTHS: Final = ("U8", "S8", "U16", "S16", "64", "128")  # of a load; without one it is of 32 bits
_FLOAT_LANES: Final = ("FADD", "FFMA", "FMUL")
_MAXIMA: Final = ("FMNMX", "FMNMX3")
_WARP: Final = 32
_SCHEDULERS: Final = 4  # of a multiprocessor, each with a slot a clock
_SHARED_BYTES: Final = 128  # that shared memory passes a clock
_ACCESS_BYTES: Final = 16  # of a thread in LDSM and LDGSTS
_STEP_BYTES: Final = 32  # of the contracted dim in one product, whatever the format
_LARGEST_PRODUCT: Final = 256  # columns of one of wgmma
# CUDA's programming guide, "Arithmetic Instructions": maxima, and conversions of 32 bits.
_HALF_RATE: Final = 64
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


Attend = AttendSpec | HopperAttendSpec


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a kernel's main loop.

    Attributes:
        reads_mask: whether it is of a tile of which a mask of float16 is read, two neighbours at a
            time. Not by wgmma.
    """

    spec: Attend
    reads_mask: bool = False


def minimum(spec: Attend, *, reads_mask: bool = False) -> dict[Class, int]:
    """The instructions that a warp cannot do without for a step of keys, by this algorithm.

    For each score: the bias of its integer, a maximum, an FMA, exp2, the row sum, half a packing;
    another multiplication where something is added to it before the maximum, a delta or a mask, or
    it has a softcap. For each element of the output: its decay. Each operand is read once.
    Addresses, branches and moves could all be had for nothing.

    A mask that is read takes half a load for each score, a conversion, a multiplication, a sum.

    By wgmma an integer becomes a float by a conversion, not by a bias, and a tensor core reads
    operands by itself, of up to 256 columns in one instruction; who copies them is another warp.
    """
    bands, atoms = spec.warp_rows // 16, spec.keys // 8
    scores = bands * atoms * 4  # of a thread, as is all that follows
    outputs = bands * spec.value_head_dim // 8 * 4
    rows = bands * 2
    is_scaled_first = spec.qk is Format.INT4 or spec.masked or spec.softcap
    floats = scores * (4 if is_scaled_first else 3) + outputs
    shuffles = 2 * rows
    if isinstance(spec, HopperAttendSpec):
        at_once = -(-spec.value_head_dim // _LARGEST_PRODUCT)
        tensor = -(-spec.head_dim // _STEP_BYTES) + spec.keys // _STEP_BYTES * at_once
        conversions = scores + scores // 2
        memory = spec.tiles + shuffles
    else:
        tensor = bands * (atoms * _qk_steps(spec) + spec.value_head_dim // 8 * _pv_steps(spec))
        is_half = spec.accumulator is Accumulator.FP16
        conversions = scores // 2 + (outputs if is_half else 0)
        floats += scores
        memory = _operands(spec) + shuffles
    if reads_mask:
        conversions, floats, memory = (
            conversions + scores,
            floats + 2 * scores,
            memory + scores // 2,
        )
    return {
        Class.TENSOR: tensor,
        Class.EXP2: scores + rows,
        Class.CONVERSION: conversions,
        Class.FLOAT: floats,
        Class.INTEGER: 0,
        Class.MOVE: 0,
        Class.MEMORY: memory,
        Class.CONTROL: 0,
    }


def _operands(spec: AttendSpec) -> int:
    """Accesses of a warp to shared memory, of mma.sync: Q, K, V, scales and delta; and copies."""
    bands, atoms, tile = spec.warp_rows // 16, spec.keys // 8, spec.tile
    has_delta = spec.qk is Format.INT4
    queries = 0 if spec.head_dim > 128 else bands * _qk_steps(spec)  # a longer one is in registers
    padding = padded_dim(spec.value_head_dim) - spec.value_head_dim
    copied = tile.bytes - _value_row(spec) * padding
    return (
        queries
        + atoms // 2 * _qk_steps(spec)
        + spec.value_head_dim // 8 // 2 * _pv_steps(spec)
        + (1 + atoms if has_delta else 1)
        + -(-copied // (spec.threads * _ACCESS_BYTES))
        + has_delta
    )


def _qk_steps(spec: AttendSpec) -> int:
    """Products of Q K^T for 8 keys and 16 queries."""
    padded_row = spec.tile.value_offset // spec.keys
    return -(-padded_row * spec.head_dim // padded_dim(spec.head_dim) // _STEP_BYTES)


def _pv_steps(spec: AttendSpec) -> int:
    """Products of P V for 8 channels and 16 queries."""
    return _value_row(spec) // _STEP_BYTES


def _value_row(spec: AttendSpec) -> int:
    """Bytes of a channel of V in a tile."""
    value_bytes = spec.tile.scales_offset - spec.tile.value_offset
    return value_bytes // padded_dim(spec.value_head_dim)


@dataclass(frozen=True, slots=True)
class Clocks:
    """What a tile of 128 queries and 64 keys takes of each part of a multiprocessor, in clocks.

    Attributes:
        tensor: of the tensor cores.
        issue: of the schedulers' slots, one for each instruction of each warp.
        exp2: of the units that have MUFU.
        floats: of the FP32 lanes: FADD, FMUL, FFMA.
        half_rate: of the lanes of maxima and conversions.
        shared: of shared memory; None by wgmma, whose tensor cores read it by themselves.
        softmax: of the slots between the last product of Q K^T and the first of P V; None by
            wgmma, which has products in flight meanwhile.
    """

    tensor: float
    issue: float
    exp2: float
    floats: float
    half_rate: float
    shared: float | None
    softmax: float | None

    @property
    def bound(self) -> float:
        """The most of them: nothing is faster, however well the parts overlap."""
        parts = (self.tensor, self.issue, self.exp2, self.floats, self.half_rate)
        return max(*parts, self.shared or 0.0)

    @property
    def in_step(self) -> float | None:
        """The same where all warps do their softmax at once, and the tensor cores wait for it."""
        if self.softmax is None:
            return None
        return max(self.bound, self.tensor + max(self.softmax, self.exp2))


@dataclass(frozen=True, slots=True)
class Cost:
    """What was found of one kernel.

    Attributes:
        counts: instructions of a warp in a steady turn of its main loop, by class.
        names: the same, by their opcodes without modifiers.
        minimum: as ``minimum``, of all steps of a turn.
        keys: of a turn.
        softmax: instructions between the last product of Q K^T and the first of P V; None by
            wgmma.
        registers: of a thread; by wgmma, at launch.
        reads_mask: as of ``Turn``.
    """

    spec: Attend
    counts: Mapping[Class, int]
    names: Mapping[str, int]
    minimum: Mapping[Class, int]
    keys: int
    softmax: int | None
    registers: int
    reads_mask: bool = False

    @property
    def clocks(self) -> Clocks:
        """What the counts take at the rates of ``rates.per_clock``."""
        spec, by_wgmma = self.spec, isinstance(self.spec, HopperAttendSpec)
        per_clock = rates.per_clock(spec.arch, wgmma=by_wgmma)
        pairs = TILE_MMA.q_block * TILE_MMA.kv_block
        steps = -(-spec.head_dim // 64) * 64 if spec.qk is Format.INT4 else spec.head_dim
        gain = _HALF_ACCUMULATOR_GAIN if spec.accumulator is Accumulator.FP16 else 1
        # Warps that a turn is of, as often as it takes for a tile.
        warps = spec.tile_rows / spec.warp_rows * TILE_MMA.kv_block / self.keys
        lanes = warps * _WARP
        named = self._named
        wide = named("LDSM", "LDGSTS") * _WARP * _ACCESS_BYTES / _SHARED_BYTES
        return Clocks(
            tensor=pairs * steps / per_clock.products[spec.qk]
            + pairs * spec.value_head_dim / (gain * per_clock.products[spec.pv]),
            issue=warps * sum(self.counts.values()) / _SCHEDULERS,
            exp2=lanes * self.counts[Class.EXP2] / per_clock.exp2,
            floats=lanes * named(*_FLOAT_LANES) / per_clock.floats,
            half_rate=lanes * (self.counts[Class.CONVERSION] + named(*_MAXIMA)) / _HALF_RATE,
            shared=None if by_wgmma else warps * (wide + named("LDS")),
            softmax=None if self.softmax is None else warps * self.softmax / _SCHEDULERS,
        )

    def _named(self, *names: str) -> int:
        return sum(self.names.get(name, 0) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Its members, as JSON has them."""
        clocks = self.clocks
        return {
            "arch": self.spec.arch,
            "symbol": self.spec.symbol,
            "registers": self.registers,
            "reads_mask": self.reads_mask,
            "keys": self.keys,
            "instructions": dict(self.counts),
            "minimum": dict(self.minimum),
            "opcodes": dict(self.names),
            "softmax": self.softmax,
            "clocks": {field.name: getattr(clocks, field.name) for field in fields(clocks)}
            | {"bound": clocks.bound, "in_step": clocks.in_step},
        }


def costs(
    turns: Sequence[Turn], compiler: Compiler, disassembler: Disassembler, jobs: int
) -> Iterator[Cost]:
    """Compile and look at kernels, in ``jobs`` processes.

    Raises:
        KernelUnavailableError: one does not compile, or cannot be disassembled.
        CodeError: the code of one has not the form that it is read by.
    """
    return each(partial(_examine, compiler, disassembler), turns, jobs)


def of_listing(turn: Turn, listing: str, registers: int) -> Cost:
    """What a turn of a kernel costs, from its machine code.

    Raises:
        CodeError: it has not the form that it is read by.
    """
    spec = turn.spec
    try:
        path = steady_path(parse(listing), _is_work, _marks(turn))
        counts = Counter(map(classify, path))
    except CodeError as error:
        raise CodeError(f"{spec.symbol}: {error}") from None
    steps = _steps(spec, path)
    return Cost(
        spec,
        {kind: counts[kind] for kind in Class},
        Counter(instruction.name for instruction in path),
        {kind: steps * least for kind, least in minimum(spec, reads_mask=turn.reads_mask).items()},
        steps * spec.keys,
        None if isinstance(spec, HopperAttendSpec) else _between_products(path),
        registers,
        turn.reads_mask,
    )


def _marks(turn: Turn) -> tuple[Mark, ...]:
    """By what a turn of a kernel with a mask is known: of a tile that is shown whole, or read.

    A turn loads what the mask shows of a later tile, 8 bits, if there is one. Each kind of mask has
    ways of its own to be loaded and to be added. So that the one does not go with the other here,
    what is read is what float16 takes: loads of two neighbours, 32 bits, and a conversion of each,
    which no other kind has.
    """
    spec = turn.spec
    if not spec.masked or isinstance(spec, HopperAttendSpec):
        return ()
    scores = spec.warp_rows // 16 * spec.keys // 8 * 4 if turn.reads_mask else 0
    return (
        Mark(lambda each: _loaded(each) == "", scores // 2),
        Mark(lambda each: _loaded(each) == "U8", 1),
        Mark(lambda each: _loaded(each) not in (None, "", "U8"), 0),
        Mark(lambda each: each.opcode.startswith(_TO_FLOAT), scores),
    )


def _loaded(instruction: Instruction) -> str | None:
    """The width of a load from global memory, as its opcode has it; None of anything else."""
    name, *modifiers = instruction.opcode.split(".")
    if name != _GLOBAL_LOAD:
        return None
    return next((each for each in modifiers if each in _WIDTHS), "")


def _steps(spec: Attend, path: Sequence[Instruction]) -> int:
    """How many steps of keys a turn does: the compiler or the template may have unrolled it.

    Raises:
        CodeError: it does no whole number of them.
    """
    if isinstance(spec, HopperAttendSpec):
        of_step = -(-spec.head_dim // _STEP_BYTES)
    else:
        of_step = spec.warp_rows // 16 * spec.keys // 8 * _qk_steps(spec)
    found = sum(instruction.name in _INTEGER_PRODUCTS for instruction in path)
    if not found or found % of_step:
        raise CodeError(
            f"{spec.symbol}: a turn of the main loop has {found} products of Q K^T; {of_step} are "
            f"those of {spec.keys} keys"
        )
    return found // of_step


def _between_products(path: Sequence[Instruction]) -> int:
    """How many instructions are between products of integers and the next ones of floats."""
    products = [at for at, each in enumerate(path) if is_product(each)]
    return sum(
        after - before - 1
        for before, after in pairwise(products)
        if path[before].name in _INTEGER_PRODUCTS and path[after].name not in _INTEGER_PRODUCTS
    )


def _is_work(instruction: Instruction) -> bool:
    """What every tile of keys takes, special or not."""
    return classify(instruction) in (Class.TENSOR, Class.EXP2) or instruction.name in _FEEDING


def _examine(compiler: Compiler, disassembler: Disassembler, turn: Turn) -> Cost:
    binary = compiler.compile(render(turn.spec), turn.spec.arch)
    return of_listing(turn, disassembler.listing(binary.image), binary.resources.registers)
