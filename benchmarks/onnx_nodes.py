"""Time single attentions in ONNX Runtime: its own chain, our library, and our functions.

    python -m benchmarks.onnx_nodes
    python -m benchmarks.onnx_nodes --threads 2

Ten nodes follow each other in one session, the output of one the query of the next, so that little
of a time is that of the call. The sessions take turns; times are medians for one node, ratios
medians of the rounds' ratios. ONNX Runtime's chain is MatMul, Softmax and MatMul with what it makes
of them; functions run without the library. Writes benchmarks/results/onnx-nodes.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

import sage_compiler as sage
from benchmarks.measure import (
    RESULTS,
    Spread,
    Table,
    describe,
    interleave_for,
    machine,
    ratio,
    save,
)
from sage_compiler.onnx import schema
from sage_compiler.onnx.body import function
from sage_compiler.precision import AUTO, EXACT, RECIPES
from sage_compiler.text import count

NODES: Final = 10
OPSET: Final = 21
CHAIN: Final = "chain"


class Cell(NamedTuple):
    """One attention, float32, head_dim of the value that of the query."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    masked: bool = False  # by floats, (1, 1, queries, keys)

    def __str__(self) -> str:
        return ", ".join(map(str, self[:-1])) + (", float mask" if self.masked else "")


CELLS: Final = (
    Cell(1, 12, 1, 1, 64),
    Cell(1, 12, 8, 8, 64),
    Cell(1, 12, 32, 32, 32),
    Cell(1, 12, 32, 32, 64),
    Cell(1, 12, 48, 48, 128),
    Cell(1, 12, 64, 64, 32),
    Cell(1, 12, 64, 64, 64),
    Cell(1, 12, 128, 128, 64),
    Cell(1, 12, 512, 512, 64),
    Cell(8, 12, 32, 32, 64),
    Cell(8, 12, 128, 128, 64),
    Cell(1, 12, 1, 512, 64),
    Cell(1, 12, 1, 4096, 64),
    Cell(8, 12, 1, 512, 64),
    Cell(8, 12, 1, 4096, 64),
    Cell(1, 12, 64, 64, 64, True),
    Cell(1, 12, 256, 256, 64, True),
)
FUNCTIONS_OF: Final = Cell(1, 12, 512, 512, 64)


def model(cell: Cell, recipe: str | None) -> bytes:
    """Ten attentions in a row, as nodes with their function or, without a recipe, written out."""
    nodes: list[onnx.NodeProto] = []
    functions = []
    scale = cell.head_dim**-0.5
    if recipe is not None:
        mask = schema.Mask.FLOAT if cell.masked else None
        variant = schema.Variant(recipe=recipe, mask=mask)
        functions.append(function(variant, OPSET))
    else:
        nodes.append(helper.make_node("Constant", [], ["scale"], value_float=scale))
        nodes.append(helper.make_node("Transpose", ["key"], ["key_t"], perm=[0, 1, 3, 2]))
    last = "query"
    for number in range(NODES):
        output = f"output_{number}" if number < NODES - 1 else "output"
        if recipe is not None:
            inputs = [last, "key", "value", *(["attn_mask"] if cell.masked else [])]
            nodes.append(
                helper.make_node(
                    schema.NAME,
                    inputs,
                    [output],
                    domain=schema.DOMAIN,
                    overload=variant.overload,
                    recipe=recipe,
                    scale=scale,
                )
            )
        else:
            scaled, scores, weights = (f"{x}_{number}" for x in ("scaled", "scores", "weights"))
            nodes.append(helper.make_node("Mul", [last, "scale"], [scaled]))
            nodes.append(helper.make_node("MatMul", [scaled, "key_t"], [scores]))
            if cell.masked:
                nodes.append(helper.make_node("Add", [scores, "attn_mask"], [f"{scores}_masked"]))
                scores += "_masked"
            nodes.append(helper.make_node("Softmax", [scores], [weights], axis=-1))
            nodes.append(helper.make_node("MatMul", [weights, "value"], [output]))
        last = output
    shapes = {name: array.shape for name, array in inputs_of(cell).items()}
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, shapes["query"])
    made = helper.make_model(
        helper.make_graph(nodes, "attention", values, [result]),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(schema.DOMAIN, 1)],
        functions=functions,
        ir_version=10,
    )
    found: bytes = made.SerializeToString()
    return found


def inputs_of(cell: Cell) -> dict[str, np.ndarray[Any, Any]]:
    """Gaussian tensors."""
    batch, heads, queries, keys, head_dim, masked = cell
    generator = np.random.default_rng(0)
    shapes = {
        "query": (batch, heads, queries, head_dim),
        "key": (batch, heads, keys, head_dim),
        "value": (batch, heads, keys, head_dim),
        **({"attn_mask": (1, 1, queries, keys)} if masked else {}),
    }
    return {name: generator.standard_normal(of, np.float32) for name, of in shapes.items()}


def time_cell(
    cell: Cell, candidates: dict[str, tuple[str | None, bool]], threads: int, seconds: float
) -> dict[str, Any]:
    """Candidates are recipes, None for the chain, and whether the library is there."""
    given = inputs_of(cell)

    def caller(recipe: str | None, library: bool) -> Callable[[], object]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if library:
            options.register_custom_ops_library(sage.ort_library())
        session = onnxruntime.InferenceSession(
            model(cell, recipe), options, providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, given)

    samples = interleave_for(
        {name: caller(*candidate) for name, candidate in candidates.items()}, seconds=seconds
    )
    return {
        "cell": cell._asdict(),
        "us": {name: Spread.of(found).median / NODES for name, found in samples.items()},
        "ratio": {name: ratio(samples, CHAIN, name).median for name in samples if name != CHAIN},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each cell")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    threads, seconds = arguments.threads, arguments.seconds
    used = f"onnxruntime {onnxruntime.__version__}, {count(threads, 'thread')}"
    print(f"{describe(machine())}, {used}\n")

    served = {CHAIN: (None, False), EXACT: (EXACT, True), AUTO: (AUTO, True)}
    table = Table(batch_heads_queries_keys_head_dim=34, chain_us=9, exact=16, auto=16)
    cells = []
    for cell in CELLS:
        cells.append(found := time_cell(cell, served, threads, seconds))
        times, ratios = found["us"], found["ratio"]
        table.print_row(
            str(cell),
            f"{times[CHAIN]:.1f}",
            *(f"{times[name]:.1f}, {ratios[name]:.2f}" for name in (EXACT, AUTO)),
        )
    print()
    recipes = {name: (name, False) for name in (EXACT, *RECIPES)}
    functions = time_cell(FUNCTIONS_OF, {CHAIN: (None, False), **recipes}, threads, 4 * seconds)
    table = Table(function=12, ms=8)
    for name, microseconds in functions["us"].items():
        table.print_row(name, f"{microseconds / 1000:.1f}")
    save(
        "onnx-nodes",
        {
            "onnxruntime": onnxruntime.__version__,
            "threads": threads,
            "cells": cells,
            "functions": functions,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
