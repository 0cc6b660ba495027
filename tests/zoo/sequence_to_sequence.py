"""Encoder-decoders of the transformers library: self-attention of both kinds, cross-attention."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from tests.zoo.architecture import EAGER, VOCABULARY, Architecture, Inputs, normal, padding, tokens
from tests.zoo.huggingface import SPECIAL, architecture, translation

FAMILY: Final = "Encoder-decoders"
BART: Final[dict[str, Any]] = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
T5: Final[dict[str, Any]] = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}

_translator = partial(architecture, FAMILY, translation)


def _speech(padded: bool) -> Inputs:
    """Whisper's input: 32 frames of 8 mel bins; it pads its decoder's tokens only."""
    inputs: Inputs = {
        "input_features": normal(2, 8, 32),
        "decoder_input_ids": tokens(9),
        "use_cache": False,
    }
    return inputs | {"decoder_attention_mask": padding(9)} if padded else inputs


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    _translator("T5", "T5Model", T5, 6),
    _translator("UMT5", "UMT5Model", T5, 6),
    _translator(
        "LongT5 (local encoder)",
        "LongT5Model",
        T5 | {"local_radius": 3, "encoder_attention_type": "local"},
        6,
        implementations=(EAGER,),
        keeps="without padding Dynamo captures single layers, which return their weights",
    ),
    _translator(
        "Switch Transformer",
        "SwitchTransformersModel",
        T5
        | {
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "router_jitter_noise": 0.0,
        },
        6,
        others=2,
        implementations=(EAGER,),
        note="the other softmaxes are the routers'",
    ),
    _translator("BART", "BartModel", BART, 6),
    _translator("mBART", "MBartModel", BART, 6),
    _translator("Pegasus", "PegasusModel", BART, 6),
    _translator("Marian", "MarianModel", BART, 6),
    _translator("M2M100", "M2M100Model", BART, 6),
    _translator("Blenderbot", "BlenderbotModel", BART, 6),
    _translator(
        "LED",
        "LEDModel",
        BART
        | {
            "attention_window": 4,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
        6,
        implementations=(EAGER,),
        keeps="in the encoder the scores are put together from sliding chunks",
    ),
    architecture(
        FAMILY,
        _speech,
        "Whisper",
        "WhisperModel",
        BART
        | {
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "apply_spec_augment": False,
        },
        6,
    ),
)
