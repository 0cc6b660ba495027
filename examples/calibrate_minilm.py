"""A real model calibrated for a GPU that is not here: all-MiniLM-L6-v2, a recipe for every layer.

The budget is on what the model is for, its embeddings: of no text may the cosine with the exact
embedding be more than 0.0005 below 1. Half of the texts calibrate; on the other half the policy
found is compared with one recipe in every layer. Times are predicted for the target, and its
recipes are emulated, so no GPU is needed. Needs what examples/minilm.py needs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from minilm import LONGEST, SENTENCES, model_folder, passages, pooled
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import sage_compiler as sage

LIMIT = 0.0005  # of 1 - cosine, for the worst embedding
TARGET = "sm_89"  # an RTX 4090: its tensor cores have INT4, INT8 and FP8
CANDIDATES = ("int4_fp8", "int8_fp8", "int8_fp16")
UNIFORM = ("int4_fp8", "int8_fp8", "exact")


class Embedder(nn.Module):
    """Tokens (texts, length) to normalized embeddings (texts, 384): what the budget is about."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor) -> Tensor:
        return pooled(self.bert(tokens).last_hidden_state, torch.ones_like(tokens))


def distance(actual: Tensor, expected: Tensor) -> float:
    """Of the worst embedding to the exact one; 1 - cosine is half its square.

    Unlike the cosine it grows in proportion to the errors of the layers, as a search expects.
    """
    return float((actual - expected).norm(dim=-1).max())


def tokenize(tokenizer: Any, texts: list[str]) -> list[Tensor]:
    """Tokens (1, length) of each text: without padding no mask has to be read."""
    tokens = tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
    return [torch.tensor([each]) for each in tokens]


def one_int4(policy: sage.Policy) -> sage.Policy:
    """INT8 everywhere but in the layer that bears INT4 best."""
    mixed = uniform(policy, "int8_fp8")
    layer = min(mixed.layers, key=lambda name: policy.layers[name].measured[0]["int4_fp8"].rel_l1)
    mixed.layers[layer] = replace(mixed.layers[layer], recipes=("int4_fp8",))
    return mixed


def uniform(policy: sage.Policy, recipe: str) -> sage.Policy:
    """The same layers with one recipe everywhere."""
    layers = {name: replace(each, recipes=(recipe,)) for name, each in policy.layers.items()}
    return sage.Policy(layers, target=policy.target)


def embeddings(model: Embedder, policy: sage.Policy, texts: list[Tensor]) -> Tensor:
    """What the policy makes of texts, (texts, 384), in eager: compiling would take longer."""
    recipes = {
        model.get_submodule(name.partition("#")[0]): layer.recipe
        for name, layer in policy.layers.items()
    }

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        output = sage.attention(query, key, value, precision=recipes[module])
        return output.transpose(1, 2), None

    AttentionInterface.register("policy", attend)
    model.bert.set_attn_implementation("policy")
    found = [model(tokens) for tokens in tqdm(texts, desc="held-out texts", leave=False)]
    model.bert.set_attn_implementation("sdpa")
    return torch.cat(found)


def row(name: str, policy: sage.Policy, cosines: list[float]) -> str:
    """A line of the table."""
    times = policy.attention_seconds
    assert times is not None  # the target has instructions for all of these recipes
    recipes = ", ".join(dict.fromkeys(layer.recipe for layer in policy.layers.values()))
    least = "  ".join(f"{cosine:9.6f}" for cosine in cosines)
    return f"{name:10} {least}  {times[1] * 1e6:6.1f} us  {recipes}"


def verdict(policy: sage.Policy) -> str:
    """Whether INT4 found a place, and what every layer would lose by it."""
    chosen = [layer.recipe for layer in policy.layers.values()]
    losses = ", ".join(
        f"{layer.measured[0]['int4_fp8'].rel_l1:.3f} ({layer.measured[0]['int8_fp8'].rel_l1:.3f})"
        for layer in policy.layers.values()
    )
    return (
        f"INT4 is in {chosen.count('int4_fp8')} of {len(chosen)} layers; the relative L1 error of "
        f"int4_fp8 (int8_fp8) in them is\n{losses}"
    )


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=4, help="to calibrate on; as many held out")
    parser.add_argument("--html", type=Path, help="write the report with the policy here")
    arguments = parser.parse_args()

    disable_progress_bar()
    model = Embedder(AutoModel.from_pretrained(model_folder())).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    number, half = arguments.passages, len(sentences) // 2
    seen, unseen = sentences[:half], sentences[half:]

    policy = sage.calibrate(
        model,
        # One sentence: short texts are all launches, and would decide for exact attention.
        tokenize(tokenizer, passages(seen)[:number] + seen[:1]),
        budget={"output": (distance, (2 * LIMIT) ** 0.5)},
        candidates=CANDIDATES,
        target=TARGET,
        heads=4,
        queries=128,
    )
    print(policy)

    held_out = {
        "passages": tokenize(tokenizer, passages(unseen)[:number]),
        "sentences": tokenize(tokenizer, unseen[: 2 * number]),
    }
    exact = {name: torch.cat([model(each) for each in data]) for name, data in held_out.items()}
    print(f"\nleast cosine with exact on held-out {' and '.join(held_out)}; attention of one input")
    compared = {name: uniform(policy, name) for name in UNIFORM}
    compared |= {"one int4": one_int4(policy), "adaptive": policy}  # the last one is judged
    for name, chosen in compared.items():
        cosines = [
            float(F.cosine_similarity(embeddings(model, chosen, data), exact[kind]).min())
            for kind, data in held_out.items()
        ]
        print(row(name, chosen, cosines))
    print(f"\n{verdict(policy)}")
    if arguments.html is not None:
        tokens = held_out["passages"][0]
        sage.explain(model, tokens, options={"policy": policy}).to_html(arguments.html)

    made = policy.calibration.end_to_end
    if made is None or not made.holds or 1.0 - min(cosines) > LIMIT:
        print(f"failed: every embedding must have a cosine of at least {1 - LIMIT}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
