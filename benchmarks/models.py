"""Time whole models: torch.compile with backend="sage", with Inductor, and eager.

    python -m benchmarks.models
    python -m benchmarks.models --model vit_l minilm --dtype bfloat16 --threads 1

The three take turns in one process; times are medians, ratios are medians of the rounds' ratios.
Outputs are compared with eager float32. Beside them stands attention's share of eager's time:
if attention took no time at all, eager would be 1 / (1 - share) times faster, and no more.
The transformers have random weights (architectures.py), all-MiniLM-L6-v2 its real ones. Writes
benchmarks/results/models-DTYPE.json and, with the extra ``bench``, .png.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import sage_compiler as sage
from benchmarks.architectures import transformer
from benchmarks.cells import DTYPES
from benchmarks.measure import (
    RESULTS,
    Samples,
    Spread,
    Table,
    describe,
    interleave_for,
    machine,
    ratio,
    save,
)
from sage_compiler.precision import AUTO, PRECISIONS
from tests.tolerances import cosine, rel_l1

MINILM_BATCH: Final = 8
MINILM_LENGTH: Final = 512


def minilm() -> tuple[nn.Module, dict[str, Tensor]]:
    """all-MiniLM-L6-v2 with its real weights, and text that fills its longest input."""
    from examples.minilm import (
        SENTENCES,
        AutoModel,
        AutoTokenizer,
        disable_progress_bar,
        model_folder,
    )

    disable_progress_bar()
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    step = len(sentences) // MINILM_BATCH
    texts = [" ".join(sentences[i * step :] + sentences[: i * step]) for i in range(MINILM_BATCH)]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    arguments = tokenizer(texts, truncation=True, max_length=MINILM_LENGTH, return_tensors="pt")
    return AutoModel.from_pretrained(model_folder()).eval(), dict(arguments)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to time."""

    title: str
    weights: str
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]


SUBJECTS: Final = {
    "dit_s": Subject(
        "DiT-S, 4096 tokens", "random", partial(transformer, 384, 6, 12, 4096, adaptive=True)
    ),
    "dit_b": Subject(
        "DiT-B, 4096 tokens", "random", partial(transformer, 768, 12, 12, 4096, adaptive=True)
    ),
    "vit_l": Subject(
        "ViT-L, 577 tokens", "random", partial(transformer, 1024, 16, 24, 577, adaptive=False)
    ),
    "minilm": Subject(
        f"MiniLM-L6, {MINILM_BATCH} x {MINILM_LENGTH} tokens", "all-MiniLM-L6-v2", minilm
    ),
}


def output_of(result: Any) -> Tensor:
    """The tensor that is compared."""
    return result if isinstance(result, Tensor) else result.last_hidden_state


class AttentionClock(TorchFunctionMode):
    """Sums up the time of scaled_dot_product_attention while it is active, in seconds."""

    seconds = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds += time.perf_counter() - start
        return result


def attention_share(call: Callable[[], object], rounds: int = 3) -> float:
    """The part of an eager call's time that scaled_dot_product_attention takes; the median."""
    shares = []
    for _ in range(rounds):
        start = time.perf_counter()
        with AttentionClock() as clock:
            call()
        shares.append(clock.seconds / (time.perf_counter() - start))
    return statistics.median(shares)


def rewritten() -> dict[str, Any]:
    """What the backend made of the attention it found, and why."""
    report = sage.last_report()
    return {
        "sites": len(report.sites),
        "rewritten": len(report.rewritten),
        "recipes": dict(Counter(site.recipe for site in report.rewritten)),
        "reasons": dict(Counter(site.reason for site in report.sites)),
    }


def measure(subject: Subject, dtype: torch.dtype, precision: str, seconds: float) -> dict[str, Any]:
    """Time a model in eager, with Inductor and with ours."""
    torch.compiler.reset()
    model, arguments = subject.make()
    exact = output_of(model(**arguments))
    if dtype != torch.float32:
        model = model.to(dtype)
        arguments = {
            name: x.to(dtype) if x.is_floating_point() else x for name, x in arguments.items()
        }
    # Copies that share the weights: each backend compiles a module of its own.
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    models: dict[str, Callable[..., Any]] = {
        "eager": model,
        "inductor": torch.compile(copy.deepcopy(model, dict(shared)), backend="inductor"),
        "sage": torch.compile(
            copy.deepcopy(model, dict(shared)), backend="sage", options={"precision": precision}
        ),
    }
    calls = {name: partial(function, **arguments) for name, function in models.items()}
    outputs = {name: output_of(call()) for name, call in calls.items()}  # and compile
    found = rewritten()
    share = attention_share(calls["eager"])
    samples = interleave_for(calls, seconds=seconds, least_rounds=5)
    return {
        "title": subject.title,
        "weights": subject.weights,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "attention_share": share,
        "attention": found,
        **_timing(samples),
        **{f"{name}_cosine": cosine(output, exact) for name, output in outputs.items()},
        **{f"{name}_rel_l1": rel_l1(output, exact) for name, output in outputs.items()},
    }


def _timing(samples: Samples) -> dict[str, float]:
    fields: dict[str, float] = {"rounds": len(samples["eager"])}
    for name, times in samples.items():
        fields |= Spread.of(times).fields(f"{name}_us")
    for name, baseline in (("inductor", "eager"), ("sage", "eager"), ("sage", "inductor")):
        fields |= ratio(samples, baseline, name).fields(f"{name}_vs_{baseline}")
    return fields


def texts(row: dict[str, Any]) -> Sequence[str]:
    """A row of the printed table."""
    found = row["attention"]
    recipes = ", ".join(found["recipes"]) or "none"
    spread = f"[{row['sage_vs_inductor_p10']:.2f}, {row['sage_vs_inductor_p90']:.2f}]"
    return (
        row["title"],
        f"{row['eager_us'] / 1e3:.1f}",
        f"{row['inductor_us'] / 1e3:.1f}",
        f"{row['sage_us'] / 1e3:.1f}",
        f"{row['sage_vs_inductor']:.2f} {spread}",
        f"{row['sage_vs_eager']:.2f}",
        f"{row['attention_share']:.0%}",
        f"{1.0 / (1.0 - row['attention_share']):.2f}",
        f"{row['sage_cosine']:.6f}",
        f"{row['sage_rel_l1']:.5f}",
        f"{row['inductor_rel_l1']:.5f}",
        f"{found['rewritten']} of {found['sites']}: {recipes}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=tuple(SUBJECTS), default=list(SUBJECTS))
    add("--dtype", choices=tuple(DTYPES), default="float32")
    add("--threads", type=int, help="default: torch's own")
    add("--precision", choices=PRECISIONS, default=AUTO)
    add("--seconds", type=float, default=20.0, help="how long to measure each model, about")
    add("--name", help="of the results; default: models-DTYPE")
    add("--folder", type=Path, default=RESULTS, help="of the results")
    add("--no-plot", action="store_true", help="write no .png")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    print(f"{describe(machine())}, {arguments.dtype}, {torch.get_num_threads()} threads")
    table = Table(
        model=24, eager_ms=8, inductor_ms=8, sage_ms=8, sage_vs_inductor=18, sage_vs_eager=0,
        attention_share=0, Amdahl_limit=0, cosine=8, rel_L1=8, inductor_rel_L1=0, rewritten=24,
    )  # fmt: skip
    rows, kept = [], []
    with torch.inference_mode():
        for name in arguments.model:
            dtype = DTYPES[arguments.dtype]
            row = measure(SUBJECTS[name], dtype, arguments.precision, arguments.seconds)
            table.print_row(*texts(row))
            rows.append(row)
            kept += row["attention"]["reasons"]
    for reason in dict.fromkeys(kept):
        print(f"attention: {reason}")
    name = arguments.name or f"models-{arguments.dtype}"
    save(name, {"rows": rows}, arguments.folder)
    if not arguments.no_plot:
        from benchmarks import plots  # needs matplotlib, which the rest does not

        plots.plot_models(rows, arguments.folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
