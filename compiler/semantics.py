"""What one attention computes, besides its tensors: mask class, scale, softcap, dead rows.

Shared by the operator, its kernels and the graph passes, so that all of them mean the same
thing by the same word. Shapes: B batch, H query heads, Hkv key/value heads, Lq query length,
Lk key length, D head_dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Final

import torch

from sage_compiler.errors import InvalidAttentionError

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)  # of query, key and value
UNBOUNDED: Final = -1  # a side of a window that has no limit
_FAR: Final = 1 << 40  # beyond any length: a window's side that far has no limit either


class MaskClass(StrEnum):
    """Which keys a query position may see, before any explicit mask.

    Query i and key j lie on the diagonal when j == i (top-left) or j == i + Lk - Lq
    (bottom-right). The two differ only when Lq != Lk.
    """

    NONE = "none"
    CAUSAL = "causal"  # top-left: what scaled_dot_product_attention means by is_causal
    CAUSAL_BOTTOM_RIGHT = "causal_bottom_right"
    WINDOW = "window"  # top-left, with window_left and window_right
    WINDOW_BOTTOM_RIGHT = "window_bottom_right"


class DeadRows(StrEnum):
    """What a query row that sees no key yields (with Lk == 0 it is always zero)."""

    ZERO = "zero"  # as scaled_dot_product_attention
    NAN = "nan"  # as softmax over a row of -inf


class RotaryPairs(StrEnum):
    """Which of the R rotated channels a rotary embedding turns together."""

    HALF = "half"  # i and i + R / 2: Llama, GPT-NeoX
    INTERLEAVED = "interleaved"  # 2 i and 2 i + 1: GPT-J, FLUX


@dataclass(frozen=True, slots=True)
class Band:
    """Key j is visible to query i iff ``-left <= j - (i + offset) <= right``; None: no limit."""

    left: int | None
    right: int | None
    offset: int

    def pairs(self, query_length: int, key_length: int) -> int:
        """How many pairs of a query and a key it shows."""
        diagonal = torch.arange(query_length) + self.offset
        first = torch.zeros_like(diagonal) if self.left is None else (diagonal - self.left).clamp(0)
        last = torch.full_like(diagonal, key_length - 1)
        if self.right is not None:
            last = torch.minimum(last, diagonal + self.right)
        return int((last - first + 1).clamp(0).sum())


@dataclass(frozen=True, slots=True)
class Semantics:
    """The scalar part of one attention.

    Attributes:
        mask_class: the visible band; an explicit mask is applied on top of it.
        window_left, window_right: keys before and after the diagonal that a window shows, the
            diagonal not counted; ``UNBOUNDED`` for no limit. Only with a window class.
        scale: factor of Q K^T; None means 1 / sqrt(D).
        softcap: scores become ``softcap * tanh(score / softcap)`` before masks; None: off.
        dead_rows: what a row without a visible key yields.

    Raises:
        InvalidAttentionError: a window without a window class, a softcap that is not positive, or a
            softcap or scale that is not finite.
    """

    mask_class: MaskClass = MaskClass.NONE
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    scale: float | None = None
    softcap: float | None = None
    dead_rows: DeadRows = DeadRows.ZERO

    def __post_init__(self) -> None:
        windowed = self.mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)
        if not windowed and (self.window_left, self.window_right) != (UNBOUNDED, UNBOUNDED):
            raise InvalidAttentionError(
                f"window=({self.window_left}, {self.window_right}) with mask class "
                f"{self.mask_class}; use 'window' or 'window_bottom_right'"
            )
        if min(self.window_left, self.window_right) < UNBOUNDED:
            raise InvalidAttentionError(
                f"window=({self.window_left}, {self.window_right}); each side counts keys, "
                f"{UNBOUNDED} means no limit"
            )
        if self.softcap is not None and not 0 < self.softcap < inf:
            raise InvalidAttentionError(
                f"softcap={self.softcap}; it must be positive and finite, or None"
            )
        if self.scale is not None and not -inf < self.scale < inf:
            raise InvalidAttentionError(f"scale={self.scale}; it must be finite, or None")

    def scale_for(self, head_dim: int) -> float:
        """The factor of Q K^T for this head_dim (0 has no scores, hence no scale)."""
        if self.scale is not None:
            return self.scale
        return 1.0 / float(head_dim) ** 0.5 if head_dim else 1.0

    def band(self, query_length: int, key_length: int) -> Band | None:
        """The visible band for these lengths; None when every key is visible."""
        bottom_right = key_length - query_length
        # Positions are computed in 64 bits.
        left = None if self.window_left == UNBOUNDED else min(self.window_left, _FAR)
        right = None if self.window_right == UNBOUNDED else min(self.window_right, _FAR)
        match self.mask_class:
            case MaskClass.NONE:
                return None
            case MaskClass.CAUSAL:
                return Band(None, 0, 0)
            case MaskClass.CAUSAL_BOTTOM_RIGHT:
                return Band(None, 0, bottom_right)
            case MaskClass.WINDOW:
                return Band(left, right, 0)
            case MaskClass.WINDOW_BOTTOM_RIGHT:
                return Band(left, right, bottom_right)


def parse_mask_class(text: str) -> MaskClass:
    """Raises InvalidAttentionError for an unknown mask class, listing the known ones."""
    try:
        return MaskClass(text)
    except ValueError:
        known = ", ".join(MaskClass)
        raise InvalidAttentionError(f"unknown mask class {text!r}; known: {known}") from None


def parse_dead_rows(text: str) -> DeadRows:
    """Raises InvalidAttentionError for an unknown word, listing the known ones."""
    try:
        return DeadRows(text)
    except ValueError:
        known = ", ".join(DeadRows)
        raise InvalidAttentionError(f"unknown dead_rows {text!r}; known: {known}") from None


@functools.lru_cache(maxsize=1024)
def parse_semantics(
    mask_class: str,
    scale: float | None,
    dead_rows: str,
    softcap: float | None,
    window_left: int,
    window_right: int,
) -> Semantics:
    """The operator's scalar arguments as one object.

    Raises:
        InvalidAttentionError: an unknown word or values that contradict each other.
    """
    return Semantics(
        parse_mask_class(mask_class),
        window_left,
        window_right,
        scale,
        softcap,
        parse_dead_rows(dead_rows),
    )
