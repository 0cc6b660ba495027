"""Time ONNX files in ONNX Runtime: the stock export, and ours with and without the library.

    python -m benchmarks.onnx
    python -m benchmarks.onnx --model minilm --threads 1

The sessions take turns in one process; times are medians, ratios are medians of the rounds' ratios.
"stock" is torch.onnx.export of the untouched model as it is by default, which writes attention out;
"opset 23" the same with the standard operator Attention, which has to be asked for. "function" is
our file without the library, "library" with it. "attention" is the part of the library's time, and
of opset 23's, that ONNX Runtime's profiler has for attention: if it took no time, the rest would
remain. Outputs are compared with PyTorch's in float32; for MiniLM, the embeddings. Writes
benchmarks/results/onnx.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnxruntime
import torch
from torch import Tensor, nn

import sage_compiler as sage
from benchmarks.architectures import transformer
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
from sage_compiler.onnx import verify
from tests.tolerances import cosine, rel_l1

STOCK: Final = "stock"
STOCK_23: Final = "opset 23"
OPSETS: Final = {STOCK: None, STOCK_23: 23}
FUNCTION: Final = "function"
LIBRARY: Final = "library"
PROFILED: Final = 5  # runs under the profiler


class Embedder(nn.Module):
    """all-MiniLM-L6-v2 up to its last hidden states."""

    def __init__(self) -> None:
        super().__init__()
        from examples.minilm import AutoModel, disable_progress_bar, model_folder

        disable_progress_bar()
        self.model = AutoModel.from_pretrained(model_folder())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return hidden


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to time.

    Attributes:
        make: the model, and the names of its sizes that vary, as ``export_onnx`` takes them.
        inputs: one call, of so many sequences and tokens.
        sizes: (sequences, tokens) to time.
        compared: what of its output is compared.
    """

    title: str
    make: Callable[[], tuple[nn.Module, dict[str, Any] | None]]
    inputs: Callable[[int, int], dict[str, Tensor]]
    sizes: Sequence[tuple[int, int]]
    compared: Callable[[Tensor, dict[str, Tensor]], Tensor]


def _minilm() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {0: "batch", 1: "length"}
    return Embedder().eval(), {"input_ids": sizes, "attention_mask": sizes}


def _text(batch: int, length: int) -> dict[str, Tensor]:
    """Real text of exactly so many tokens."""
    from examples.minilm import SENTENCES, AutoTokenizer, model_folder

    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    step = len(sentences) // batch
    texts = [" ".join(sentences[i * step :] + sentences[: i * step]) for i in range(batch)]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    found = tokenizer(texts, truncation=True, max_length=length, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _embedding(hidden: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    from examples.minilm import pooled

    return pooled(hidden, inputs["attention_mask"])


def vision(width: int, heads: int, depth: int, tokens: int, *, adaptive: bool) -> Subject:
    """A transformer over one sequence of so many tokens."""

    def make() -> tuple[nn.Module, None]:
        return transformer(width, heads, depth, tokens, adaptive=adaptive)[0], None

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        return transformer(width, heads, depth, tokens, adaptive=adaptive)[1]

    name = "DiT" if adaptive else "ViT"
    title = f"{name}, width {width}, depth {depth}"
    return Subject(title, make, inputs, [(1, tokens)], lambda output, _: output)


SUBJECTS: Final = {
    "minilm": Subject(
        "MiniLM-L6",
        _minilm,
        _text,
        [(1, 8), (1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (8, 32), (8, 512)],
        _embedding,
    ),
    "vit": vision(768, 12, 12, 1025, adaptive=False),
    "dit": vision(384, 6, 12, 1024, adaptive=True),
    "dit_4096": vision(384, 6, 12, 4096, adaptive=True),
}


def _stock(subject: Subject, folder: Path, opset: int | None) -> Path:
    """The untouched model, as torch.onnx writes it."""
    model, sizes = subject.make()
    path = folder / f"stock{opset}.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            kwargs=subject.inputs(2 if sizes else 1, 40),
            f=path,
            dynamo=True,
            dynamic_shapes=sizes,
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
    return path


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Else the threads of the session before would still spin while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _files(subject: Subject, folder: Path, precision: str) -> dict[str, Path]:
    """The file of each candidate."""
    found = {name: _stock(subject, folder, opset) for name, opset in OPSETS.items()}
    model, sizes = subject.make()
    path = folder / "sage.onnx"
    sage.export_onnx(
        model,
        (),
        path,
        kwargs=subject.inputs(2 if sizes else 1, 40),
        dynamic_shapes=sizes,
        precision=precision,
    )
    return {**found, FUNCTION: path, LIBRARY: path}


def _open(name: str, path: Path, options: Any) -> Any:
    providers = ["CPUExecutionProvider"]
    if name == LIBRARY:
        return sage.onnx_session(path, providers, session_options=options)
    return onnxruntime.InferenceSession(path, options, providers=providers)


def attention_share(name: str, path: Path, threads: int, given: dict[str, Any]) -> float:
    """The part of a file's time that goes to nodes called Attention, by the profiler."""
    options = _options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_name("profile"))
    session = _open(name, path, options)
    for _ in range(PROFILED):
        session.run(None, given)
    spent: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return spent["Attention"] / spent.total()


def measure(
    subject: Subject, precision: str, threads: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Time a model at all of its sizes."""
    model = subject.make()[0]
    with tempfile.TemporaryDirectory() as folder:
        files = _files(subject, Path(folder), precision)
        sessions = {name: _open(name, path, _options(threads)) for name, path in files.items()}
        for batch, tokens in subject.sizes:
            inputs = subject.inputs(batch, tokens)
            with torch.no_grad():
                expected = subject.compared(model(**inputs), inputs)
            outputs = {
                name: subject.compared(verify.run(session, inputs)[0], inputs)
                for name, session in sessions.items()
            }
            given = {name: value.numpy() for name, value in inputs.items()}

            def caller(session: Any, given: dict[str, Any] = given) -> Callable[[], object]:
                return lambda: session.run(None, given)

            samples = interleave_for(
                {name: caller(session) for name, session in sessions.items()}, seconds=seconds
            )
            medians = {name: Spread.of(found).median for name, found in samples.items()}
            yield {
                "model": subject.title,
                "sequences": batch,
                "tokens": tokens,
                "microseconds": medians,
                **ratio(samples, STOCK, LIBRARY).fields("ratio"),
                **ratio(samples, STOCK_23, LIBRARY).fields("ratio_opset_23"),
                **ratio(samples, STOCK, FUNCTION).fields("function_ratio"),
                "attention_share": {
                    name: attention_share(name, files[name], threads, given)
                    for name in (STOCK_23, LIBRARY)
                },
                "cosine": {name: cosine(found, expected) for name, found in outputs.items()},
                "least_cosine": min(
                    cosine(one, other)
                    for one, other in zip(outputs[LIBRARY], expected, strict=True)
                ),
                "rel_l1": {name: rel_l1(found, expected) for name, found in outputs.items()},
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--precision", default="auto", help="default: auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=8.0, help="for each size")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{describe(machine())}, onnxruntime {onnxruntime.__version__}; ms\n")
    table = Table(
        model=24,
        sequences=0,
        tokens=0,
        stock=8,
        opset_23=8,
        function=8,
        library=8,
        ratio=5,
        to_opset_23=5,
        attention=9,
        least_cosine=8,
    )
    results = []
    for name in arguments.model:
        for found in measure(
            SUBJECTS[name], arguments.precision, arguments.threads, arguments.seconds
        ):
            results.append(found)
            times = found["microseconds"]
            table.print_row(
                found["model"],
                str(found["sequences"]),
                str(found["tokens"]),
                *(f"{each / 1000:.2f}" for each in times.values()),
                f"{found['ratio']:.2f}",
                f"{found['ratio_opset_23']:.2f}",
                f"{found['attention_share'][LIBRARY]:.0%}",
                f"{found['least_cosine']:.5f}",
            )
    save(
        "onnx",
        {
            "onnxruntime": onnxruntime.__version__,
            "precision": arguments.precision,
            "threads": arguments.threads,
            "results": results,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
