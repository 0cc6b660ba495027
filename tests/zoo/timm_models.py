"""Models of the timm library, which needs a torchvision that fits the installed torch."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, Final

from torch import nn

from tests.zoo.architecture import BOTH, EAGER, WRITTEN, Architecture, Inputs, normal

FAMILY: Final = "timm"


def make(model: str, config: dict[str, Any], implementation: str) -> nn.Module:
    """``timm.create_model``; "eager" turns its fused attention off."""
    timm: Any = importlib.import_module("timm")
    layers: Any = importlib.import_module("timm.layers")
    fused = implementation != EAGER
    layers.set_fused_attn(fused, experimental=fused)
    module: nn.Module = timm.create_model(model, pretrained=False, **config)
    return module


def _timm(
    name: str,
    model: str,
    config: dict[str, Any],
    true_sites: int,
    *,
    size: int = 32,
    implementations: tuple[str, ...] = BOTH,
    note: str = "",
) -> Architecture:
    def inputs(padded: bool) -> Inputs:
        return {"x": normal(2, 3, size, size)}

    return Architecture(
        name=name,
        family=FAMILY,
        build=partial(make, model, config),
        inputs=inputs,
        true_sites=true_sites,
        implementations=implementations,
        note=note,
        requires="timm",
    )


SMALL: Final[dict[str, Any]] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}

ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    _timm("timm ViT", "vit_tiny_patch16_224", SMALL, 2),
    _timm("timm DeiT", "deit_tiny_patch16_224", SMALL, 2),
    _timm("timm BEiT", "beit_base_patch16_224", SMALL, 2),
    _timm("timm EVA", "eva02_tiny_patch14_224", SMALL, 2),
    _timm(
        "timm Swin",
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "num_classes": 5,
        },
        4,
    ),
    _timm(
        "timm MaxViT",
        "maxvit_rmlp_pico_rw_256",
        {
            "img_size": 64,
            "embed_dim": (32, 64),
            "depths": (1, 1),
            "num_classes": 5,
        },
        4,
        size=64,
        note="a block attends in windows and in grids",
    ),
    _timm(
        "timm XCiT",
        "xcit_nano_12_p16_224",
        {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5},
        4,
        implementations=WRITTEN,
        note="two blocks attend over channels, where the operator gets the tokens as head_dim",
    ),
)
