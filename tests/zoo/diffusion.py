"""Models of the diffusers library: denoisers of images, and an autoencoder."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from tests.zoo.architecture import BOTH, EAGER, SDPA, Architecture, Inputs, normal, padding

FAMILY: Final = "Diffusion"
TIME: Final = 3.0


def time(batch: int = 2) -> Tensor:
    """A time step for each sample."""
    return torch.full((batch,), TIME)


def text_mask(padded: bool, name: str, length: int) -> Inputs:
    """The mask of a text that is padded, under the name that the model gives it."""
    return {name: padding(length)} if padded else {}


def make(model: str, config: dict[str, Any], implementation: str) -> nn.Module:
    """``diffusers.<model>``; "eager" is the older processor, which writes attention out.

    Models that have one processor of their own are offered as "sdpa" only.
    """
    diffusers: Any = importlib.import_module("diffusers")
    module: nn.Module = getattr(diffusers, model)(**config)
    if implementation == EAGER:
        processors: Any = importlib.import_module("diffusers.models.attention_processor")
        for child in module.modules():
            if isinstance(child, processors.Attention):
                child.set_processor(processors.AttnProcessor())
    return module


def denoiser(
    name: str,
    model: str,
    config: dict[str, Any],
    inputs: Callable[[bool], Inputs],
    true_sites: int,
    *,
    implementations: tuple[str, ...] = (SDPA,),
    pads: bool = False,
    note: str = "",
) -> Architecture:
    """An entry for ``diffusers.<model>``."""
    return Architecture(
        name=name,
        family=FAMILY,
        build=partial(make, model, config),
        inputs=inputs,
        true_sites=true_sites,
        implementations=implementations,
        pads=pads,
        note=note,
        requires="diffusers",
    )


TWO_HEADS: Final[dict[str, Any]] = {"num_attention_heads": 2, "attention_head_dim": 16}


def _unet(padded: bool) -> Inputs:
    return {
        "sample": normal(2, 4, 8, 8),
        "timestep": 3,
        "encoder_hidden_states": normal(2, 6, 32),
        **text_mask(padded, "encoder_attention_mask", 6),
    }


def _classes(padded: bool) -> Inputs:
    return {
        "hidden_states": normal(2, 4, 8, 8),
        "timestep": torch.tensor([3, 5]),
        "class_labels": torch.tensor([1, 2]),
    }


def _sd3(padded: bool) -> Inputs:
    return {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 6, 32),
        "pooled_projections": normal(2, 16),
        "timestep": time(),
    }


def _flux(padded: bool) -> Inputs:
    return {
        "hidden_states": normal(2, 16, 4),
        "encoder_hidden_states": normal(2, 6, 32),
        "pooled_projections": normal(2, 16),
        "timestep": time(),
        "img_ids": torch.randint(0, 4, (16, 3), generator=torch.Generator().manual_seed(0)),
        "txt_ids": torch.zeros(6, 3),
    }


def _captioned(padded: bool) -> Inputs:
    return {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 6, 16),
        "timestep": time(),
        **text_mask(padded, "encoder_attention_mask", 6),
    }


def _lumina2(padded: bool) -> Inputs:
    mask = padding(6) if padded else torch.ones(2, 6, dtype=torch.long)
    return {
        "hidden_states": normal(2, 4, 8, 8),
        "timestep": time(),
        "encoder_hidden_states": normal(2, 6, 16),
        "encoder_attention_mask": mask.bool(),
    }


def _qwen_image(padded: bool) -> Inputs:
    return {
        "hidden_states": normal(2, 16, 16),
        "encoder_hidden_states": normal(2, 6, 16),
        "encoder_hidden_states_mask": padding(6).bool() if padded else None,
        "timestep": time(),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def _autoencoder(padded: bool) -> Inputs:
    return {"sample": normal(1, 3, 16, 16)}


ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    denoiser(
        "UNet2D (Stable Diffusion)",
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
        _unet,
        2 * (1 + 1 + 2),
        implementations=BOTH,
        pads=True,
        note="each transformer block attends to itself and to the text",
    ),
    denoiser(
        "DiT",
        "DiTTransformer2DModel",
        {
            **TWO_HEADS,
            "in_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
        },
        _classes,
        2,
        implementations=BOTH,
    ),
    denoiser(
        "Stable Diffusion 3",
        "SD3Transformer2DModel",
        {
            **TWO_HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
        _sd3,
        2,
    ),
    denoiser(
        "FLUX",
        "FluxTransformer2DModel",
        {
            **TWO_HEADS,
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        _flux,
        2,
    ),
    denoiser(
        "PixArt",
        "PixArtTransformer2DModel",
        {
            **TWO_HEADS,
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "in_channels": 4,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        lambda padded: (
            _captioned(padded) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        ),
        4,
        implementations=BOTH,
        pads=True,
    ),
    denoiser(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "ffn_dim_multiplier": None,
            "norm_eps": 1e-5,
            "scaling_factor": 1.0,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 16,
        },
        _lumina2,
        4,
        pads=True,
    ),
    denoiser(
        "Sana (linear self-attention)",
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
            "patch_size": 1,
        },
        _captioned,
        2,
        pads=True,
        note="only its cross-attention has a softmax",
    ),
    denoiser(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        {
            **TWO_HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
            "out_channels": 4,
        },
        lambda padded: {
            "hidden_states": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 6, 32),
            "timestep": time(),
        },
        2,
    ),
    denoiser(
        "CogView4",
        "CogView4Transformer2DModel",
        {
            **TWO_HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "out_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        lambda padded: {
            "hidden_states": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 6, 16),
            "timestep": time(),
            "original_size": torch.full((2, 2), 8.0),
            "target_size": torch.full((2, 2), 8.0),
            "crop_coords": torch.zeros(2, 2),
        },
        2,
    ),
    denoiser(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        _qwen_image,
        2,
        pads=True,
    ),
    denoiser(
        "AutoencoderKL",
        "AutoencoderKL",
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "latent_channels": 4,
            "norm_num_groups": 4,
        },
        _autoencoder,
        2,
        implementations=BOTH,
    ),
)
