"""One attention and a GPU, as a command line describes them: neither need be here."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sage_compiler.errors import UsageError
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.spec import DTYPES
from sage_compiler.kernels.kernel import Problem
from sage_compiler.precision import AUTO, EXACT, PRECISIONS
from sage_compiler.semantics import UNBOUNDED, MaskClass, RotaryPairs, Semantics
from sage_compiler.validate import check_arguments

_SHAPE: Final = re.compile(r"\d+(x\d+){3}")
_ARCH: Final = re.compile(r"sm_(\d+)(\d)[af]?")
_BAND: Final = re.compile(
    r"(?P<class>causal|causal_bottom_right|window|window_bottom_right)"
    r"(:(?P<left>-?\d+),(?P<right>-?\d+))?"
)
_EXPLICIT: Final = ("bool", "float")
_MASKS: Final = (
    "bool, float, causal, causal_bottom_right, window:LEFT,RIGHT or "
    f"window_bottom_right:LEFT,RIGHT ({UNBOUNDED}: no limit)"
)
_MOST_ELEMENTS: Final = 1 << 48  # of one tensor
_SOFTCAP: Final = 30.0  # of those that do something, all get the same kernels


@dataclass(frozen=True, slots=True)
class Question:
    """One attention, with tensors on the meta device, and the GPU that it is asked of.

    Attributes:
        sequences: how many are packed along the lengths; None: it is no packed batch.
        rotary: which channels make a pair where Q and K are rotated first; None: they are not.
        cache: whether K and V are the tokens of a ``PackedKV``, the queries' the last of them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    sinks: Tensor | None
    semantics: Semantics
    recipe: str
    capability: tuple[int, int]
    sequences: int | None = None
    rotary: RotaryPairs | None = None
    cache: bool = False

    @property
    def problem(self) -> Problem:
        """As the operator asks."""
        return Problem.of(
            self.query, self.key, self.value, self.semantics, self.attn_mask, self.capability
        )

    @property
    def offsets(self) -> Tensor | None:
        """Cumulative lengths of the sequences, as those of any are."""
        if self.sequences is None:
            return None
        return torch.empty(self.sequences + 1, dtype=torch.int32, device="meta")

    def __str__(self) -> str:
        named = (("Q", self.query), ("K", self.key), ("V", self.value))
        shapes = (f"{name} {tuple(tensor.shape)}" for name, tensor in named)
        semantics, mask_class = self.semantics, str(self.semantics.mask_class)
        if semantics.mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT):
            mask_class += f":{semantics.window_left},{semantics.window_right}"
        extras = [] if semantics.mask_class is MaskClass.NONE else [mask_class]
        if self.attn_mask is not None:
            extras.append(f"a mask of {dtype_name(self.attn_mask.dtype)}")
        extras += ["softcap"] * (semantics.softcap is not None)
        extras += ["sinks"] * (self.sinks is not None)
        if self.sequences is not None:
            extras.append(f"{self.sequences} packed sequences")
        if self.rotary is not None:
            extras.append(f"rotary embedding, {self.rotary}")
        extras += ["K and V in a cache"] * self.cache
        return ", ".join((dtype_name(self.query.dtype), *shapes, *extras))


def add_question(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``parse`` reads."""
    parser.add_argument("shape", metavar="SHAPE", help="of the query: BATCHxHEADSxLENGTHxHEAD_DIM")
    parser.add_argument(
        "--arch", metavar="NAME", help=f"{', '.join(ARCHS)}, or another; default: the GPU here"
    )
    parser.add_argument("--kv", metavar="SHAPE", help="of the key; default: that of the query")
    parser.add_argument(
        "--value-dim", type=int, metavar="N", help="head_dim of the value; default: the key's"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bfloat16", help="default: bfloat16"
    )
    parser.add_argument(
        "--recipe",
        choices=PRECISIONS,
        default=AUTO,
        metavar="NAME",
        help=f"{', '.join(PRECISIONS)}; default: {AUTO}",
    )
    parser.add_argument(
        "--mask",
        action="append",
        default=[],
        metavar="MASK",
        help=f"{_MASKS}; a band and an explicit mask go together; default: none",
    )
    parser.add_argument("--softcap", action="store_true", help="the scores have a softcap")
    parser.add_argument("--sinks", action="store_true", help="heads have sinks")
    parser.add_argument(
        "--sequences", type=int, metavar="N", help="so many are packed along the lengths"
    )
    parser.add_argument(
        "--rotary",
        choices=tuple(map(str, RotaryPairs)),
        help="Q and K are rotated first, by pairs of channels",
    )
    parser.add_argument(
        "--cache", action="store_true", help="K and V are the tokens of a sage_compiler.PackedKV"
    )


def parse(arguments: argparse.Namespace) -> Question:
    """The question of a command line.

    Raises:
        UsageError: what names no shape, GPU or mask, or goes with no cache.
        InvalidAttentionError: shapes that do not go together.
    """
    shape = _shape(arguments.shape)
    key_shape = shape if arguments.kv is None else _shape(arguments.kv)
    value_dim = key_shape[3] if arguments.value_dim is None else arguments.value_dim
    if value_dim < 1:
        raise UsageError(f"--value-dim {value_dim}; it must be at least 1")
    if arguments.sequences is not None and arguments.sequences < 1:
        raise UsageError(f"--sequences {arguments.sequences}; it must be at least 1")
    if arguments.cache:
        _check_cache(arguments, shape, key_shape)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    semantics, mask_dtype = _masks(arguments.mask, dtype, _SOFTCAP if arguments.softcap else None)

    def tensor(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    question = Question(
        query=tensor(*shape),
        key=tensor(*key_shape),
        value=tensor(*key_shape[:3], value_dim),
        attn_mask=None
        if mask_dtype is None
        else tensor(shape[0], 1, shape[2], key_shape[2], dtype=mask_dtype),
        sinks=tensor(shape[1]) if arguments.sinks else None,
        semantics=semantics,
        recipe=arguments.recipe,
        capability=_capability(arguments.arch),
        sequences=arguments.sequences,
        rotary=None if arguments.rotary is None else RotaryPairs(arguments.rotary),
        cache=arguments.cache,
    )
    check_arguments(
        question.query,
        question.key,
        question.value,
        question.attn_mask,
        question.sinks,
        question.offsets,
        question.offsets,
    )
    return question


def dtype_name(dtype: torch.dtype) -> str:
    """As torch has it in its namespace."""
    return str(dtype).removeprefix("torch.")


def _check_cache(
    arguments: argparse.Namespace, shape: Sequence[int], key_shape: Sequence[int]
) -> None:
    """Raises UsageError for what ``PackedKV.attend`` does not take."""
    if arguments.sequences is not None or arguments.rotary is not None:
        other = "--sequences" if arguments.rotary is None else "--rotary"
        raise UsageError(f"--cache and {other}; a cache has tokens of one length, rotated before")
    if arguments.recipe == EXACT:
        raise UsageError(f"--cache and --recipe {EXACT}; a cache is quantized")
    if key_shape[2] < shape[2]:
        raise UsageError(
            f"--cache of {key_shape[2]} tokens for {shape[2]} queries; they are the last ones of it"
        )
    if any(
        text.startswith(("causal", "window")) and "bottom" not in text for text in arguments.mask
    ):
        raise UsageError(
            f"--cache and --mask {' --mask '.join(arguments.mask)}; the diagonal of a cache ends "
            "at its last token: causal_bottom_right, window_bottom_right:LEFT,RIGHT"
        )


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split("x"))) if _SHAPE.fullmatch(text) else ()
    if not sizes or min(sizes) < 1:
        raise UsageError(
            f"shape {text!r}; it must be BATCHxHEADSxLENGTHxHEAD_DIM, each at least 1, such as "
            "1x32x4096x128"
        )
    if math.prod(sizes) >= _MOST_ELEMENTS:
        raise UsageError(f"shape {text!r} has {math.prod(sizes)} elements; no GPU holds them")
    return sizes


def _capability(name: str | None) -> tuple[int, int]:
    if name is None:
        if not torch.cuda.is_available():
            known = ", ".join(ARCHS)
            raise UsageError(f"--arch is missing, and there is no GPU here; known: {known}")
        return torch.cuda.get_device_capability()
    found = _ARCH.fullmatch(name)
    if found is None:
        raise UsageError(f"unknown architecture {name!r}; known: {', '.join(ARCHS)}")
    return int(found[1]), int(found[2])


def _masks(
    texts: Sequence[str], dtype: torch.dtype, softcap: float | None
) -> tuple[Semantics, torch.dtype | None]:
    """The band, and the dtype of the explicit mask.

    Raises:
        UsageError: a text that is no mask, or two bands or explicit masks.
    """
    explicit = [text for text in texts if text in _EXPLICIT]
    bands = [text for text in texts if text not in _EXPLICIT]
    if len(explicit) > 1 or len(bands) > 1:
        raise UsageError(
            f"--mask {' --mask '.join(texts)}; at most one band and one explicit mask go together"
        )
    mask_dtype = (torch.bool if explicit[0] == "bool" else dtype) if explicit else None
    if not bands:
        return Semantics(softcap=softcap), mask_dtype
    found = _BAND.fullmatch(bands[0])
    windowed = found is not None and found["class"].startswith("window")
    if found is None or windowed != (found["left"] is not None):
        raise UsageError(f"--mask {bands[0]}; it must be {_MASKS}")
    semantics = Semantics(
        mask_class=MaskClass(found["class"]),
        window_left=int(found["left"]) if windowed else UNBOUNDED,
        window_right=int(found["right"]) if windowed else UNBOUNDED,
        softcap=softcap,
    )
    return semantics, mask_dtype
