"""Every architecture of the zoo, and whether this environment can build it."""

from __future__ import annotations

import functools
import importlib
from typing import Final

from tests.zoo import (
    diffusion,
    sequence_to_sequence,
    sparse_variants,
    speech,
    text_decoders,
    text_encoders,
    timm_models,
    torch_modules,
    variants,
    video_diffusion,
    vision,
    written_out,
)
from tests.zoo.architecture import Architecture

ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    *text_encoders.ARCHITECTURES,
    *text_decoders.ARCHITECTURES,
    *sequence_to_sequence.ARCHITECTURES,
    *vision.ARCHITECTURES,
    *speech.ARCHITECTURES,
    *diffusion.ARCHITECTURES,
    *video_diffusion.ARCHITECTURES,
    *timm_models.ARCHITECTURES,
    *torch_modules.ARCHITECTURES,
    *written_out.ARCHITECTURES,
    *variants.ARCHITECTURES,
    *sparse_variants.ARCHITECTURES,
)
BY_NAME: Final = {architecture.name: architecture for architecture in ARCHITECTURES}


@functools.cache
def missing(package: str) -> str:
    """Why a package that an architecture requires cannot be imported; "" where it can."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} cannot be imported: {error}"
    return ""


def unavailable(architecture: Architecture) -> str:
    """Why this environment cannot build an architecture; "" where it can."""
    return missing(architecture.requires) if architecture.requires else ""
