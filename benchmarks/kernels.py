"""Time attention kernels against torch's scaled_dot_product_attention, accuracy beside speed.

    python -m benchmarks.kernels                              # --preset reach
    python -m benchmarks.kernels --preset grid                # never slower; exits with 1 if it is
    python -m benchmarks.kernels --preset decode              # a packed cache of keys and values
    python -m benchmarks.kernels --preset recipes             # each recipe, each instruction set
    python -m benchmarks.kernels --length 512 1024 --head-dim 64 --mask none causal \\
        --precision int8_int8 int8_int16 --threads 2          # your own

All candidates of a cell take turns in one process; times are medians, and ratios are medians of
the rounds' ratios (above 1: faster than SDPA in the same dtype), with their 10th and 90th
percentile. Accuracy is cosine and relative L1 against float64 on the same inputs, over some rows
and heads. Writes benchmarks/results/kernels-NAME.json and, with the extra ``bench``, .png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from benchmarks import decode
from benchmarks.cells import DTYPES, MASKS, Cell, measure
from benchmarks.measure import RESULTS, Table, describe, machine, save
from benchmarks.presets import LEAST_RATIO, LONG_ENOUGH, MOST_ADDED, PRESETS, Preset, passed
from sage_compiler.kernels.cpu.library import Library, load
from sage_compiler.precision import PRECISIONS

ISA_VARIABLE: Final = "SAGE_CPU_ISA"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    presets = "; ".join(f"{name}: {preset.help}" for name, preset in PRESETS.items())
    add = parser.add_argument
    add("--preset", choices=(*PRESETS, "decode"), help=f"{presets}; decode: sage.PackedKV")
    own = parser.add_argument_group("cells of your own, all combinations, instead of a preset")
    own.add_argument("--length", type=int, nargs="+", default=[], help="of query, key and value")
    own.add_argument("--kv-length", type=int, nargs="+", default=[], help="where it differs")
    own.add_argument("--head-dim", type=int, nargs="+", default=[64])
    own.add_argument("--mask", nargs="+", choices=MASKS, default=["none"])
    own.add_argument("--batch", type=int, default=1)
    own.add_argument("--heads", type=int, default=8)
    own.add_argument("--kv-heads", type=int, help="default: as many as heads")
    add("--threads", type=int, nargs="+", help="instead of the preset's; default: 1")
    add("--longest", type=int, help="leave out longer cells")
    add("--precision", nargs="+", choices=PRECISIONS, help="what to time")
    add("--dtype", nargs="+", choices=tuple(DTYPES), help="default: float32 bfloat16")
    add("--seconds", type=float, help="how long to measure each cell, about")
    add("--isa", nargs="*", help="run once with each of these instruction sets")
    add("--peak", type=float, help="INT8 dot products' peak here, G operations/s per thread")
    add("--name", help="of the results; default: the preset's, or custom")
    add("--folder", type=Path, default=RESULTS, help="of the results")
    add("--no-plot", action="store_true", help="write no .png")
    arguments = parser.parse_args(argv)
    if arguments.preset and arguments.length:
        parser.error("--preset and --length: choose one")
    return arguments


def chosen(arguments: argparse.Namespace) -> Preset:
    """The preset, or the cells of the arguments, with what the arguments override."""
    if arguments.length:
        cells = tuple(
            Cell(
                q_len=length,
                kv_len=kv_length or length,
                head_dim=head_dim,
                mask=mask,
                batch=arguments.batch,
                heads=arguments.heads,
                kv_heads=arguments.kv_heads or arguments.heads,
            )
            for head_dim, mask, length, kv_length in product(
                arguments.head_dim, arguments.mask, arguments.length, arguments.kv_length or [None]
            )
        )
        preset = Preset("your own", cells)
    elif arguments.preset == "decode":
        preset = Preset("decoding", decode.CELLS, seconds=2.0)
    else:
        preset = PRESETS[arguments.preset or "reach"]
    cells = preset.cells
    if arguments.threads:
        every = (replace(cell, threads=n) for n in arguments.threads for cell in cells)
        cells = tuple(dict.fromkeys(every))
    if arguments.longest:
        cells = tuple(cell for cell in cells if max(cell.q_len, cell.kv_len) <= arguments.longest)
    return replace(
        preset,
        cells=cells,
        precisions=tuple(arguments.precision or preset.precisions),
        dtypes=tuple(arguments.dtype or preset.dtypes),
        seconds=arguments.seconds or preset.seconds,
    )


def run(preset: Preset, peak: float | None) -> Iterator[dict[str, Any]]:
    """Measure all cells of a preset, printing the rows as they come."""
    columns = {"of_peak": 0} if peak else {}
    columns |= {"added_us": 0, "verdict": 0} if preset.verdict else {}
    table = Table(
        cell=34, dtype=8, precision=10, kernel=14, SDPA_us=9, sage_us=9, ratio_p10_p90=18,
        vs_fp32=0, vs_bf16=0, GFLOP_s=0, cosine=8, rel_L1=0, **columns,
    )  # fmt: skip
    told: set[str] = set()
    for cell in preset.cells:
        rows, left_out = measure(
            cell, preset.precisions, preset.dtypes, seconds=preset.seconds, peak=peak
        )
        if preset.verdict and not all(passed(row) for row in rows):
            # Once more and for longer: a busy machine fails cells at random.
            again = 3 * preset.seconds
            rows, _ = measure(cell, preset.precisions, preset.dtypes, seconds=again, peak=peak)
        for row in rows:
            if preset.verdict:
                row["passed"] = passed(row)
            table.print_row(*texts(cell, row))
            yield row
        for reason in left_out:
            if reason not in told:
                print(f"left out: {reason}")
        told.update(left_out)


def texts(cell: Cell, row: dict[str, Any]) -> Iterator[str]:
    """The row's cells in the table that ``run`` prints."""
    yield from (cell.label(), row["dtype"], row["precision"], row["kernel"])
    yield f"{row['sdpa_us']:.1f}"
    yield f"{row['us']:.1f}"
    yield f"{row['ratio']:.2f} [{row['ratio_p10']:.2f}, {row['ratio_p90']:.2f}]"
    for name in ("vs_float32", "vs_bfloat16"):
        yield f"{row[name]:.2f}" if name in row else ""
    yield f"{row['gflops']:.0f}"
    yield f"{row['cosine']:.6f}"
    yield f"{row['rel_l1']:.4f}"
    if row["of_peak"] is not None:
        yield f"{row['of_peak']:.0%}"
    if "passed" in row:
        yield f"{row['added_us']:+.1f}"
        yield "pass" if row["passed"] else "FAIL"


def available_isas() -> list[str]:
    """The instruction sets that our library has here, the slowest first; none without a library."""
    library = load()
    return list(library.isas()) if isinstance(library, Library) else []


def run_isas(isas: Sequence[str], argv: Sequence[str], name: str) -> Iterator[dict[str, Any]]:
    """The same command once for each instruction set, which the library chooses as it is loaded."""
    for isa in isas:
        print(f"\n{ISA_VARIABLE}={isa}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.kernels", *argv]
            # The last of repeated options counts; without a set to name, --isa runs just once.
            command += ["--folder", folder, "--no-plot", "--name", name, "--isa"]
            child = subprocess.run(command, env={**os.environ, ISA_VARIABLE: isa}, check=False)
            if child.returncode:
                print(f"{isa}: failed with exit status {child.returncode}")
            path = Path(folder) / f"{name}.json"
            if path.exists():
                yield from json.loads(path.read_text())["rows"]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    given = sys.argv[1:] if argv is None else argv
    preset = chosen(arguments)
    kind = "custom" if arguments.length else arguments.preset or "reach"
    name = arguments.name or f"kernels-{kind}"
    isas = available_isas() if preset.every_isa and arguments.isa is None else arguments.isa
    print(describe(machine()))
    if isas:
        rows = list(run_isas(isas, given, name))
    elif kind == "decode":
        rows = list(decode.run(preset.cells, preset.dtypes, preset.seconds))
    else:
        rows = list(run(preset, arguments.peak))
    if not rows:
        print("nothing was measured")
        return 1
    save(name, {"preset": kind, "rows": rows}, arguments.folder)
    if not arguments.no_plot:
        from benchmarks import plots  # needs matplotlib, which the rest does not

        plots.plot_kernels(kind, rows, arguments.folder / f"{name}.png")
    return verdict(rows) if preset.verdict else 0


def verdict(rows: Sequence[dict[str, Any]]) -> int:
    """Say how many rows are never slower; 0 if all are."""
    failed = [row for row in rows if not row["passed"]]
    print(
        f"never slower: {len(rows) - len(failed)} of {len(rows)} (at least {LEAST_RATIO} x where "
        f"SDPA takes {LONG_ENOUGH:.0f} us, at most {MOST_ADDED:.0f} us more where it is shorter)"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
