"""What a mask is whose values are known: a band of diagonals, padding, blocks, or a bias.

Lq query length, Lk key length; a mask broadcasts to (..., Lq, Lk).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sage_compiler.passes.bands import Band

# A number so low, added to a score or in its place, leaves no weight beside a live key. float16
# has none below its minimum but -inf.
_LOW: Final = -1e9


@dataclass(frozen=True, eq=False, slots=True)
class Constant:
    """The values of a mask, looked at.

    Attributes:
        visible: bool, broadcastable to (..., Lq, Lk): false where keys are hidden. None where
            ``band`` says that already.
        band: the diagonals that are visible, when it is exactly these everywhere.
        fill: the highest number that a hidden position holds; -inf for a bool mask.
        is_mixed: ``fill`` is finite, and some positions hold -inf.
        bound: no visible position holds a number of larger magnitude.
        is_finite: no position holds NaN or +inf.
        repeated: dims of size 2 or more along which all entries are equal.
        words: what else can be said of its pattern; may be empty.
    """

    visible: Tensor | None
    band: Band | None
    fill: float
    bound: float
    is_finite: bool
    repeated: tuple[int, ...]
    words: str
    is_mixed: bool = False

    @property
    def is_boolean(self) -> bool:
        """Whether it says nothing but visible and hidden."""
        return self.is_finite and self.bound == 0


def lowest_fill(dtype: torch.dtype) -> float:
    """What a float mask of this dtype must hold at most where it hides a key."""
    return max(_LOW, torch.finfo(dtype).min)


def read(mask: Tensor, query_length: int, key_length: int) -> Constant | None:
    """Look at a mask's values; None when it is neither bool nor of floating point."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return None
    repeated = _repeated(mask)
    for dim in repeated:
        mask = mask.narrow(dim, 0, 1)
    mask = mask.reshape((1,) * (2 - mask.dim()) + tuple(mask.shape))
    visible, fill, bound, is_finite = _parts(mask)
    band, words = None, ""
    if is_finite and all(size == 1 for size in mask.shape[:-2]):
        plane = visible.reshape(visible.shape[-2:])
        band, words = _pattern(plane, query_length, key_length)
    elif not is_finite:
        words = "holds NaN or +inf"
    elif visible.numel():
        words = "differs between heads or batch entries"
    left = visible if band is None else None  # masks of long sequences are large
    is_mixed = fill > -torch.inf and bool((mask == -torch.inf).any())
    return Constant(left, band, fill, bound, is_finite, repeated, words, is_mixed)


def _repeated(mask: Tensor) -> tuple[int, ...]:
    found = []
    for dim, size in enumerate(mask.shape):
        if size < 2:
            continue
        first = mask.narrow(dim, 0, 1)
        if mask.stride(dim) == 0 or bool((mask == first).all()):
            found.append(dim)
            mask = first
        else:
            continue
    return tuple(found)


def _parts(mask: Tensor) -> tuple[Tensor, float, float, bool]:
    """visible, fill, bound, is_finite."""
    if mask.dtype == torch.bool:
        return mask, -torch.inf, 0.0, True
    if bool((mask.isnan() | (mask == torch.inf)).any()):
        return torch.ones_like(mask, dtype=torch.bool), -torch.inf, torch.inf, False
    for limit in (lowest_fill(mask.dtype), -torch.inf):
        hidden = mask <= limit
        shown = mask.masked_fill(hidden, 0)
        bound = float(shown.abs().max()) if shown.numel() else 0.0
        if bound == 0:
            break
    # Beside a bias, a low but finite number is a bias too: only -inf hides.
    highest = mask.masked_fill(~hidden, -torch.inf)
    fill = float(highest.max()) if highest.numel() else -torch.inf
    return ~hidden, fill, bound, True


def _pattern(plane: Tensor, query_length: int, key_length: int) -> tuple[Band | None, str]:
    """The band of bool (Lq, Lk), or words for what it is instead. Either size may be 1."""
    if bool(plane.all()):
        return Band(), ""
    whole = plane.expand(query_length, key_length)
    spans = _spans(whole)
    band = None if spans is None else _band(*spans, key_length)
    if band is not None:
        return band, ""
    if plane.shape[0] == 1 and plane.shape[1] > 1:
        return None, "key padding"
    blocks = 0 if spans is None else _blocks(*spans, query_length, key_length)
    return None, f"block-diagonal, {blocks} blocks" if blocks else ""


def _spans(plane: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """first, last: (Lq,) of each row's visible keys, and whether there are any: bool (Lq,).

    None when a row has a gap, or no row sees anything. Without an integer matrix.
    """
    key_length = plane.shape[1]
    count = plane.sum(1)
    live = count > 0
    bytes_ = plane.contiguous().view(torch.uint8)
    first = bytes_.argmax(1)
    last = key_length - 1 - bytes_.flip(1).argmax(1)
    whole = (count == last - first + 1) | ~live
    return (first, last, live) if bool(whole.all() & live.any()) else None


def _band(first: Tensor, last: Tensor, live: Tensor, key_length: int) -> Band | None:
    query = torch.arange(first.shape[0])
    low, high = int((first - query)[live].min()), int((last - query)[live].max())
    band_first = (query + low).clamp(min=0)
    band_last = (query + high).clamp(max=key_length - 1)
    inside = (first == band_first) & (last == band_last)
    right = torch.where(live, inside, band_first > band_last)
    return Band(low, high) if bool(right.all()) else None


def _blocks(first: Tensor, last: Tensor, live: Tensor, query_length: int, key_length: int) -> int:
    """How many blocks along the diagonal of a square mask; 0 when it is not made of these."""
    if query_length != key_length or not bool(live.all()):
        return 0
    own = (first[first] == first) & (last[first] == last)  # the block that its first row has
    query = torch.arange(query_length)
    inside = (first <= query) & (query <= last)
    return int(first.unique().numel()) if bool((own & inside).all()) else 0
