"""A causal language model with a key/value cache, calibrated for prefill and decoding.

A small Llama is trained on bytes for some seconds. The budget is in nats: on the calibration texts
its predictions may cost at most so much more than the exact ones, were those the truth. On a text
that neither training nor calibration has seen, the compiled model's loss is compared with the exact
one's, and both continue it through their caches. Needs the extra ``demo``; no network.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import sage_compiler as sage

TEXT = Path(__file__).parent / "data" / "sentences.txt"
PROMPT = 512  # bytes
PROMPTS = 8  # to calibrate on: as many times are measured, and one alone may be a busy moment's
LIMIT = 0.001  # nats per byte


def llama() -> LlamaForCausalLM:
    """Two layers, grouped heads; a token is a byte of ASCII."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * PROMPT,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module, text: Tensor, steps: int) -> None:
    """Next-byte prediction on random pieces of the text (bytes,)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    with tqdm(range(steps), desc="training", leave=False) as bar:
        for _ in bar:
            starts = torch.randint(len(text) - PROMPT, (4,))
            pieces = torch.stack([text[at : at + PROMPT] for at in starts])
            loss = model(input_ids=pieces, labels=pieces, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            bar.set_postfix(loss=f"{float(loss):.2f}")


def extra_nats(actual: Any, expected: Any) -> float:
    """The mean loss that quantization adds if the exact predictions are the truth."""
    found, truth = (each.logits.log_softmax(-1) for each in (actual, expected))
    return float((truth.exp() * (truth - found)).sum(-1).mean())


def inputs(model: nn.Module, prompts: Tensor) -> list[dict[str, Any]]:
    """Two calls of each prompt (prompts, PROMPT): all of it, and its last byte after the others.

    The model appends to its cache, and calibration calls it with the same input several times: it
    copies what a call may change.
    """
    calls: list[dict[str, Any]] = []
    for prompt in prompts.split(1):
        calls.append({"input_ids": prompt, "past_key_values": DynamicCache()})
        cache = DynamicCache()
        model(input_ids=prompt[:, :-1], past_key_values=cache)
        calls.append({"input_ids": prompt[:, -1:], "past_key_values": cache})
    return calls


def loss(model: Callable[..., Any], text: Tensor) -> float:
    """Nats per byte of a text (1, length), read at once."""
    logits = model(input_ids=text, past_key_values=DynamicCache()).logits
    return float(F.cross_entropy(logits[0, :-1], text[0, 1:]))


def generate(model: Callable[..., Any], prompt: Tensor, tokens: int) -> str:
    """The likeliest continuation of a prompt (1, PROMPT), one call a byte."""
    cache, given, found = DynamicCache(), prompt, []
    for _ in tqdm(range(tokens), desc="generating", leave=False):
        given = model(input_ids=given, past_key_values=cache).logits[:, -1:].argmax(-1)
        found.append(int(given))
    return bytes(found).decode("ascii")


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=120, help="steps of training")
    parser.add_argument("--tokens", type=int, default=48, help="bytes to generate")
    parser.add_argument("--html", type=Path, help="write the report with the policy here")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    text = torch.tensor(list(TEXT.read_bytes()))
    learned, unseen = text[: -2 * PROMPT], text[-2 * PROMPT :]
    model = llama()
    with torch.enable_grad():
        train(model, learned, arguments.train)
    model.eval()

    policy = sage.calibrate(
        model,
        inputs(model, learned[: PROMPTS * PROMPT].view(PROMPTS, PROMPT)),
        budget={"output": (extra_nats, LIMIT)},
    )
    print(policy)
    for name, layer in policy.layers.items():
        print(f"{name}: {' and '.join(layer.fingerprints)}")

    compiled = torch.compile(model, backend="sage", options={"policy": policy}, dynamic=True)
    prompt, rest = unseen[None, :PROMPT], unseen[None, PROMPT:]
    losses = []
    print(f"\n{'':8}nats per byte  time    continuation of a text that is new")
    for name, each in (("exact", model), ("policy", compiled)):
        generate(each, prompt, 3)  # compiles prefill, and decoding for two layouts of the cache
        start = time.perf_counter()
        found = generate(each, prompt, arguments.tokens)
        taken = time.perf_counter() - start
        losses.append(loss(each, rest))
        print(f"{name:8}{losses[-1]:13.5f}  {taken:4.2f} s  {found!r}")
    if arguments.html is not None:
        call = {"input_ids": prompt, "past_key_values": DynamicCache()}
        sage.explain(model, options={"policy": policy}, **call).to_html(arguments.html)

    made = policy.calibration.end_to_end
    if made is None or not made.holds or losses[1] - losses[0] > LIMIT:
        print(f"failed: the loss may grow by {LIMIT} nats")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
