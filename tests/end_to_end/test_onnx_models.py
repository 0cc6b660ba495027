"""Models as people deploy them: exported, checked, and run in ONNX Runtime with and without the
library, at other batch sizes and lengths than they were exported with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import onnx
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import sage_compiler as sage
from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.kernels.cpu.gate import GATES
from sage_compiler.kernels.cpu.kernel import need
from sage_compiler.onnx import schema, verify
from sage_compiler.ops import expecting_emulation
from tests.tolerances import rel_l1

VOCABULARY = 1000
LONG = 300  # tokens
BATCH, LENGTH = "batch", "length"


@dataclass(frozen=True)
class Subject:
    """A model for export.

    Attributes:
        make: builds it, with random weights.
        inputs: one call of so many sequences and tokens, by the names of the arguments.
        sizes: as ``dynamic_shapes``.
        sites: how many attentions it has.
        grouped: whether query heads share keys.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    sizes: dict[str, dict[int, str]]
    sites: int
    grouped: bool = False


class Plain(nn.Module):
    """A model of transformers without its cache and its dataclasses."""

    def __init__(self, model: nn.Module, output: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.output, self.fixed = model, output, fixed


class Text(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.fixed)
        found: Tensor = getattr(result, self.output)
        return found


class Vision(Plain):
    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = getattr(self.model(pixel_values=pixel_values), self.output)
        return found


class Speech(Plain):
    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        result = self.model(
            input_features=input_features, decoder_input_ids=decoder_input_ids, **self.fixed
        )
        found: Tensor = getattr(result, self.output)
        return found


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=10,
        )

    def forward(self, latents: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        found: Tensor = self.model(
            latents, timestep=timestep, class_labels=label, return_dict=False
        )[0]
        return found


def text(batch: int, length: int) -> dict[str, Tensor]:
    """Tokens of which the first sequence is padded."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 + 1 :] = 0
    return {
        "input_ids": torch.randint(3, VOCABULARY, (batch, length)),
        "attention_mask": mask,
    }


TEXT_SIZES = {name: {0: BATCH, 1: LENGTH} for name in ("input_ids", "attention_mask")}
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, num_attention_heads=4, vocab_size=VOCABULARY)
    return Text(transformers.BertModel(config), "last_hidden_state")


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    return Text(transformers.GPT2LMHeadModel(config), "logits", use_cache=False)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SMALL, num_attention_heads=8, num_key_value_heads=2, vocab_size=VOCABULARY
    )
    return Text(transformers.LlamaForCausalLM(config), "logits", use_cache=False)


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, num_attention_heads=4, image_size=128, patch_size=8)
    return Vision(transformers.ViTModel(config), "last_hidden_state")


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        vocab_size=VOCABULARY,
        max_source_positions=200,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return Speech(transformers.WhisperModel(config), "last_hidden_state", use_cache=False)


SUBJECTS = {
    "bert": Subject(bert, text, TEXT_SIZES, 2),
    "gpt2": Subject(gpt2, text, TEXT_SIZES, 2),
    "llama": Subject(llama, text, TEXT_SIZES, 2, grouped=True),
    "vit": Subject(
        vit,
        lambda batch, _: {"pixel_values": torch.randn(batch, 3, 128, 128)},
        {"pixel_values": {0: BATCH}},
        2,
    ),
    "whisper": Subject(
        whisper,
        lambda batch, length: {
            "input_features": torch.randn(batch, 80, 400),
            "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, length)),
        },
        {"input_features": {0: BATCH}, "decoder_input_ids": {0: BATCH, 1: LENGTH}},
        6,  # encoder, decoder, and across
    ),
    "dit": Subject(
        Diffusion,
        lambda batch, _: {
            "latents": torch.randn(batch, 4, 32, 32),
            "timestep": torch.randint(0, 1000, (batch,)),
            "label": torch.randint(0, 9, (batch,)),
        },
        {name: {0: BATCH} for name in ("latents", "timestep", "label")},
        2,
    ),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_models_run_at_other_sizes(name: str, tmp_path: Path) -> None:
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    model = subject.make().eval()
    path = tmp_path / f"{name}.onnx"
    report = sage.export_onnx(
        model, (), path, kwargs=subject.inputs(2, 40), dynamic_shapes=subject.sizes
    )
    assert (len(report.rewritten), report.kept) == (subject.sites, [])
    nodes = [node for node in onnx.load(path).graph.node if node.domain == schema.DOMAIN]
    assert [node.name for node in nodes] == [site.layer for site in report.sites]
    assert all(node.overload.endswith("grouped") is subject.grouped for node in nodes)

    plain, fused = verify.open_plain(path), sage.onnx_session(path)
    for batch, length in ((2, 40), (3, 17), (1, LONG)):
        inputs = subject.inputs(batch, length)
        with torch.no_grad():
            expected = model(**inputs)
        (exact,), (served,) = verify.run(plain, inputs), verify.run(fused, inputs)
        assert rel_l1(exact, expected) < 1e-5, (batch, length)
        error = rel_l1(served, expected)
        assert error < 0.02, (batch, length)
    if need().isa_name in GATES:
        assert error > 1e-5  # long enough for `auto` to quantize


@pytest.mark.parametrize("recipe", ["int8_fp8", "int8_int8"])
def test_an_explicit_recipe_is_what_pytorch_emulates(recipe: str, tmp_path: Path) -> None:
    """Nearer to PyTorch's own run of the recipe than that is to exact attention."""
    subject = SUBJECTS["llama"]
    torch.manual_seed(0)
    model = subject.make().eval()
    inputs = subject.inputs(2, 130)
    path = tmp_path / "llama.onnx"
    sage.export_onnx(model, (), path, kwargs=inputs, dynamic_shapes=subject.sizes, precision=recipe)
    rewritten = torch.export.export(model, (), inputs, strict=False).module()
    transform(rewritten, parse_options({"precision": recipe}))
    with torch.no_grad(), expecting_emulation():
        exact, emulated = model(**inputs), rewritten(**inputs)
    quantization = rel_l1(emulated, exact)
    (by_function,) = verify.run(verify.open_plain(path), inputs)
    assert rel_l1(by_function, emulated) < quantization / 3
    # What the library has nothing less accurate for, it computes as that.
    (by_library,) = verify.run(sage.onnx_session(path), inputs)
    assert 1e-5 < rel_l1(by_library, exact) < 1.2 * quantization


@pytest.mark.slow
def test_real_weights_keep_their_embeddings(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 on passages of 512 tokens."""
    from examples.minilm import SENTENCES, AutoModel, AutoTokenizer, model_folder, pooled

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    passages = [" ".join(sentences[at : at + 80]) for at in range(0, 240, 80)]
    batch = dict(
        tokenizer(passages, truncation=True, max_length=512, padding=True, return_tensors="pt")
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert inputs["input_ids"].shape == (3, 512)
    model = Text(AutoModel.from_pretrained(model_folder()), "last_hidden_state").eval()
    path = tmp_path / "minilm.onnx"
    sage.export_onnx(
        model,
        (),
        path,
        kwargs={name: value[:2, :40] for name, value in inputs.items()},
        dynamic_shapes=TEXT_SIZES,
    )
    with torch.no_grad():
        expected = pooled(model(**inputs), inputs["attention_mask"])
    (hidden,) = verify.run(sage.onnx_session(path), inputs)
    found = pooled(hidden, inputs["attention_mask"])
    assert float(F.cosine_similarity(found, expected).min()) > 0.999
