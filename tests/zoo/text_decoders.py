"""Decoders of the transformers library: causal, grouped heads, windows, ALiBi, softcap, sinks."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from tests.zoo.architecture import EAGER, VOCABULARY, Architecture
from tests.zoo.huggingface import SPECIAL, TEXT, architecture, decoder_text

FAMILY: Final = "Decoders of text"
GROUPED: Final[dict[str, Any]] = {**TEXT, "num_key_value_heads": 2}
GPT: Final[dict[str, Any]] = {
    **SPECIAL,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 64,
}
NO_DROPOUT: Final[dict[str, Any]] = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
EXPERTS: Final[dict[str, Any]] = {"num_experts_per_tok": 2}
LATENT: Final[dict[str, Any]] = {  # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
ROUTER: Final = "the other softmax of a layer is its router's"

_decoder = partial(architecture, FAMILY, decoder_text)

ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    _decoder("GPT-2", "GPT2Model", GPT | NO_DROPOUT, 2, decodes=True),
    _decoder(
        "OpenAI GPT",
        "OpenAIGPTModel",
        GPT | NO_DROPOUT,
        2,
        implementations=(EAGER,),
        keeps="the scores are multiplied by a causal buffer",
    ),
    _decoder(
        "GPT-Neo (local window)",
        "GPTNeoModel",
        {
            **SPECIAL,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "attention_dropout": 0.0,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
        },
        2,
        implementations=(EAGER,),
    ),
    _decoder("GPT-NeoX", "GPTNeoXModel", TEXT, 2),
    _decoder(
        "GPT-J", "GPTJModel", GPT | NO_DROPOUT | {"rotary_dim": 4}, 2, implementations=(EAGER,)
    ),
    _decoder(
        "CodeGen", "CodeGenModel", GPT | NO_DROPOUT | {"rotary_dim": 4}, 2, implementations=(EAGER,)
    ),
    _decoder("GPT-BigCode (MQA)", "GPTBigCodeModel", GPT | NO_DROPOUT | {"multi_query": True}, 2),
    _decoder(
        "OPT",
        "OPTModel",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        2,
    ),
    _decoder(
        "BLOOM (ALiBi)",
        "BloomModel",
        {**SPECIAL, "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
        2,
        implementations=(EAGER,),
    ),
    _decoder("Falcon (MQA)", "FalconModel", TEXT | {"multi_query": True, "alibi": False}, 2),
    _decoder(
        "Falcon (ALiBi)",
        "FalconModel",
        TEXT | {"multi_query": False, "alibi": True, "new_decoder_architecture": False},
        2,
    ),
    _decoder(
        "MPT (ALiBi)",
        "MptModel",
        {**SPECIAL, "d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY},
        2,
        implementations=(EAGER,),
    ),
    _decoder("Llama", "LlamaModel", GROUPED, 2, decodes=True),
    _decoder("Mistral (window)", "MistralModel", GROUPED | {"sliding_window": 4}, 2, decodes=True),
    _decoder(
        "Mixtral",
        "MixtralModel",
        GROUPED | EXPERTS | {"num_local_experts": 4},
        2,
        others=2,
        note=ROUTER,
    ),
    _decoder("Qwen2", "Qwen2Model", GROUPED, 2),
    _decoder(
        "Qwen2-MoE",
        "Qwen2MoeModel",
        GROUPED
        | EXPERTS
        | {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        2,
        others=2,
        note=ROUTER,
    ),
    _decoder("Qwen3 (QK-norm)", "Qwen3Model", GROUPED | {"head_dim": 8}, 2),
    _decoder("Phi", "PhiModel", GROUPED | {"qk_layernorm": True}, 2),
    _decoder("Phi-3", "Phi3Model", GROUPED, 2),
    _decoder("Gemma", "GemmaModel", GROUPED | {"head_dim": 8}, 2),
    _decoder(
        "Gemma 2 (softcap)",
        "Gemma2Model",
        GROUPED | {"head_dim": 8, "sliding_window": 4},
        2,
        implementations=(EAGER,),
    ),
    _decoder(
        "Gemma 3 (window and global)",
        "Gemma3TextModel",
        GROUPED
        | {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        2,
        decodes=True,
    ),
    _decoder(
        "GPT-OSS (sinks)",
        "GptOssModel",
        GROUPED | EXPERTS | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 4},
        2,
        others=2,
        implementations=(EAGER,),
        note=ROUTER,
    ),
    _decoder("Cohere", "CohereModel", GROUPED, 2),
    _decoder("Cohere 2", "Cohere2Model", GROUPED | {"sliding_window": 4}, 2),
    _decoder("OLMo 2 (QK-norm)", "Olmo2Model", GROUPED, 2),
    _decoder("StableLM", "StableLmModel", GROUPED, 2),
    _decoder("Granite", "GraniteModel", GROUPED | {"attention_multiplier": 0.2}, 2),
    _decoder("StarCoder2", "Starcoder2Model", GROUPED | {"sliding_window": 4}, 2),
    _decoder("Persimmon", "PersimmonModel", TEXT, 2),
    _decoder("Nemotron", "NemotronModel", GROUPED, 2),
    _decoder("GLM-4", "Glm4Model", GROUPED | {"head_dim": 8}, 2),
    _decoder("SmolLM3", "SmolLM3Model", GROUPED, 2),
    _decoder(
        "DeepSeek-V3 (latent attention)",
        "DeepseekV3Model",
        TEXT | EXPERTS | LATENT | {"num_key_value_heads": 4, "n_routed_experts": 4},
        2,
        note="the value's head_dim is another than the query's",
    ),
    _decoder(
        "DiffLlama (differential attention)",
        "DiffLlamaModel",
        GROUPED,
        4,
        note="two attentions a layer, of the same Q and K",
    ),
    _decoder(
        "XGLM",
        "XGLMModel",
        {
            **SPECIAL,
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 48,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        2,
        implementations=(EAGER,),
        keeps="the scores are limited from below by the dtype's minimum",
    ),
    _decoder(
        "BioGPT",
        "BioGptModel",
        TEXT | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        2,
    ),
    _decoder(
        "CTRL",
        "CTRLModel",
        {
            **GPT,
            "dff": 48,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
        2,
        implementations=(EAGER,),
    ),
    _decoder(
        "XLNet (relative positions)",
        "XLNetModel",
        {
            **SPECIAL,
            "d_model": 32,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 48,
            "vocab_size": VOCABULARY,
            "dropout": 0.0,
        },
        2,
        implementations=(EAGER,),
    ),
)
