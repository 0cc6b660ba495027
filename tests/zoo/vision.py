"""Models of images and video of the transformers library: windows, pyramids, prompts, queries."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch

from tests.zoo.architecture import EAGER, LENGTH, Architecture, Inputs, normal, padding, tokens
from tests.zoo.huggingface import NO_DROPOUT, SIZES, TEXT, architecture

FAMILY: Final = "Vision"
PIXELS: Final = 16
PATCHED: Final[dict[str, Any]] = {**SIZES, **NO_DROPOUT, "image_size": PIXELS, "patch_size": 4}
SWIN: Final[dict[str, Any]] = {
    **NO_DROPOUT,
    "image_size": PIXELS,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
PYRAMID: Final[dict[str, Any]] = {
    **NO_DROPOUT,
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "drop_path_rate": 0.0,
}
CLIP_TEXT: Final[dict[str, Any]] = {**TEXT, "max_position_embeddings": 16, "attention_dropout": 0.0}
CLIP_IMAGE: Final[dict[str, Any]] = {**SIZES, "image_size": PIXELS, "patch_size": 4}
DETR_CNN: Final[dict[str, Any]] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}


def image(padded: bool, size: int = PIXELS) -> Inputs:
    """Two images; they are never padded."""
    return {"pixel_values": normal(2, 3, size, size)}


def video(padded: bool) -> Inputs:
    """Two videos of four frames."""
    return {"pixel_values": normal(2, 4, 3, PIXELS, PIXELS)}


def image_and_text(padded: bool) -> Inputs:
    inputs: Inputs = {"input_ids": tokens(), "pixel_values": normal(2, 3, PIXELS, PIXELS)}
    return inputs | {"attention_mask": padding()} if padded else inputs


def _queries(padded: bool) -> Inputs:
    """The Q-Former's learned queries and the image's features."""
    inputs: Inputs = {
        "query_embeds": normal(2, 6, 32),
        "encoder_hidden_states": normal(2, 10, 32, seed=1),
    }
    return inputs | {"encoder_attention_mask": padding(10)} if padded else inputs


def _masked_image(padded: bool) -> Inputs:
    """Images of which one has a margin."""
    inputs = image(padded, 64)
    if padded:
        mask = torch.ones(2, 64, 64, dtype=torch.long)
        mask[1, :, 40:] = 0
        inputs["pixel_mask"] = mask
    return inputs


def _prompts(padded: bool) -> Inputs:
    """What SAM's mask decoder takes: an image's embedding and a point."""
    return {"pixel_values": normal(1, 3, 32, 32), "input_points": torch.tensor([[[[4.0, 9.0]]]])}


def _embedded(padded: bool) -> Inputs:
    inputs: Inputs = {"inputs": normal(2, LENGTH, 32)}
    return inputs | {"attention_mask": padding()} if padded else inputs


def _patches(padded: bool) -> Inputs:
    """Qwen2-VL's flattened patches: two images, one of 4 x 4 patches and one of 4 x 8."""
    return {
        "hidden_states": normal(48, 3 * 2 * 4 * 4),
        "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]]),
    }


def _tiles(padded: bool) -> Inputs:
    """Mllama's input: one image of up to two tiles, the second of which may be missing."""
    present = torch.tensor([[[1, 0]]]) if padded else torch.tensor([[[1, 1]]])
    return {
        "pixel_values": normal(1, 1, 2, 3, PIXELS, PIXELS),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": present,
    }


_vision = partial(architecture, FAMILY, image, pads=False)


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    _vision("ViT", "ViTModel", PATCHED, 2),
    _vision("DeiT", "DeiTModel", PATCHED, 2),
    _vision("DINOv2", "Dinov2Model", PATCHED | {"mlp_ratio": 2}, 2),
    _vision("DINOv3 (RoPE)", "DINOv3ViTModel", PATCHED | {"num_register_tokens": 2}, 2),
    _vision("BEiT", "BeitModel", PATCHED | {"use_relative_position_bias": True}, 2),
    _vision("Data2Vec vision", "Data2VecVisionModel", PATCHED, 2),
    _vision(
        "YOLOS", "YolosModel", PATCHED | {"image_size": [16, 16], "num_detection_tokens": 3}, 2
    ),
    _vision("Swin", "SwinModel", SWIN, 4),
    _vision("SwinV2", "Swinv2Model", SWIN, 4, implementations=(EAGER,)),
    _vision("SegFormer", "SegformerModel", PYRAMID | {"patch_sizes": [3, 3], "strides": [2, 2]}, 2),
    _vision(
        "PVT",
        "PvtModel",
        PYRAMID
        | {
            "image_size": PIXELS,
            "sequence_reduction_ratios": [2, 1],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
        },
        2,
        implementations=(EAGER,),
    ),
    architecture(
        FAMILY,
        partial(image, size=32),
        "Hiera",
        "HieraModel",
        {
            "image_size": [32, 32],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "embed_dim_multiplier": 2.0,
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "masked_unit_size": [2, 2],
            "patch_size": [7, 7],
            "patch_stride": [4, 4],
            "patch_padding": [3, 3],
            "drop_path_rate": 0.0,
        },
        2,
        implementations=(EAGER,),
        pads=False,
    ),
    architecture(FAMILY, video, "ViViT", "VivitModel", PATCHED | {"num_frames": 4}, 2, pads=False),
    architecture(
        FAMILY,
        video,
        "TimeSformer",
        "TimesformerModel",
        PATCHED | {"num_frames": 4},
        4,
        implementations=(EAGER,),
        pads=False,
        note="a layer attends in time, then in space",
    ),
    architecture(
        FAMILY,
        image_and_text,
        "CLIP",
        "CLIPModel",
        {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE, "projection_dim": 16},
        4,
    ),
    architecture(
        FAMILY,
        image_and_text,
        "SigLIP",
        "SiglipModel",
        {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE},
        5,
        note="one is the pooling head's, an nn.MultiheadAttention",
    ),
    architecture(
        FAMILY,
        image_and_text,
        "BLIP",
        "BlipModel",
        {"text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE, "projection_dim": 16},
        4,
        implementations=(EAGER,),
    ),
    architecture(
        FAMILY,
        _queries,
        "BLIP-2 Q-Former",
        "Blip2QFormerModel",
        {**TEXT, **NO_DROPOUT, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        4,
    ),
    architecture(
        FAMILY,
        _prompts,
        "SAM",
        "SamModel",
        {
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "mlp_dim": 48,
                "image_size": 32,
                "patch_size": 8,
                "output_channels": 16,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 8,
            },
            "prompt_encoder_config": {
                "hidden_size": 16,
                "image_size": 32,
                "patch_size": 8,
                "image_embedding_size": 4,
                "mask_input_channels": 4,
            },
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        },
        2 + 2 * 3 + 1,
        pads=False,
        note="an image encoder with relative positions and a two-way decoder",
    ),
    architecture(
        FAMILY,
        _masked_image,
        "DETR",
        "DetrModel",
        {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_queries": 5,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": DETR_CNN,
        },
        3,
    ),
    architecture(
        FAMILY,
        _embedded,
        "Perceiver",
        "PerceiverModel",
        {
            "num_latents": 6,
            "d_latents": 16,
            "d_model": 32,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "attention_probs_dropout_prob": 0.0,
        },
        3,
        implementations=(EAGER,),
    ),
    architecture(
        FAMILY,
        _patches,
        "Qwen2-VL vision",
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        2,
        pads=False,
    ),
    architecture(
        FAMILY,
        _tiles,
        "Mllama vision",
        "MllamaVisionModel",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 48,
            "image_size": PIXELS,
            "patch_size": 4,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        3,
    ),
)
