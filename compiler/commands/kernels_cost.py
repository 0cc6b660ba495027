"""The command ``sagec kernels cost``: what a tile of keys costs, from the machine code alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from sage_compiler.commands import kernels_compiling, options
from sage_compiler.costs import Attend, Class, Cost, Turn, costs
from sage_compiler.errors import UsageError
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.sass import Disassembler
from sage_compiler.kernels.cuda.spec import HEAD_DIMS, AttendSpec
from sage_compiler.kernels.cuda.variants import half_sums, packed_caches, variant, variants
from sage_compiler.precision import Accumulator
from sage_compiler.text import columns

_COST: Final = """\
Count the instructions that the attention kernels execute for a tile of keys, by class,
against the least there could be, and what they take of each part of a multiprocessor. Nothing is
run: it compiles the kernels in bfloat16 and finds their main loops in the machine code. What the
numbers mean is in docs/cuda-costs.md.

    sagec kernels cost --arch sm_89"""
_DTYPE: Final = "bfloat16"  # the loop does not see it: operands are quantized, output is after it
_BEGIN: Final = "<!-- sagec kernels cost -->\n"
_END: Final = "<!-- end -->\n"


def add_command(actions: options.Commands) -> None:
    """Give ``sagec kernels`` the command."""
    parser = options.add_command(
        actions,
        "cost",
        _cost,
        summary="instructions for a tile of keys, by class, from the machine code",
        description=_COST,
    )
    kernels_compiling.add_compiling(parser, "all by default")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="put the tables into a document, in place of those that it has",
    )
    options.add_json(parser)


def attend_specs(arch: str) -> list[Attend]:
    """The attention kernels whose cost is told, each once, in one dtype.

    Those of a pack, of few queries and caches too; of the recipe that ``auto`` means every
    head_dim, with an explicit mask and without; and those of FP16 sums.
    """
    recipes = ARCHS[arch].recipes
    found = [each.attend for each in variants(arch)]
    found += [each.attend for each in packed_caches(arch)]
    found += [
        variant(arch, _DTYPE, head_dim, recipes[0], masked=masked).attend
        for head_dim in HEAD_DIMS
        for masked in (False, True)
    ]
    found += [each.attend for recipe in recipes for each in half_sums(arch, recipe)]

    def place(spec: Attend) -> tuple[bool, bool, bool, int, int, bool]:
        recipe = recipes.index(f"{spec.qk}_{spec.pv}")
        half = spec.accumulator is Accumulator.FP16
        return spec.tile_scales, spec.packed_heads, spec.masked, spec.head_dim, recipe, half

    return sorted((spec for spec in dict.fromkeys(found) if spec.dtype == _DTYPE), key=place)


def turns(specs: Iterable[Attend]) -> list[Turn]:
    """Those of which the cost is told: with a mask both, of whole query blocks by ``mma.sync``."""
    return [
        Turn(spec, reads_mask)
        for spec in specs
        for reads_mask in (False, True)
        if not reads_mask
        or (spec.masked and isinstance(spec, AttendSpec) and not spec.packed_heads)
    ]


def _cost(arguments: argparse.Namespace) -> int:
    specs = [spec for arch in kernels_compiling.archs(arguments) for spec in attend_specs(arch)]
    document = None if arguments.write is None else _read(arguments.write)
    compiler = kernels_compiling.compiler(arguments)
    jobs = kernels_compiling.jobs(arguments)
    wanted = turns(specs)
    found = costs(wanted, compiler, Disassembler.find(), jobs)
    rows = list(kernels_compiling.progress(found, len(wanted)))
    if document is not None:
        before, after = document
        with options.writing(arguments.write):
            tables = markdown(rows, compiler.identity)
            arguments.write.write_text(f"{before}{tables}{after}", encoding="utf-8")
    elif arguments.json:
        options.print_json([row.to_dict() for row in rows])
    else:
        print("\n".join([*columns(instructions(rows)), "", *columns(clocks(rows))]))
    return options.OK


def instructions(rows: Iterable[Cost]) -> list[Sequence[str]]:
    """A table with its heading: instructions by class, with the least where they are more."""
    lines: list[Sequence[str]] = [("arch", "kernel", "registers", "keys", *Class, "all")]
    for row in rows:
        pairs = [(row.counts[kind], row.minimum[kind]) for kind in Class]
        pairs.append((sum(row.counts.values()), sum(row.minimum.values())))
        cells = [str(got) if got == least else f"{got} ({least})" for got, least in pairs]
        own = (row.spec.arch, _name(row), str(row.registers), str(row.keys))
        lines.append((*own, *cells))
    return lines


def clocks(rows: Iterable[Cost]) -> list[Sequence[str]]:
    """A table with its heading: clocks of a multiprocessor, and the ends over the tensor cores'."""
    parts = ("tensor", "issue", "exp2", "float", "half rate", "shared", "softmax")
    lines: list[Sequence[str]] = [("arch", "kernel", *parts, "overlapped", "in step")]
    for row in rows:
        found = row.clocks
        taken = (
            found.tensor,
            found.issue,
            found.exp2,
            found.floats,
            found.half_rate,
            found.shared,
            found.softmax,
        )
        ends = (each and each / found.tensor for each in (found.bound, found.in_step))
        cells = [*(_number(each, 0) for each in taken), *(_number(each, 2) for each in ends)]
        lines.append((row.spec.arch, _name(row), *cells))
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(rows: Sequence[Cost], compiler: str) -> str:
    """Both tables, and what made the code."""
    tables = "\n".join(_markdown_table(cells(rows)) for cells in (instructions, clocks))
    return f"{_BEGIN}\nCompiled by {compiler}.\n\n{tables}\n{_END}"


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(cells)} |\n" for cells in lines]
    return "".join([rows[0], "|---" * len(lines[0]) + "|\n", *rows[1:]])


def _name(row: Cost) -> str:
    spec = row.spec
    mask = ", mask read" if row.reads_mask else ", mask" if spec.masked else ""
    half = " (FP16 sums)" if spec.accumulator is Accumulator.FP16 else ""
    few = ", few queries" if spec.packed_heads else ""
    cache = ", cache" if spec.tile_scales else ""
    return f"{spec.qk}_{spec.pv}{half} {spec.head_dim}{cache}{few}{mask}"


def _read(path: Path) -> tuple[str, str]:
    """What is before and after the tables of a document.

    Raises:
        UsageError: it cannot be read, or has no place for them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {str(path)!r}: {error}") from None
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise UsageError(
            f"{str(path)!r} has no place for the tables: a line {_BEGIN.strip()!r}, and below it "
            f"a line {_END.strip()!r}"
        )
    return before, after
