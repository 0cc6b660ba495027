"""Encoders of the transformers library: bidirectional, relative positions, local attention."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from tests.zoo.architecture import EAGER, LENGTH, VOCABULARY, Architecture, Inputs, padding, tokens
from tests.zoo.huggingface import NO_DROPOUT, SPECIAL, TEXT, architecture, encoder_text

FAMILY: Final = "Encoders of text"
BASE: Final[dict[str, Any]] = TEXT | NO_DROPOUT
RELATIVE: Final[dict[str, Any]] = {
    "relative_attention": True,
    "max_relative_positions": 16,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
XLM: Final[dict[str, Any]] = {
    "emb_dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_words": VOCABULARY,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_index": 0,
    "pad_token_id": 0,
}

_encoder = partial(architecture, FAMILY, encoder_text)


def _global_and_local(padded: bool) -> Inputs:
    """Longformer's input: a multiple of the window, so that nothing is padded inside."""
    inputs: Inputs = {"input_ids": tokens(16)}
    return inputs | {"attention_mask": padding(16)} if padded else inputs


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    _encoder("BERT", "BertModel", BASE, 2),
    _encoder("RoBERTa", "RobertaModel", BASE, 2),
    _encoder("XLM-RoBERTa", "XLMRobertaModel", BASE, 2),
    _encoder(
        "DistilBERT",
        "DistilBertModel",
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "vocab_size": VOCABULARY,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            **SPECIAL,
        },
        2,
    ),
    _encoder("ALBERT (shared layers)", "AlbertModel", BASE | {"embedding_size": 16}, 2),
    _encoder("ELECTRA", "ElectraModel", BASE | {"embedding_size": 16}, 2),
    _encoder(
        "DeBERTa",
        "DebertaModel",
        BASE | RELATIVE,
        1,
        implementations=(EAGER,),
        keeps="a graph break between scores and softmax",
        note="its graph breaks let both layers run one graph",
    ),
    _encoder(
        "DeBERTa-v2",
        "DebertaV2Model",
        BASE | RELATIVE | {"share_att_key": True, "norm_rel_ebd": "layer_norm"},
        2,
        implementations=(EAGER,),
    ),
    _encoder("MPNet", "MPNetModel", BASE, 2, implementations=(EAGER,)),
    _encoder(
        "ModernBERT (global and local)",
        "ModernBertModel",
        TEXT | {"global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 1},
        2,
    ),
    _encoder("EuroBERT", "EuroBertModel", TEXT | {"num_key_value_heads": 2}, 2),
    _encoder("LayoutLM", "LayoutLMModel", BASE, 2),
    _encoder("ERNIE", "ErnieModel", BASE, 2),
    _encoder("ESM", "EsmModel", BASE | {"mask_token_id": 3}, 2),
    _encoder("RoFormer", "RoFormerModel", BASE, 2, implementations=(EAGER,)),
    _encoder(
        "SqueezeBERT",
        "SqueezeBertModel",
        BASE | {"embedding_size": 32},
        2,
        implementations=(EAGER,),
    ),
    _encoder(
        "MobileBERT",
        "MobileBertModel",
        BASE | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        2,
    ),
    _encoder(
        "ConvBERT",
        "ConvBertModel",
        BASE | {"embedding_size": 32},
        2,
        others=2,
        implementations=(EAGER,),
        note="the other softmax of a layer is of its convolution's kernel",
    ),
    _encoder(
        "BigBird (full attention)",
        "BigBirdModel",
        BASE | {"attention_type": "original_full"},
        2,
        implementations=(EAGER,),
    ),
    _encoder("XLM", "XLMModel", XLM, 2, implementations=(EAGER,)),
    _encoder(
        "Funnel",
        "FunnelModel",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "pad_token_id": 0,
        },
        3,
        implementations=(EAGER,),
    ),
    architecture(
        FAMILY,
        _global_and_local,
        "Longformer",
        "LongformerModel",
        BASE | {"attention_window": 8, "sep_token_id": 2},
        2,
        implementations=(EAGER,),
        keeps="the scores are put together from sliding chunks",
    ),
    _encoder(
        "Nyströmformer",
        "NystromformerModel",
        BASE | {"num_landmarks": LENGTH, "segment_means_seq_len": LENGTH},
        2,
        implementations=(EAGER,),
        note="as many landmarks as tokens, where it is plain attention",
    ),
    _encoder(
        "FNet (no attention)",
        "FNetModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "hidden_dropout_prob": 0.0,
            "pad_token_id": 0,
        },
        0,
        implementations=(EAGER,),
        pads=False,
    ),
)
