"""A program under construction: its random choices, source lines and inputs.

Letters name dimensions: b batch, h heads (key/value heads where g, the group, stands beside it),
n batch times heads, q query positions, k key positions, d head_dim, e head_dim of the values,
1 a dimension of size one.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")

# What the source of a program becomes when it is evaluated in float64 as a reference.
_WIDE: Final = (
    (re.compile(r"torch\.autocast\([^)]*\)"), 'torch.autocast("cpu", enabled=False)'),
    (re.compile(r"\.(float|half)\(\)"), ".double()"),
    (re.compile(r"torch\.(float32|bfloat16|float16)\b"), "torch.float64"),
)
_SIZES: Final = {
    "b": "B",
    "h": "H",
    "g": "G",
    "n": "N",
    "q": "Lq",
    "k": "Lk",
    "d": "D",
    "e": "E",
}


@dataclass(frozen=True, slots=True)
class Program:
    """One random program.

    Attributes:
        seed: makes it again.
        source: of a function ``program`` of the inputs.
        inputs: its arguments.
        dtype: of its floating-point inputs.
        attentions: how many attentions it computes.
        doubts: why an attention of it may be kept; empty: each is to be rewritten.
        features: what it was built from, for statistics.
        gradients: whether gradients are to be compared too.
        dynamic: whether it is to be captured with symbolic sizes.
        again: arguments of other lengths, for which the source is the same, if there are any.
    """

    seed: int
    source: str
    inputs: tuple[Tensor, ...]
    dtype: torch.dtype
    attentions: int
    doubts: frozenset[str]
    features: frozenset[str]
    gradients: bool
    dynamic: bool
    again: tuple[Tensor, ...] = ()

    def function(self) -> Callable[..., Any]:
        """The program, newly defined."""
        return _define(self.source, f"<program {self.seed}>")

    def wide(self) -> Callable[..., Any]:
        """The program with every cast going to float64, for inputs in float64."""
        source = self.source
        for pattern, replacement in _WIDE:
            source = pattern.sub(replacement, source)
        return _define(source, f"<program {self.seed} in float64>")

    def __str__(self) -> str:
        inputs = ", ".join(
            f"{str(given.dtype).removeprefix('torch.')}{tuple(given.shape)}"
            + ("" if given.is_contiguous() else f" strides {given.stride()}")
            for given in self.inputs
        )
        return (
            f"program({self.seed}), dynamic={self.dynamic}, gradients={self.gradients}\n"
            f"inputs: {inputs}\n{self.source}"
        )


def _define(source: str, name: str) -> Callable[..., Any]:
    namespace: dict[str, Any] = {"torch": torch, "F": F, "math": math}
    exec(compile(source, name, "exec"), namespace)
    function: Callable[..., Any] = namespace["program"]
    return function


@dataclass(slots=True)
class Sizes:
    """What one attention is made of; ``heads`` are those of the query."""

    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


class Draft:
    """The source so far, and what the parts of the generator agree on.

    Attributes:
        rng: every choice is drawn from it.
        sizes: of the attention that is being written.
        dtype: of floating-point inputs.
        gradients: no in-place change may then hit what autograd needs, nor an input.
        longer: lengths are to be others than they would be, in the same order.
        frame: letters of the scores' dimensions, in order; "" before there are scores.
        score_dtype: of the scores, as far as fill values depend on it.
        hidden: an expression that is True at all hidden keys, when there is one.
        sinks: "first" or "last" when the scores have one more column there.
        output: letters of the output's dimensions.
        restored: the output is to be cast back to the dtype of the query.
        origins: what the source calls the sizes b, q and k.
    """

    def __init__(self, seed: int, longer: bool = False) -> None:
        self.longer = longer
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = Sizes(1, 1, 1, 1, 1, 8, 8)
        self.dtype = torch.float32
        self.gradients = False
        self.autocast = False
        self.symbolic = False
        self.lines: list[str] = []
        self.inputs: dict[str, Tensor] = {}
        self.features: set[str] = set()
        self.doubts: set[str] = set()
        self.begin_attention()

    def begin_attention(self) -> None:
        """Forget what belongs to one attention only."""
        self.frame = ""
        self.query_letters = self.key_letters = self.value_letters = ""
        self.score_dtype = self.dtype
        self.hidden: str | None = None
        self.sinks = ""
        self.output = ""
        self.restored = False
        self.origins: dict[str, str] = {}

    # --- choices ---

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return self.rng.choice(options)

    def weighted(self, options: Mapping[T, float]) -> T:
        return self.rng.choices(list(options), list(options.values()))[0]

    def note(self, feature: str) -> None:
        """Record what the program is built from."""
        self.features.add(feature)

    def doubt(self, reason: str) -> None:
        """Record why the attention may rightly be kept."""
        self.doubts.add(reason)
        self.features.add(reason)

    # --- source ---

    def emit(self, *lines: str) -> None:
        self.lines.extend(lines)

    def size(self, letter: str) -> int:
        """The number behind a letter."""
        sizes = self.sizes
        grouped = "g" in self.frame or "g" in self.query_letters
        return {
            "b": sizes.batch,
            "h": sizes.kv_heads if grouped else sizes.heads,
            "g": sizes.group,
            "n": sizes.batch * sizes.heads,
            "q": sizes.query_length,
            "k": sizes.key_length,
            "d": sizes.head_dim,
            "e": sizes.value_head_dim,
            "1": 1,
        }[letter]

    def text(self, letter: str) -> str:
        """How the source says this size: a number, or an expression of a shape."""
        if self.symbolic:
            if letter == "n" and "b" in self.origins:
                return f"{self.origins['b']} * {self.sizes.heads}"
            if letter in self.origins:
                return self.origins[letter]
        return str(self.size(letter))

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.size(letter) for letter in letters)

    # --- inputs ---

    def add_input(self, stem: str, tensor: Tensor) -> str:
        name = f"{stem}{sum(given.startswith(stem) for given in self.inputs) or ''}"
        self.inputs[name] = tensor
        return name

    def floats(self, stem: str, shape: Sequence[int], letters: str = "") -> str:
        """A new floating-point input; ``letters`` say which dims are sizes to be read off it."""
        tensor = torch.randn(tuple(shape), generator=self.generator).to(self.dtype)
        return self._sized(self.add_input(stem, tensor), letters)

    def _sized(self, name: str, letters: str) -> str:
        for at, letter in enumerate(letters):
            if letter in "bqk" and letter not in self.origins:
                self.origins[letter] = f"{name}.shape[{at}]"
        return name

    def bools(self, stem: str, shape: Sequence[int], share: float) -> str:
        """A new bool input, True at about this share."""
        tensor = torch.rand(tuple(shape), generator=self.generator) < share
        return self.add_input(stem, tensor)


def aligned(expression: str, letters: str, frame: str, leading: bool = False) -> str:
    """An expression over some letters of a frame, so that it broadcasts against the frame."""
    order = [letter for letter in frame if letter in letters]
    if order != list(letters):
        dims = ", ".join(str(letters.index(letter)) for letter in order)
        expression = f"{expression}.permute({dims})"
    start = 0 if leading else frame.index(order[0])
    index = [":" if letter in letters else "None" for letter in frame[start:]]
    while index and index[-1] == ":":
        index.pop()
    return f"{expression}[{', '.join(index)}]" if "None" in index else expression
