"""How the zoo builds models of the transformers library: from a configuration, never downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import nn

from tests.zoo.architecture import (
    BOTH,
    EAGER,
    VOCABULARY,
    Architecture,
    Inputs,
    padding,
    tokens,
)

SPECIAL: Final[dict[str, Any]] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT: Final[dict[str, Any]] = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Names that most configurations share.
SIZES: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT: Final[dict[str, Any]] = {
    **SIZES,
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


def make(model: str, config: dict[str, Any], implementation: str) -> nn.Module:
    """A model ``transformers.<model>`` with the configuration class that it names."""
    path, _, name = f"transformers.{model}".rpartition(".")
    model_class = getattr(importlib.import_module(path), name)
    chosen: str | dict[str, str] = implementation
    if "backbone_config" in config:  # a convolutional network, which has no attention to choose
        chosen = {"": implementation, "backbone_config": EAGER}
    module: nn.Module = model_class._from_config(
        model_class.config_class(**config), attn_implementation=chosen
    )
    return module


def encoder_text(padded: bool) -> Inputs:
    """Input of an encoder; padded on the right."""
    inputs: Inputs = {"input_ids": tokens()}
    return inputs | {"attention_mask": padding()} if padded else inputs


def decoder_text(padded: bool) -> Inputs:
    """Input of a decoder without a cache; padded on the left, as for generation."""
    inputs: Inputs = {"input_ids": tokens(), "use_cache": False}
    return inputs | {"attention_mask": padding(left=True)} if padded else inputs


def translation(padded: bool) -> Inputs:
    """Input of an encoder and a decoder of other lengths; the encoder's is padded."""
    inputs: Inputs = {
        "input_ids": tokens(),
        "decoder_input_ids": tokens(9),
        "use_cache": False,
    }
    return inputs | {"attention_mask": padding()} if padded else inputs


def architecture(
    family: str,
    inputs: Callable[[bool], Inputs],
    name: str,
    model: str,
    config: dict[str, Any],
    true_sites: int,
    *,
    others: int = 0,
    implementations: tuple[str, ...] = BOTH,
    pads: bool = True,
    decodes: bool = False,
    keeps: str = "",
    note: str = "",
) -> Architecture:
    """An entry for ``transformers.<model>``."""
    return Architecture(
        name=name,
        family=family,
        build=partial(make, model, config),
        inputs=inputs,
        true_sites=true_sites,
        others=others,
        implementations=implementations,
        pads=pads,
        decodes=decodes,
        keeps=keeps,
        note=note,
    )
