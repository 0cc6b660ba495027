"""Models of the diffusers library: denoisers of video."""

from __future__ import annotations

from typing import Final

import torch

from tests.zoo.architecture import Architecture, Inputs, normal, padding
from tests.zoo.diffusion import TWO_HEADS, denoiser, time


def _wan(padded: bool) -> Inputs:
    return {
        "hidden_states": normal(2, 4, 2, 8, 8),
        "encoder_hidden_states": normal(2, 6, 16),
        "timestep": time().long(),
    }


def _cogvideo(padded: bool) -> Inputs:
    return {
        "hidden_states": normal(2, 2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 6, 16),
        "timestep": time(),
    }


def _ltx(padded: bool) -> Inputs:
    return {
        "hidden_states": normal(2, 2 * 4 * 4, 8),
        "encoder_hidden_states": normal(2, 6, 16),
        "timestep": time(),
        "encoder_attention_mask": padding(6) if padded else torch.ones(2, 6, dtype=torch.long),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def _hunyuan(padded: bool) -> Inputs:
    mask = padding(6) if padded else torch.ones(2, 6, dtype=torch.long)
    return {
        "hidden_states": normal(2, 4, 2, 8, 8),
        "timestep": time().long(),
        "encoder_hidden_states": normal(2, 6, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": normal(2, 8),
        "guidance": torch.tensor([6.0, 6.0]),
    }


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    denoiser(
        "Wan",
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        _wan,
        4,
    ),
    denoiser(
        "CogVideoX",
        "CogVideoXTransformer3DModel",
        {
            **TWO_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 6,
        },
        _cogvideo,
        2,
    ),
    denoiser(
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "num_layers": 2,
            "caption_channels": 16,
        },
        _ltx,
        4,
        pads=True,
    ),
    denoiser(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        },
        _hunyuan,
        3,
        pads=True,
    ),
)
