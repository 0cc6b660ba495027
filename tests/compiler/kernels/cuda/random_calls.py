"""Random calls of the operator, served by the CUDA kernels as they run on the CPU.

From the operator on, a call goes the way that it has on a GPU: the operator's checks, the
registry's choice by ``dispatch.decide``, ``kernel.run``, the look through its mask, the launches.
Left out is what asks torch for a GPU: the kernels stand in the registry for device "cpu", and their
target is the look-alike of the driver, not the device and stream of the tensors.

A *run* is a number that chooses a few kinds of kernels, so that few are compiled; a call of it has
a number too, which chooses all else. Both repeat a call:

    python -m tests.compiler.kernels.cuda.random_calls RUN NUMBER
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from math import inf, nan
from typing import Any, ClassVar, Final
from unittest import mock

import torch
from torch import Tensor

from sage_compiler import ops as ops  # registers sage::attention
from sage_compiler.kernels import reference, registry
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.spec import DTYPES, HEAD_DIMS
from sage_compiler.kernels.kernel import OPEN, Kernel
from sage_compiler.precision import TILE_MMA
from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass, Semantics
from tests.compiler.kernels.cuda import emulation
from tests.compiler.kernels.cuda.emulation import (
    GARBAGE,
    RECIPE_VARIANTS,
    WGMMA,
    Way,
    named,
    the_host,
)
from tests.compiler.kernels.dense import Call, class_mask, dense, random_mask
from tests.tolerances import check, check_lse

TEMPLATES: Final = 32  # kinds of kernels of a run
CALLS: Final = 10  # of each kind
WAYS: Final = (*(Way(recipe, accumulator=sums) for recipe, sums in RECIPE_VARIANTS), WGMMA)

_WINDOWS: Final = (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)
# Around the edges of tiles of 64 keys and 128 queries, of warps, and of a thread's rows.
_EDGES: Final = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 192, 193, 257)

# How far a kernel may be from the reference, which computes the same: the relative L2 distance of
# the outputs, many elements and few, and the absolute one of the LSE. A rounding at a tie goes the
# other way now and then, and shows in rows of few keys. Worst of 3200 calls: INT8 .0018 (with a
# 16-bit accumulator; else .0009) and .0015, INT4 .0065 and .021.
DISTANCE: Final = {"int8": 2.5e-3, "int4": 1e-2}
DISTANCE_OF_FEW: Final = {"int8": 3e-3, "int4": 3e-2}
FEW_ELEMENTS: Final = 4096
LSE_DISTANCE: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Template:
    """What makes a call take one kernel and not another.

    Attributes:
        way: whose kernels.
        head_dim, value_dim: of ``HEAD_DIMS``; a call has these or what is filled up to them.
    """

    way: Way
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    window: bool
    masked: bool
    softcap: bool


@dataclass(frozen=True, slots=True)
class RandomCall:
    """One call of the operator, and what is known of it.

    Attributes:
        call: as it is made; what no query sees may be NaN.
        clean: the same with finite tokens, contiguous.
        want_lse: which overload is called.
    """

    run: int
    number: int
    template: Template
    call: Call
    clean: Call
    want_lse: bool
    label: str

    def __str__(self) -> str:
        return (
            f"{self.label}\n"
            f"again: python -m tests.compiler.kernels.cuda.random_calls {self.run} {self.number}"
        )


@functools.cache
def templates(run: int) -> tuple[Template, ...]:
    """The kinds of a run. Each recipe, dtype and head_dim has its share of them."""
    rng = random.Random(run)

    def share(*values: Any) -> list[Any]:
        """Each value as often as the others, in any order."""
        dealt = [values[i % len(values)] for i in range(TEMPLATES)]
        rng.shuffle(dealt)
        return dealt

    columns = zip(
        share(*WAYS),
        share(*(getattr(torch, name) for name in DTYPES)),
        share(*HEAD_DIMS, 64, 128),
        share(None, None, None, *HEAD_DIMS),  # None: that of the query
        share(False, False, True),
        share(False, True),
        share(False, False, True),
        strict=True,
    )
    return tuple(
        Template(way, dtype, head_dim, value_dim or head_dim, window, masked, softcap)
        for way, dtype, head_dim, value_dim, window, masked, softcap in columns
    )


# --- a call ---------------------------------------------------------------------------------------


def random_call(run: int, number: int) -> RandomCall:
    """Call ``number`` of a run, from 0 to ``TEMPLATES * CALLS - 1``."""
    template = templates(run)[number % TEMPLATES]
    rng = random.Random(run << 32 | number)
    generator = torch.Generator().manual_seed(rng.getrandbits(48))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, kv_heads, group = rng.randint(1, 3), rng.randint(1, 3), rng.choice((1, 1, 2, 3, 5, 7))
    query_length, key_length = _lengths(rng)
    head_dim, value_dim = (_dim(rng, dim) for dim in (template.head_dim, template.value_dim))
    heads = kv_heads * group
    semantics = _semantics(rng, template, head_dim)
    bias = rng.choice((0.0, 1.0, 2.0)) * normal(batch, kv_heads, 1, head_dim)
    full = (batch, heads, query_length, key_length)
    tensors = (
        normal(batch, heads, query_length, head_dim),
        normal(batch, kv_heads, key_length, head_dim) + bias,
        normal(batch, kv_heads, key_length, value_dim),
    )
    # Stored with other strides, a tensor may become another one: that is then the clean one.
    layouts = [rng.choice(tuple(LAYOUTS)) for _ in tensors]
    stored = [
        LAYOUTS[layout](x.to(template.dtype)) for x, layout in zip(tensors, layouts, strict=True)
    ]
    clean = Call(
        *(x.clone(memory_format=torch.contiguous_format) for x in stored),
        semantics,
        _mask(rng, generator, full, template.dtype) if template.masked else None,
        _sinks(rng, normal(heads)) if rng.random() < 0.3 else None,
    )
    poisoned = rng.random() < 0.3
    if poisoned:
        _poison(clean, stored, rng.choice((nan, inf)))
    mask_label = "none"
    if clean.attn_mask is not None:
        mask = clean.attn_mask
        mask_label = f"{mask.dtype} {tuple(mask.shape)} strides {mask.stride()}"
    return RandomCall(
        run=run,
        number=number,
        template=template,
        call=replace(clean, query=stored[0], key=stored[1], value=stored[2]),
        clean=clean,
        want_lse=rng.random() < 0.7,
        label=(
            f"{template.way}, {template.dtype}, "
            f"query {tuple(stored[0].shape)} {layouts[0]}, key {tuple(stored[1].shape)} "
            f"{layouts[1]}, value {tuple(stored[2].shape)} {layouts[2]}, {semantics}, mask "
            f"{mask_label}, sinks {clean.sinks}, poisoned {poisoned}"
        ),
    )


def _lengths(rng: random.Random) -> tuple[int, int]:
    def length() -> int:
        return rng.choice(_EDGES) if rng.random() < 0.5 else rng.randint(1, 200)

    few_to_many = rng.randint(1, 16), rng.randint(500, 800)  # of which some are split
    return rng.choice(((length(), length()), (n := length(), n), (1, length()), few_to_many))


def _dim(rng: random.Random, largest: int) -> int:
    """That dim, or one that is filled up to it."""
    smaller = max((dim for dim in HEAD_DIMS if dim < largest), default=0)
    return rng.choice((largest, rng.randint(smaller + 1, largest)))


def _semantics(rng: random.Random, template: Template, head_dim: int) -> Semantics:
    """Any; a window with an end to the left is what takes another kernel."""
    mask_class = rng.choice(_WINDOWS if template.window else tuple(MaskClass))
    right = UNBOUNDED
    if mask_class in _WINDOWS:
        right = rng.choice((UNBOUNDED, 0, 5, 70, 1000))
    usual = head_dim**-0.5
    return Semantics(
        mask_class,
        window_left=rng.choice((0, 3, 70, 1000)) if template.window else UNBOUNDED,
        window_right=right,
        scale=rng.choice((None, None, None, usual / 2, -usual / 2, 0.0)),
        softcap=rng.choice((1e-3, 5.0, 20.0, 1e9)) if template.softcap else None,
        dead_rows=rng.choice(tuple(DeadRows)),
    )


def _sinks(rng: random.Random, sinks: Tensor) -> Tensor:
    """Of ordinary size, but one of them in half of all calls."""
    if rng.random() < 0.5:
        sinks[rng.randrange(len(sinks))] = rng.choice((-inf, 30.0, -80.0))
    return sinks


def _mask(
    rng: random.Random,
    generator: torch.Generator,
    full: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Of any broadcast: scattered keys, padding or whole tiles; bool, or float of some dtype."""
    kind = rng.choice(("scattered", "scattered", "padding", "tiles"))
    if kind == "scattered":
        mask = random_mask(rng, generator, full)
    else:
        shown = _padding(generator, full) if kind == "padding" else _tiles(rng, generator, full)
        low = rng.choice((-inf, -1e4, torch.finfo(torch.float32).min))
        mask = rng.choice((shown, torch.zeros(shown.shape).masked_fill(~shown, low)))
    if mask.is_floating_point() and rng.random() < 0.5:
        mask = mask.clamp(min=torch.finfo(dtype).min).to(dtype)
    if mask.dim() >= 2 and rng.random() < 0.3:  # queries innermost
        mask = mask.mT.contiguous().mT
    return mask


def _padding(generator: torch.Generator, full: tuple[int, int, int, int]) -> Tensor:
    """Each batch has keys up to some, and may have none: (B, 1, 1, Lk)."""
    batch, _, _, key_length = full
    lengths = torch.randint(0, key_length + 1, (batch, 1, 1, 1), generator=generator)
    return torch.arange(key_length) < lengths


def _tiles(
    rng: random.Random, generator: torch.Generator, full: tuple[int, int, int, int]
) -> Tensor:
    """Blocks of a tile's size, shown or hidden, with some keys flipped: (1, H|1, Lq, Lk)."""
    _, heads, query_length, key_length = full
    counts = (-(-query_length // 128), -(-key_length // 64))
    blocks = torch.rand(rng.choice((1, heads)), *counts, generator=generator) < 0.5
    shown = blocks.repeat_interleave(128, 1).repeat_interleave(64, 2)
    shown = shown[:, :query_length, :key_length]
    flipped = torch.rand(shown.shape, generator=generator) < rng.choice((0.0, 0.01))
    return (shown ^ flipped).unsqueeze(0)


def _poison(clean: Call, stored: Sequence[Tensor], what: float) -> None:
    """Put what is not finite into keys and values that no query sees, where each has its memory."""
    query, key, value = stored
    batch, heads, query_length = query.shape[:3]
    visible = class_mask(clean.semantics, query_length, key.shape[2])
    visible = visible.expand(batch, heads, -1, -1)
    if clean.attn_mask is not None:
        mask = clean.attn_mask
        visible = visible & (mask if mask.dtype == torch.bool else mask != -inf)
    seen = torch.unflatten(visible.any(2), 1, (key.shape[1], -1)).any(2)
    for x in (key, value):
        if 0 not in [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]:
            x.masked_fill_(~seen.unsqueeze(-1), what)


# --- layouts --------------------------------------------------------------------------------------


def _cut_out(x: Tensor) -> Tensor:
    """Of a longer cache, from its third token on, with heads and channels to spare."""
    batch, heads, length, dim = x.shape
    cache = x.new_full((batch, heads + 1, length + 5, dim + 3), nan)
    return cache[:, 1:, 2 : length + 2, :dim].copy_(x)


def _one_off(x: Tensor) -> Tensor:
    """From the second element of its memory on: aligned to nothing but its dtype."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def _of_a_projection(x: Tensor) -> Tensor:
    """The second of three that a projection gave, (B, L, 3, H, D) in memory."""
    memory = x.transpose(1, 2).unsqueeze(2).repeat(1, 1, 3, 1, 1)
    return memory[:, :, 1].transpose(1, 2)


LAYOUTS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "contiguous": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.mT.contiguous().mT,
    "every other channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "one batch": lambda x: x[:1].expand_as(x),
    "one head": lambda x: x[:, :1].expand_as(x),
    "cut out": _cut_out,
    "one off": _one_off,
    "of a projection": _of_a_projection,
}


# --- the operator ---------------------------------------------------------------------------------


class _Registered(kernel.Call):
    """A call that may touch nothing but its tensors, and whose results are NaN before it.

    Attributes:
        last: the one that was made last.
    """

    last: ClassVar[_Registered | None] = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        type(self).last = self
        results = {id(x) for x in (self.output, self.lse)}
        for tensor in _tensors(vars(self).values()):
            the_host().allow(tensor, writable=id(tensor) in results)
        for result in (self.output, self.lse):
            if result is not None:
                result.fill_(nan)


def _tensors(values: object) -> Iterator[Tensor]:
    """Those among attributes, and in the dataclasses among them."""
    for value in values:  # type: ignore[attr-defined]
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(getattr(value, field.name) for field in fields(value))


def _scratch(sizes: Sequence[int], device: torch.device) -> tuple[list[int], object]:
    """Garbage, each piece a storage of its own."""
    pieces = [torch.full((size,), GARBAGE, dtype=torch.uint8, device=device) for size in sizes]
    for piece in pieces:
        the_host().allow(piece, writable=True)
    return [piece.data_ptr() for piece in pieces], pieces


@contextlib.contextmanager
def serving(template: Template, loader: Loader | None = None) -> Iterator[None]:
    """Inside, the operator's calls on the CPU are served by the kernels of a template.

    Args:
        loader: of other kernels than ``emulation.loader()``.
    """
    recipe, arch, accumulator = template.way
    target = kernel.Target(arch, 0, 0, loader or emulation.loader(), _scratch)
    served = Kernel(
        name=lambda: "cuda-mma on the CPU",
        device_type="cpu",
        recipe=recipe,
        refuse=functools.partial(kernel.refuse, recipe, arch=arch),
        gate=lambda problem: OPEN,
        run=functools.partial(kernel.run, target, recipe=recipe, accumulator=accumulator),
    )
    with (
        mock.patch.object(registry, "KERNELS", [served]),
        mock.patch.object(kernel, "Call", _Registered),
    ):
        yield


def attend(random_call: RandomCall, loader: Loader | None = None) -> tuple[Tensor, Tensor | None]:
    """Output and LSE, if it is wanted, of the operator.

    Raises:
        DriverError: a check failed.
    """
    call, semantics = random_call.call, random_call.call.semantics
    arguments = (
        call.query,
        call.key,
        call.value,
        call.attn_mask,
        str(semantics.mask_class),
        semantics.scale,
        random_call.template.way.recipe,
        0,  # min_seq_len
        str(semantics.dead_rows),
        semantics.softcap,
        call.sinks,
        semantics.window_left,
        semantics.window_right,
    )
    the_host().reset()
    the_host().seed(random_call.number)
    the_host().set_capability(*ARCHS[random_call.template.way.arch].capability)
    with serving(random_call.template, loader):
        if random_call.want_lse:
            output, lse = torch.ops.sage.attention.lse(*arguments)
            return output, lse
        return torch.ops.sage.attention.default(*arguments), None


def assert_right(random_call: RandomCall, loader: Loader | None = None) -> None:
    """As the reference within rounding, and as float64 within the recipe's tolerance.

    Raises:
        AssertionError: otherwise; DriverError: a check failed while a kernel ran. Both, as other
            errors of the operator, with what repeats the call.
    """
    try:
        _compare(random_call, *attend(random_call, loader))
    except (AssertionError, RuntimeError, ValueError) as error:  # SageErrors are among these
        error.add_note(the_host().message())
        error.add_note(str(random_call))
        raise


def _compare(random_call: RandomCall, output: Tensor, lse: Tensor | None) -> None:
    way, clean = random_call.template.way, random_call.clean
    kinds = {launch["symbol"].split("_")[1] for launch in the_host().launches()}
    assert "attend" in kinds and _Registered.last is not None, "no kernel was launched"
    softmax_blocks = _Registered.last.kernels.attend.keys // TILE_MMA.kv_block
    expected, expected_lse = reference.attention(
        clean.query,
        clean.key,
        clean.value,
        named(way.recipe, way.accumulator, softmax_blocks),
        clean.semantics,
        attn_mask=clean.attn_mask,
        sinks=clean.sinks,
        splits=_Registered.last.splits,
    )
    limits = DISTANCE if output.numel() > FEW_ELEMENTS else DISTANCE_OF_FEW
    apart, limit = distance(output, expected), limits[way.recipe[:4]]
    assert apart <= limit, f"{apart:.2g} from the reference, at most {limit}"
    exact, exact_lse = dense(clean)
    check(output, exact, clean.value, way.recipe)
    if lse is not None:
        # rtol: a row that sees nothing but a large bias has an LSE of its size.
        torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=LSE_DISTANCE)
        check_lse(lse, exact_lse.float(), way.recipe)


def distance(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|; NaN must be in the same places."""
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places"
    a, e = actual.double().nan_to_num(), expected.double().nan_to_num()
    norm = float(e.norm())
    return float((a - e).norm()) / norm if norm > 0 else float(a.norm())


def main(argv: Sequence[str] | None = None) -> None:
    """Repeat one call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=int)
    parser.add_argument("number", type=int)
    arguments = parser.parse_args(argv)
    chosen = random_call(arguments.run, arguments.number)
    print(chosen)
    assert_right(chosen)
    print("right")


if __name__ == "__main__":
    main()
