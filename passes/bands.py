"""Bands of diagonals: what constants and comparisons prove, and how the operator can say it.

A query i sees key j iff ``low <= j - i <= high``. Lq query length, Lk key length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import SymBool
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sage_compiler.passes.axes import Size
from sage_compiler.semantics import UNBOUNDED, MaskClass


@dataclass(frozen=True, eq=False, slots=True)
class Band:
    """Which diagonals are visible; None: no limit on that side."""

    low: Size | None = None
    high: Size | None = None

    @property
    def hides(self) -> bool:
        """Whether there is a limit at all."""
        return self.low is not None or self.high is not None


@dataclass(frozen=True, slots=True)
class Window:
    """Bands as the operator says them: its mask class and sides."""

    mask_class: MaskClass = MaskClass.NONE
    left: int = UNBOUNDED
    right: int = UNBOUNDED

    def __str__(self) -> str:
        words = str(self.mask_class).replace("_bottom_right", " bottom-right")
        if self.mask_class not in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT):
            return words
        sides = [
            "unbounded" if side == UNBOUNDED else str(side) for side in (self.left, self.right)
        ]
        return f"{words} ({sides[0]}, {sides[1]})"


def known(condition: bool | SymBool) -> bool:
    """Whether a comparison of sizes holds for all values that its symbols can take."""
    return statically_known_true(condition)


def as_number(size: Size) -> int | None:
    """The size if it is the same number always; differences of symbols may be."""
    if isinstance(size, int):
        return int(size)
    expression = size.node.expr
    return int(expression) if expression.is_Integer else None


def smallest(band: Band, query_length: Size, key_length: Size) -> Band:
    """The band without the sides that hide nothing anyway."""
    low, high = band.low, band.high
    if low is not None and known(low <= 1 - query_length):
        low = None
    if high is not None and known(high >= key_length - 1):
        high = None
    return Band(low, high)


def keeps_rows_alive(bands: Sequence[Band], query_length: Size, key_length: Size) -> bool:
    """Whether every query provably sees a key that no band hides."""
    if known(query_length == 0):
        return True
    lows = [band.low for band in bands if band.low is not None]
    highs = [band.high for band in bands if band.high is not None]
    # Row i sees max(0, i + low) to min(Lk - 1, i + high).
    return (
        known(key_length >= 1)
        and all(known(high >= 0) for high in highs)
        and all(known(query_length - 1 + low <= key_length - 1) for low in lows)
        and all(known(low <= high) for low in lows for high in highs)
    )


def express(
    bands: Sequence[Band], query_length: Size, key_length: Size
) -> tuple[Window, tuple[int, ...]]:
    """As many bands as one window of the operator can say, and the indexes of these.

    A window is said from the top-left or the bottom-right corner; where both can, from the one in
    whose words the mask ends at the diagonal, as causal ones do.
    """
    needed = [smallest(band, query_length, key_length) for band in bands]
    corners = [
        (MaskClass.CAUSAL, MaskClass.WINDOW, 0),
        (
            MaskClass.CAUSAL_BOTTOM_RIGHT,
            MaskClass.WINDOW_BOTTOM_RIGHT,
            key_length - query_length,
        ),
    ]
    best: tuple[Window, tuple[int, ...]] = (Window(), ())
    rank = (-1, False)
    for causal, windowed, offset in corners:
        sides = [_sides(band, offset) for band in needed]
        used = tuple(at for at, found in enumerate(sides) if found is not None)
        left = min((side[0] for side in sides if side and side[0] != UNBOUNDED), default=UNBOUNDED)
        right = min((side[1] for side in sides if side and side[1] != UNBOUNDED), default=UNBOUNDED)
        if (len(used), right == 0) > rank:
            rank = (len(used), right == 0)
            best = (_window(causal, windowed, left, right), used)
    return best


def _sides(band: Band, offset: Size) -> tuple[int, int] | None:
    """left, right of the corner whose diagonal is ``offset``; None where it cannot be said."""
    left = UNBOUNDED if band.low is None else as_number(offset - band.low)
    right = UNBOUNDED if band.high is None else as_number(band.high - offset)
    if left is None or right is None:
        return None
    # The diagonal itself is hidden: a window from this corner cannot say that.
    if (band.low is not None and left < 0) or (band.high is not None and right < 0):
        return None
    return left, right


def _window(causal: MaskClass, windowed: MaskClass, left: int, right: int) -> Window:
    if (left, right) == (UNBOUNDED, UNBOUNDED):
        return Window()
    return Window(causal) if (left, right) == (UNBOUNDED, 0) else Window(windowed, left, right)


def describe_band(band: Band, query_length: Size, key_length: Size) -> str:
    """A band in formulas: ``tril(ones(6, 9), diagonal=3)``, or its inequality."""
    size = f"({query_length}, {key_length})"
    needed = smallest(band, query_length, key_length)
    low, high = needed.low, needed.high
    if low is None and high is None:
        return f"every entry of {size} is visible"
    if low is None and high is not None and _is_corner(high, query_length, key_length):
        return f"equals tril(ones{size}, diagonal={high})"
    words = "" if band.low is None else f"{band.low} <= "
    words += "key - query" if band.high is None else f"key - query <= {band.high}"
    return f"equals the band {words} of {size}"


def _is_corner(diagonal: Size, query_length: Size, key_length: Size) -> bool:
    return known(diagonal == 0) or known(diagonal == key_length - query_length)
