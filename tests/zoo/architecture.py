"""What an entry of the zoo is, and what the entries share: seeded weights and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

EAGER: Final = "eager"
SDPA: Final = "sdpa"
BOTH: Final = (EAGER, SDPA)
# For modules that write their attention in one way only.
WRITTEN: Final = ("written",)

LENGTH: Final = 12  # tokens of a sequence
VOCABULARY: Final = 99

Inputs: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model: a tiny random configuration and the number of attentions it executes.

    Attributes:
        name: unique, as in case names and documentation.
        family: the section of the documentation.
        build: from the name of an implementation to a module, its weights as yet unseeded.
        inputs: keyword arguments of forward, with padding or without.
        true_sites: softmax attentions that one forward executes; found by reading the model.
        others: softmaxes of one forward that are no attention: routers, classifiers.
        implementations: the ways to write attention that the model offers.
        pads: whether it takes padding.
        trains: whether it can be run in training mode and differentiated.
        decodes: whether it is also run token by token, with the caches of transformers.
        keeps: which true sites are kept and why; "" where all are rewritten.
        note: what to know of the form, and what the others are.
        requires: a package besides torch and transformers that it needs.
    """

    name: str
    family: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[bool], Inputs]
    true_sites: int
    others: int = 0
    implementations: tuple[str, ...] = BOTH
    pads: bool = False
    trains: bool = True
    decodes: bool = False
    keeps: str = ""
    note: str = ""
    requires: str = ""


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with weights that make attention matter.

    Tiny models of small random weights attend almost evenly, and diffusion models begin with
    gates of zero: a wrong scale or mask would hardly change what they return. Here matrices keep
    the variance of what they multiply, and no vector is zero or one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(noise, alpha=0.1)
    return module


def normal(*size: int, seed: int = 0) -> Tensor:
    """Seeded standard normal values, float32."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))


def tokens(length: int = LENGTH, batch: int = 2, seed: int = 0) -> Tensor:
    """Token numbers (batch, length), int64, none of them special."""
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(5, VOCABULARY, (batch, length), generator=generator)


def padding(length: int = LENGTH, *, left: bool = False) -> Tensor:
    """A mask (2, length), int64: the second sequence is shorter by a third."""
    mask = torch.ones(2, length, dtype=torch.long)
    missing = length // 3
    mask[1, slice(None, missing) if left else slice(length - missing, None)] = 0
    return mask
