"""What is checked on a GPU: which kernels, and on which attention.

Lengths, masks, layouts and limits are those with which the tests execute the kernels on a CPU, so
that a device has to pass all that the CPU does, and more: see ``large``.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.spec import HEAD_DIMS, RotaryKeySpec, RotaryQuerySpec
from sage_compiler.kernels.cuda.variants import (
    Variant,
    further_variants,
    variant,
    variants,
)
from sage_compiler.precision import RECIPES, Accumulator, Format, Recipe
from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass, Semantics
from tests.compiler.kernels.dense import Call, laid_out, random_mask

MASKS: Final = (MaskClass.NONE, MaskClass.CAUSAL, MaskClass.CAUSAL_BOTTOM_RIGHT)
# Lq, Lk: one token, one short of a tile, whole tiles, one more, several with a tail.
LENGTHS: Final = ((1, 1), (1, 190), (63, 64), (128, 128), (129, 65), (200, 333), (300, 130))
GROUPS: Final = ((1, 1), (2, 4))  # heads of K and V, heads of Q for each
SOFTCAP: Final = 20.0
WINDOW: Final = 70  # keys before the diagonal: some tiles, and none of the special values
# What a mask becomes for kernels of windows: its class and the keys after the diagonal.
WINDOWS: Final[Mapping[MaskClass, tuple[MaskClass, int]]] = {
    MaskClass.NONE: (MaskClass.WINDOW, UNBOUNDED),
    MaskClass.CAUSAL: (MaskClass.WINDOW, 0),
    MaskClass.CAUSAL_BOTTOM_RIGHT: (MaskClass.WINDOW_BOTTOM_RIGHT, 0),
}
LAYOUTS: Final = ("contiguous", "tokens_first", "expanded", "every_other")
# Enough blocks to fill a large GPU several times, all heads apart, tails everywhere.
LARGE: Final = ((1999, 1999), (1531, 2111), (4099, 1000))

# How far a kernel may be from the reference, which computes the same: the relative L2 distance of
# the outputs, and the absolute one of the LSE. Executed on a CPU, INT8 is within .00075, INT4
# within .0035, and .012 in outputs of few elements. The 13 bits that Ada keeps of a sum of FP8
# products, which a CPU does not model, add .0003 to that.
#
# In FP8 and INT4 that leaves out the worst row of a hundred: sums in another order move a weight
# across a tie, which is 6 % of it in E4M3, and a row of few keys has no others to hide that. Such
# a row has to be within the recipe's tolerance of float64 all the same, as every row has.
DISTANCE: Final = {"int8": 1.5e-3, "int4": 6e-3}
DISTANCE_OF_FEW: Final = {"int8": 1.5e-3, "int4": 3e-2}
FEW_ELEMENTS: Final = 4096
LSE_DISTANCE: Final = 1e-3
SPARED_ROWS: Final = 0.01


def dtype_name(dtype: torch.dtype) -> str:
    """As results and the kernels' specs have it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Subject:
    """One kind of call, and the kernels that serve it."""

    kernels: Variant

    @property
    def recipe(self) -> str:
        """A key of ``RECIPES``."""
        return f"{self.kernels.attend.qk}_{self.kernels.attend.pv}"

    @property
    def accumulator(self) -> Accumulator:
        """Of P @ V."""
        return self.kernels.attend.accumulator

    @property
    def head_dims(self) -> tuple[int, int]:
        """Of Q and K, and of V."""
        return self.kernels.attend.head_dim, self.kernels.attend.value_head_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of Q, K, V and the output."""
        found: torch.dtype = getattr(torch, self.kernels.attend.dtype)
        return found

    @property
    def is_plain(self) -> bool:
        """Whether it has neither a window, nor an explicit mask, nor a softcap."""
        spec = self.kernels.attend
        return not (spec.window or spec.masked or spec.softcap)

    @property
    def kernel(self) -> str:
        """The name in results: the recipe, and what is not as usual."""
        spec, name = self.kernels.attend, self.recipe
        if self.accumulator is not Accumulator.FP32:
            name += f"_acc{self.accumulator.value[2:]}"
        name += "_window" * spec.window + "_masked" * spec.masked + "_softcap" * spec.softcap
        return name + "_packed" * spec.packed_heads + "_split" * spec.split

    @property
    def label(self) -> str:
        """In a few words."""
        dims = "/".join(map(str, dict.fromkeys(self.head_dims)))
        return f"{self.kernel} D={dims} {dtype_name(self.dtype)}"

    def semantics(self, like: Semantics) -> Semantics:
        """The semantics, with the window and the softcap that these kernels are for."""
        spec = self.kernels.attend
        if spec.window and like.window_left == UNBOUNDED:
            mask_class, right = WINDOWS.get(like.mask_class, (like.mask_class, like.window_right))
            like = dataclasses.replace(
                like, mask_class=mask_class, window_left=WINDOW, window_right=right
            )
        return dataclasses.replace(like, softcap=SOFTCAP if spec.softcap else None)

    def reference(self) -> Recipe:
        """What ``reference.attention`` computes for it."""
        return dataclasses.replace(RECIPES[self.recipe], accumulator=self.accumulator)

    def distance(self, elements: int) -> float:
        """How far an output of so many elements may be from the reference."""
        limits = DISTANCE if elements > FEW_ELEMENTS else DISTANCE_OF_FEW
        return limits[RECIPES[self.recipe].qk.value]

    def spared(self, rows: int) -> int:
        """How many of the rows of an output may be further away."""
        recipe = RECIPES[self.recipe]
        is_coarse = recipe.qk is Format.INT4 or recipe.pv is Format.FP8
        return max(1, round(SPARED_ROWS * rows)) if is_coarse else 0


def subjects(arch: str) -> tuple[Subject, ...]:
    """What the kernel pack of an architecture serves."""
    return tuple(map(Subject, variants(arch)))


def further_subjects(arch: str) -> tuple[Subject, ...]:
    """What is compiled on first use, one of each kind."""
    return tuple(Subject(each) for each in further_variants(arch) if is_checked(each))


def is_checked(kernels: Variant) -> bool:
    """Whether they take calls as they are made here: no packed batch, no rotary embedding."""
    rotates = isinstance(kernels.query, RotaryQuerySpec) or isinstance(kernels.key, RotaryKeySpec)
    return not (kernels.attend.varlen or rotates)


def timed_subjects(arch: str) -> tuple[Subject, ...]:
    """What is timed in float16 besides, and so has to be checked: masks, head_dim 256."""
    found = []
    for recipe in ARCHS[arch].recipes:
        found.append(variant(arch, "float16", 128, recipe, masked=True))
        found.append(variant(arch, "float16", 256, recipe))
    return tuple(map(Subject, found))


@dataclass(frozen=True, slots=True)
class Case:
    """One attention to check.

    Attributes:
        call: on the CPU, dense.
        layouts: of Q, K and V: what ``laid_out`` takes.
    """

    label: str
    call: Call
    layouts: tuple[str, str, str] = ("contiguous",) * 3

    def on(self, place: torch.device) -> Call:
        """The call on a device, its tensors laid out there."""
        tensors = (self.call.query, self.call.key, self.call.value)
        query, key, value = (
            laid_out(x.to(place), layout) for x, layout in zip(tensors, self.layouts, strict=True)
        )
        sinks, mask = (
            None if x is None else x.to(place) for x in (self.call.sinks, self.call.attn_mask)
        )
        return dataclasses.replace(
            self.call, query=query, key=key, value=value, sinks=sinks, attn_mask=mask
        )


def make_call(
    subject: Subject,
    query_length: int,
    key_length: int,
    *,
    seed: int,
    batch: int = 1,
    kv_heads: int = 1,
    group: int = 1,
    semantics: Semantics | None = None,
    head_dim: int | None = None,
    sinks: bool = False,
) -> Call:
    """Gaussian Q, K, V and sinks, with a channel bias on K as models have it.

    Args:
        semantics: with the window and the softcap that the subject is for.
        head_dim: less than the subject's, which the kernels fill up; V has the subject's.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    (dim, value_dim), dtype = subject.head_dims, subject.dtype
    width = head_dim or dim
    query = normal(batch, kv_heads * group, query_length, width)
    key = normal(batch, kv_heads, key_length, width) + 2 * normal(1, kv_heads, 1, width)
    value = normal(batch, kv_heads, key_length, value_dim)
    return Call(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        subject.semantics(semantics or Semantics()),
        attn_mask=_mask(subject, query, key_length, seed),
        sinks=normal(kv_heads * group) if sinks else None,
    )


def _mask(subject: Subject, query: Tensor, key_length: int, seed: int) -> Tensor | None:
    """A bool or float mask of any broadcast, where the subject has one."""
    if not subject.kernels.attend.masked:
        return None
    generator = torch.Generator().manual_seed(seed)
    return random_mask(random.Random(seed), generator, (*query.shape[:3], key_length))


def ragged(
    subject: Subject, lengths: tuple[tuple[int, int], ...], seed: int, *, batch: int = 1
) -> Iterator[Case]:
    """All masks and groups at these lengths, each with inputs of its own."""
    cells = itertools.product(lengths, MASKS, GROUPS)
    for number, ((query_length, key_length), mask_class, (kv_heads, group)) in enumerate(cells):
        call = make_call(
            subject,
            query_length,
            key_length,
            seed=seed + number,
            batch=batch,
            kv_heads=kv_heads,
            group=group,
            semantics=Semantics(mask_class),
        )
        heads = f"H={kv_heads * group}/{kv_heads}"
        mask_class = call.semantics.mask_class
        yield Case(f"B={batch} {heads} L={query_length}x{key_length} {mask_class}", call)


def arbitrary(subject: Subject, seed: int) -> Case:
    """Any call that the kernels take: layouts, dims, masks, scales, sinks, dead rows."""
    rng = random.Random(seed)
    head_dim = subject.head_dims[0]
    smaller = max((dim for dim in HEAD_DIMS if dim < head_dim), default=0)
    call = make_call(
        subject,
        rng.randint(1, 280),
        rng.randint(1, 280),
        seed=seed,
        batch=rng.randint(1, 2),
        kv_heads=rng.randint(1, 2),
        group=rng.choice((1, 2, 3)),
        semantics=_semantics(rng, bounded=subject.kernels.attend.window),
        head_dim=rng.choice((head_dim, head_dim, rng.randint(smaller + 1, head_dim))),
        sinks=rng.random() < 0.3,
    )
    layouts = (rng.choice(LAYOUTS), rng.choice(LAYOUTS), rng.choice(LAYOUTS))
    shapes = f"{tuple(call.query.shape)} on {tuple(call.key.shape)}"
    label = f"seed {seed}: {shapes}, {', '.join(layouts)}, {call.semantics.mask_class}"
    return Case(label, call, layouts)


def _semantics(rng: random.Random, *, bounded: bool) -> Semantics:
    """Any; only with ``bounded`` may a window end to the left, which takes other kernels."""
    mask_class = rng.choice(tuple(MaskClass))
    is_window = mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)
    return Semantics(
        mask_class,
        window_left=rng.choice((0, 5, 70)) if is_window and bounded else UNBOUNDED,
        window_right=rng.choice((UNBOUNDED, 0, 5, 70)) if is_window else UNBOUNDED,
        scale=rng.choice((None, None, 0.05, -0.1)),
        dead_rows=rng.choice(tuple(DeadRows)),
    )
