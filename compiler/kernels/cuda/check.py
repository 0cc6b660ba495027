"""Whether a kernel became the machine code that it must be, whatever GPU is here.

An instruction that an architecture lacks does not fail to compile: CuTe makes a trap of it, and
the compiler a call or a sequence of others. So the code itself is looked at. Of PTX it is the text,
and what its compiler made of it for the least GPU that it is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import ptx
from sage_compiler.kernels.cuda.arch import PORTABLE, named
from sage_compiler.kernels.cuda.binary import Resources
from sage_compiler.kernels.cuda.dispatch import default_recipe
from sage_compiler.kernels.cuda.loops import CodeError, parse
from sage_compiler.kernels.cuda.parallel import each
from sage_compiler.kernels.cuda.preparation import PreparationSpec
from sage_compiler.kernels.cuda.render import render
from sage_compiler.kernels.cuda.roles import SET_REGISTERS, roles
from sage_compiler.kernels.cuda.sass import Disassembler, before, count, occurrences
from sage_compiler.kernels.cuda.spec import (
    WARPGROUP,
    AppendSpec,
    AttendSpec,
    DeltaSpec,
    HopperAttendSpec,
    KernelSpec,
    KeyMeanSpec,
    KeySpec,
    MergeSpec,
    OperandSpec,
    QuantizeSpec,
    QuerySpec,
    StatisticsSpec,
    ValueSpec,
)
from sage_compiler.kernels.cuda.toolchain import Compiler
from sage_compiler.precision import RECIPES, Accumulator, Format
from sage_compiler.text import columns

# Bytes per thread. A variant that is nobody's default may keep a few rarely used registers in
# local memory.
SPILL_BUDGET: Final = 64
_LARGEST_WITHOUT_SPILLS: Final = 128  # head_dim
# Above it the output alone takes most registers. What there is today, at 256 in FP8 with a window,
# a mask and a softcap: no more than that, until a GPU can say what it costs.
_LARGE_SPILL_BUDGET: Final = 512

_TRAP: Final = "BPT.TRAP"  # CuTe's "this architecture has no such instruction"
_CALL: Final = "CALL"  # of an emulation, or of a division's slow path
_RETURN: Final = "RET"  # ptxas leaves some loops by a CALL too, from which nothing returns
_ASYNC_COPY: Final = "LDGSTS"
_STREAMING_STORE: Final = "STG.E.EF"  # of what leaves the caches first
_LOAD_MATRIX: Final = "LDSM"
_QK_PRODUCTS: Final[Mapping[Format, str]] = {
    Format.INT4: "IMMA.16864.S4",
    Format.INT8: "IMMA.16832.S8",
}
_PV_PRODUCTS: Final[Mapping[Format, str]] = {Format.FP8: "QMMA.16832", Format.FP16: "HMMA.16816"}
_HALF_PRODUCT: Final = "HMMA"
_WGMMA_PRODUCTS: Final = ("IGMMA", "QGMMA")
_BULK_COPY: Final = "UBLKCP"
_TENSOR_COPY: Final = "UTMALDG"
_LOCAL_MEMORY: Final = ("LDL", "STL")
# Of launches that depend on one another: griddepcontrol.wait and .launch_dependents.
_AWAIT_PREREQUISITES: Final = "ACQBULK"
_LAUNCH_DEPENDENTS: Final = "PREEXIT"
_READ_ONLY: Final = ".CONSTANT"  # of a load: nobody stores there while the kernel runs
_GLOBAL_MEMORY: Final = (
    *("LD", "LDG", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "LDGSTS"),
    _BULK_COPY,
    _TENSOR_COPY,
)
_SERIALIZED: Final = "(C75"  # ptxas waits for products of wgmma, one by one, and says so
# The same in PTX: a multiplication that its GPUs lack cannot be named in it, a trap or a call can.
_PTX_PRODUCTS: Final[Mapping[Format, str]] = {
    Format.INT8: "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
    Format.FP16: "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
}
_PTX_COPIES: Final = ("cp.async.cg.shared.global", "ldmatrix.sync.aligned")
_PTX_FORBIDDEN: Final = ("trap", "brkpt", "call", "griddepcontrol")
_SHOWN: Final = (
    *_QK_PRODUCTS.values(),
    *_PV_PRODUCTS.values(),
    *_WGMMA_PRODUCTS,
    _BULK_COPY,
    _TENSOR_COPY,
    _AWAIT_PREREQUISITES,
    _LAUNCH_DEPENDENTS,
    "HMMA.1688",
    _ASYNC_COPY,
    _LOAD_MATRIX,
    _CALL,
    _TRAP,
    *_PTX_PRODUCTS.values(),
    *_PTX_COPIES,
    *_PTX_FORBIDDEN,
)


@dataclass(frozen=True, slots=True)
class Row:
    """What was found of one kernel.

    Attributes:
        resources: None when it does not compile.
        shared_bytes: of a block, dynamic and static.
        opcodes: counts of the telling ones, with whatever modifiers.
        problems: one sentence each; empty when the kernel is as it must be.
        warnings: the compiler's.
    """

    arch: str
    symbol: str
    resources: Resources | None
    shared_bytes: int
    opcodes: Mapping[str, int]
    problems: tuple[str, ...]
    warnings: str

    def to_dict(self) -> dict[str, Any]:
        """Its members, as JSON has them."""
        resources = self.resources
        return {
            "arch": self.arch,
            "symbol": self.symbol,
            "registers": resources and resources.registers,
            "spill_stores": resources and resources.spill_stores,
            "spill_loads": resources and resources.spill_loads,
            "stack": resources and resources.stack,
            "shared_bytes": self.shared_bytes,
            "opcodes": dict(self.opcodes),
            "problems": list(self.problems),
            "warnings": self.warnings,
        }


def check(
    specs: Sequence[KernelSpec], compiler: Compiler, disassembler: Disassembler, jobs: int
) -> Iterator[Row]:
    """Compile and look at kernels, in ``jobs`` processes."""
    return each(partial(_examine, compiler, disassembler), specs, jobs)


def problems(
    spec: KernelSpec, opcodes: Counter[str], resources: Resources, warnings: str = ""
) -> tuple[str, ...]:
    """What is wrong with the code of a kernel, one sentence each."""
    found = [
        f"no {opcode}, which it must have"
        for opcode in required(spec)
        if not occurrences(opcodes, opcode)
    ]
    for opcode in forbidden(spec):
        times = occurrences(opcodes, opcode)
        if times and (opcode != _CALL or occurrences(opcodes, _RETURN)):
            found.append(f"{opcode} {times} times, which it must not have")
    budget = spill_budget(spec)
    spilled = max(resources.spill_stores, resources.spill_loads, resources.stack)
    if spilled > budget:
        found.append(f"{spilled} bytes of spills or stack; at most {budget}")
    shared, most = spec.shared_bytes + resources.static_shared, named(spec.arch).shared_bytes
    if shared > most:
        found.append(f"{shared} bytes of shared memory; {spec.arch} has {most}")
    found += [line.strip() for line in warnings.splitlines() if _SERIALIZED in line]
    return tuple(found)


def problems_of_order(spec: KernelSpec, listing: str) -> Iterator[str]:
    """What a kernel does before it waits for those that it depends on, one sentence each.

    In the order of the code, which is that of execution up to there but for branches.
    """
    if _AWAIT_PREREQUISITES not in required(spec):
        return
    for opcode, times in before(listing, _AWAIT_PREREQUISITES).items():
        name = opcode.partition(".")[0]
        if name in _GLOBAL_MEMORY and not opcode.endswith(_READ_ONLY):
            yield f"{opcode} {times} times before {_AWAIT_PREREQUISITES}"


def problems_of_roles(spec: KernelSpec, listing: str, resources: Resources) -> Iterator[str]:
    """What is wrong with the registers of warpgroups that differ, one sentence each.

    Who asks for more than the others gave back waits forever, and nothing in the hardware keeps
    code from naming registers beyond its share.
    """
    if SET_REGISTERS not in required(spec):
        return
    try:
        found = tuple(roles(parse(listing)))
    except CodeError as error:
        yield str(error)
        return
    for role in found:
        if role.used > role.registers:
            yield f"code uses {role.used} registers where setmaxnreg leaves {role.registers}"
    left = {role.registers for role in found if not role.takes}
    taken = {role.registers for role in found if role.takes}
    if len(left) != 1 or len(taken) != 1:
        yield (
            f"setmaxnreg leaves warpgroups {sorted(left)} registers and gives {sorted(taken)}; "
            "one number each is needed"
        )
        return
    warpgroups = spec.threads // WARPGROUP  # the producer's and those of consumers
    asked, launched = left.pop() + (warpgroups - 1) * taken.pop(), warpgroups * resources.registers
    if asked > launched:
        yield f"setmaxnreg asks for {asked} registers in all; a launch gives {launched}"


def problems_of_ptx(spec: KernelSpec, text: str) -> Iterator[str]:
    """What is wrong with the text of a kernel in PTX besides ``problems``, one sentence each."""
    least = PORTABLE.name.replace("compute_", "sm_")
    if ptx.target(text) != least:
        yield f"it is for {ptx.target(text) or 'no target'}, and must be for {least}"
    local, budget = ptx.local_bytes(text), spill_budget(spec)
    if local > budget:
        yield f"{local} bytes of variables in local memory; at most {budget}"


def required(spec: KernelSpec) -> tuple[str, ...]:
    """The opcodes that a kernel must have, with whatever modifiers after them."""
    if spec.arch == PORTABLE.name:
        if not isinstance(spec, AttendSpec):
            return ()
        return (_PTX_PRODUCTS[spec.qk], _PTX_PRODUCTS[spec.pv], *_PTX_COPIES)
    return (*_computing(spec), *_overlapping(spec))


def _overlapping(spec: KernelSpec) -> Iterator[str]:
    """What a kernel waits with, and lets others begin."""
    if named(spec.arch).overlaps_launches:
        if spec.awaits_prerequisites:
            yield _AWAIT_PREREQUISITES
        if spec.launches_dependents:
            yield _LAUNCH_DEPENDENTS


def _computing(spec: KernelSpec) -> tuple[str, ...]:
    """The products of an attention kernel, and what brings their operands."""
    if isinstance(spec, HopperAttendSpec):
        of_mask = (_TENSOR_COPY,) if spec.mask_places else ()
        return (*_WGMMA_PRODUCTS, _BULK_COPY, *of_mask, SET_REGISTERS)
    if isinstance(spec, QuantizeSpec):
        return (_STREAMING_STORE,)
    if not isinstance(spec, AttendSpec):
        return ()
    accumulator = "F16" if spec.accumulator is Accumulator.FP16 else "F32"
    return (
        _QK_PRODUCTS[spec.qk],
        f"{_PV_PRODUCTS[spec.pv]}.{accumulator}",
        _ASYNC_COPY,
        _LOAD_MATRIX,
    )


def forbidden(spec: KernelSpec) -> tuple[str, ...]:
    """The opcodes that a kernel must not have."""
    if spec.arch == PORTABLE.name:
        return _PTX_FORBIDDEN
    overlaps = named(spec.arch).overlaps_launches
    always = (_TRAP, _CALL, *(() if overlaps else (_AWAIT_PREREQUISITES, _LAUNCH_DEPENDENTS)))
    if isinstance(spec, AttendSpec) and spec.pv is Format.FP8:
        return (*always, _HALF_PRODUCT)  # an emulation converts to half
    if isinstance(spec, HopperAttendSpec):
        return (*always, _HALF_PRODUCT, *_LOCAL_MEMORY)
    return always


def spill_budget(spec: KernelSpec) -> int:
    """The most bytes of registers that a thread may keep in local memory."""
    if isinstance(spec, HopperAttendSpec):
        return 0  # in no head_dim: its products wait for one another where registers are spilled
    if isinstance(spec, OperandSpec) and spec.head_dim > _LARGEST_WITHOUT_SPILLS:
        return _LARGE_SPILL_BUDGET
    return 0 if is_default(spec) else SPILL_BUDGET


def is_default(spec: KernelSpec) -> bool:
    """Whether the default recipe of the spec's architecture uses it."""
    recipe = RECIPES[default_recipe(spec.arch)]
    match spec:
        case (
            AttendSpec(qk=qk, pv=pv, accumulator=accumulator)
            | HopperAttendSpec(qk=qk, pv=pv, accumulator=accumulator)
            | QuantizeSpec(qk=qk, pv=pv, accumulator=accumulator)
        ):
            return (qk, pv, accumulator) == (recipe.qk, recipe.pv, recipe.accumulator)
        case AppendSpec(qk=qk, pv=pv):
            return (qk, pv) == (recipe.qk, recipe.pv)
        case QuerySpec(qk=qk) | KeySpec(qk=qk):
            return qk is recipe.qk
        case DeltaSpec():
            return recipe.qk is Format.INT4
        case ValueSpec(pv=pv, accumulator=accumulator):
            return (pv, accumulator) == (recipe.pv, recipe.accumulator)
        case StatisticsSpec() | KeyMeanSpec() | MergeSpec() | PreparationSpec():
            return True
    raise TypeError(f"{type(spec).__name__} is no kind of kernel that is known here")


def table(rows: Iterable[Row]) -> str:
    """The rows as text, with the problems and the warnings below."""
    lines = [("arch", "variant", "registers", "spills", "shared", "opcodes", "verdict")]
    notes = []
    for row in rows:
        resources = row.resources
        lines.append(
            (
                row.arch,
                row.symbol,
                str(resources.registers) if resources else "-",
                f"{resources.spill_stores}/{resources.spill_loads}" if resources else "-",
                str(row.shared_bytes),
                " ".join(f"{name}:{times}" for name, times in row.opcodes.items()) or "-",
                "FAILED" if row.problems else "ok",
            )
        )
        notes += [f"{row.symbol}: {problem}" for problem in row.problems]
        notes += [f"{row.symbol}: {line}" for line in row.warnings.splitlines()]
    return "\n".join([*columns(lines), *([""] if notes else []), *notes])


def _examine(compiler: Compiler, disassembler: Disassembler, spec: KernelSpec) -> Row:
    try:
        binary = compiler.compile(render(spec), spec.arch)
        text = binary.image.decode() if spec.arch == PORTABLE.name else None
        listing = disassembler.listing(binary.image) if text is None else text
    except KernelUnavailableError as error:
        return Row(spec.arch, spec.symbol, None, spec.shared_bytes, {}, (str(error),), "")
    opcodes = count(listing) if text is None else ptx.count(text)
    counts = {name: occurrences(opcodes, name) for name in _SHOWN}
    found = problems(spec, opcodes, binary.resources, binary.warnings)
    if text is None:
        found += (
            *problems_of_order(spec, listing),
            *problems_of_roles(spec, listing, binary.resources),
        )
    else:
        found += tuple(problems_of_ptx(spec, text))
    return Row(
        arch=spec.arch,
        symbol=spec.symbol,
        resources=binary.resources,
        shared_bytes=spec.shared_bytes + binary.resources.static_shared,
        opcodes={name: times for name, times in counts.items() if times},
        problems=found,
        warnings=binary.warnings,
    )
