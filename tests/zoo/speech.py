"""Models of speech and sound of the transformers library."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from tests.zoo.architecture import EAGER, Architecture, Inputs, normal, padding
from tests.zoo.huggingface import SIZES, architecture

FAMILY: Final = "Speech"
SAMPLES: Final = 240
WAVE: Final[dict[str, Any]] = {
    **SIZES,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.0,
    "final_dropout": 0.0,
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
}


def wave(padded: bool) -> Inputs:
    """Two sounds."""
    inputs: Inputs = {"input_values": normal(2, SAMPLES)}
    return inputs | {"attention_mask": padding(SAMPLES)} if padded else inputs


def _spectrum(padded: bool) -> Inputs:
    return {"input_values": normal(2, 24, 16)}


_speech = partial(architecture, FAMILY, wave)

ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    _speech("wav2vec 2.0", "Wav2Vec2Model", WAVE, 2),
    _speech("HuBERT", "HubertModel", WAVE, 2),
    _speech("SEW", "SEWModel", WAVE | {"squeeze_factor": 1}, 2),
    _speech(
        "WavLM",
        "WavLMModel",
        WAVE,
        2,
        implementations=(EAGER,),
        keeps="a view of the weights, itself unused, counts as a use of them",
    ),
    architecture(
        FAMILY,
        _spectrum,
        "Audio Spectrogram Transformer",
        "ASTModel",
        {**SIZES, "max_length": 24, "num_mel_bins": 16, "patch_size": 4},
        2,
        pads=False,
    ),
)
