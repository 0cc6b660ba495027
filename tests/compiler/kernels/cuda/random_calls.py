"""Random calls of the operator, served by the CUDA kernels as they run on the CPU.

From the operator on, a call goes the way that it has on a GPU: the operator's checks, the
registry's choice by ``dispatch.decide``, ``kernel.run``, the look through its mask, the launches.
Left out is what asks torch for a GPU: the kernels stand in the registry for device "cpu", and their
target is the look-alike of the driver, not the device and stream of the tensors. So go batches of
packed sequences; and a ``PackedKV``, which keeps its tokens as on a GPU.

A *run* is a number that chooses a few kinds of kernels, so that few are compiled; a call of it has
a number too, which chooses all else. Both repeat a call:

    python -m tests.compiler.kernels.cuda.random_calls RUN NUMBER
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum, auto
from math import inf, nan
from typing import Any, ClassVar, Final
from unittest import mock

import torch
from torch import Tensor

import sage_compiler as sage
from sage_compiler import ops as ops  # registers sage::attention
from sage_compiler import packed_kv
from sage_compiler.kernels import reference, registry
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.packed import CudaStore
from sage_compiler.kernels.cuda.spec import DTYPES, HEAD_DIMS
from sage_compiler.kernels.cuda.varlen import Lengths
from sage_compiler.kernels.kernel import OPEN, Kernel
from sage_compiler.kernels.packed import PackedShape
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
_OF_CACHE: Final = {
    MaskClass.CAUSAL: MaskClass.CAUSAL_BOTTOM_RIGHT,
    MaskClass.WINDOW: MaskClass.WINDOW_BOTTOM_RIGHT,
}
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


class Form(Enum):
    """What is called."""

    CALL = auto()  # the operator
    PACKED = auto()  # the operator, of sequences that are packed along the lengths
    CACHE = auto()  # a ``PackedKV``, which keys and values were appended to


@dataclass(frozen=True, slots=True)
class Template:
    """What makes a call take one kernel and not another.

    Attributes:
        way: whose kernels; a cache has none with a 16-bit accumulator, and takes the others.
        head_dim, value_dim: of ``HEAD_DIMS``; a call has these or what is filled up to them.
    """

    way: Way
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    window: bool
    masked: bool
    softcap: bool
    form: Form


@dataclass(frozen=True, slots=True)
class RandomCall:
    """One call of the operator, and what is known of it.

    Attributes:
        call: as it is made; what no query sees may be NaN.
        clean: the same with finite tokens, contiguous.
        want_lse: which overload is called.
        lengths: of the sequences of a packed batch, of queries and of keys.
        ends: how many tokens a cache has after each append.
    """

    run: int
    number: int
    template: Template
    call: Call
    clean: Call
    want_lse: bool
    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    ends: tuple[int, ...]
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
        share(*[Form.CALL] * 6, Form.PACKED, Form.CACHE),
        strict=True,
    )
    return tuple(
        Template(
            way,
            dtype,
            head_dim,
            value_dim or head_dim,
            window,
            masked and form is not Form.PACKED,  # which takes no mask
            softcap,
            form,
        )
        for way, dtype, head_dim, value_dim, window, masked, softcap, form in columns
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
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if template.form is Form.PACKED:
        batch, lengths = 1, _sequences(rng)
        query_length, key_length = map(sum, lengths)
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
    poisoned = template.form is not Form.CACHE and rng.random() < 0.3
    if poisoned:
        what = rng.choice((nan, inf))
        if template.form is Form.PACKED:
            whole = replace(clean, query=stored[0], key=stored[1], value=stored[2])
            for part, other in zip(_parts(clean, lengths), _parts(whole, lengths), strict=True):
                _poison(part, (other.query, other.key, other.value), what)
        else:
            _poison(clean, stored, what)
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
        lengths=lengths,
        ends=_ends(rng, key_length) if template.form is Form.CACHE else (),
        label=(
            f"{template.form.name}, {template.way}, {template.dtype}, "
            f"query {tuple(stored[0].shape)} {layouts[0]}, key {tuple(stored[1].shape)} "
            f"{layouts[1]}, value {tuple(stored[2].shape)} {layouts[2]}, {semantics}, mask "
            f"{mask_label}, sinks {clean.sinks}, poisoned {poisoned}, sequences {lengths}"
        ),
    )


def _lengths(rng: random.Random) -> tuple[int, int]:
    def length() -> int:
        return rng.choice(_EDGES) if rng.random() < 0.5 else rng.randint(1, 200)

    few_to_many = rng.randint(1, 16), rng.randint(500, 800)  # of which some are split
    return rng.choice(((length(), length()), (n := length(), n), (1, length()), few_to_many))


def _sequences(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of 1 to 5 sequences, of which any may be without queries or keys, but not all."""

    def lengths() -> tuple[int, ...]:
        return tuple(rng.choice((0, rng.choice(_EDGES), rng.randint(1, 150))) for _ in range(count))

    while True:
        count = rng.randint(1, 5)
        queries, keys = lengths(), lengths()
        if sum(queries) > 0 and sum(keys) > 0:
            return queries, keys


def _parts(call: Call, lengths: tuple[Sequence[int], Sequence[int]]) -> list[Call]:
    """The sequences of a packed batch, each as a call: views of the same memory."""
    ends = [(0, *itertools.accumulate(each)) for each in lengths]
    of_query, of_key = ([slice(*pair) for pair in itertools.pairwise(each)] for each in ends)
    return [
        replace(
            call,
            query=call.query[:, :, queries],
            key=call.key[:, :, keys],
            value=call.value[:, :, keys],
        )
        for queries, keys in zip(of_query, of_key, strict=True)
    ]


def _ends(rng: random.Random, length: int) -> tuple[int, ...]:
    """Of up to 4 appends: anywhere, or where a tile or the tokens of the mean are whole."""
    some = (rng.choice((63, 64, 255, 256, 257, rng.randint(1, length))) for _ in range(3))
    return (*sorted({end for end in some if end < length}), length)


def _dim(rng: random.Random, largest: int) -> int:
    """That dim, or one that is filled up to it."""
    smaller = max((dim for dim in HEAD_DIMS if dim < largest), default=0)
    return rng.choice((largest, rng.randint(smaller + 1, largest)))


def _semantics(rng: random.Random, template: Template, head_dim: int) -> Semantics:
    """Any; a window with an end to the left is what takes another kernel. A cache has those of its
    end, and zeros in rows that see nothing.
    """
    mask_class = rng.choice(_WINDOWS if template.window else tuple(MaskClass))
    of_cache = template.form is Form.CACHE
    if of_cache:
        mask_class = _OF_CACHE.get(mask_class, mask_class)
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
        dead_rows=DeadRows.ZERO if of_cache else rng.choice(tuple(DeadRows)),
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
        run_packed=functools.partial(_run_packed, target, recipe=recipe, accumulator=accumulator),
    )
    with (
        mock.patch.object(registry, "KERNELS", [served]),
        mock.patch.object(kernel, "Call", _Registered),
        mock.patch.dict(packed_kv._OPEN, cpu=functools.partial(_open, target)),
    ):
        yield


def _run_packed(
    target: kernel.Target,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As ``kernel.attention_of_sequences``, on a target."""
    lengths = Lengths.of(cu_seqlens_q, cu_seqlens_k, query, key, read=False)
    for offsets in {id(x): x for x in (lengths.queries, lengths.keys)}.values():
        the_host().allow(offsets, writable=False)
    return kernel.run(target, query, key, value, semantics, lengths=lengths, **options)


def _open(
    target: kernel.Target, shape: PackedShape, device: torch.device, precision: str | None
) -> CudaStore:
    """As a cache on a GPU is opened. What it allocates is not known here: all may be touched."""
    everywhere = replace(target, allocate=kernel.allocate)
    return CudaStore(shape, device, precision, lambda device: contextlib.nullcontext(everywhere))


def attend(random_call: RandomCall, loader: Loader | None = None) -> tuple[Tensor, Tensor | None]:
    """Output and LSE, if it is wanted, of the operator or of a cache.

    Raises:
        DriverError: a check failed.
    """
    the_host().reset()
    the_host().seed(random_call.number)
    the_host().set_capability(*ARCHS[random_call.template.way.arch].capability)
    with serving(random_call.template, loader):
        if random_call.template.form is Form.CACHE:
            return _attend_to_cache(random_call)
        return _call(random_call)


def _call(random_call: RandomCall) -> tuple[Tensor, Tensor | None]:
    call, semantics = random_call.call, random_call.call.semantics
    offsets = [
        torch.tensor([0, *itertools.accumulate(each)], dtype=torch.int32)
        for each in random_call.lengths
        if random_call.template.form is Form.PACKED
    ]
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
        *offsets,
    )
    if random_call.want_lse:
        output, lse = torch.ops.sage.attention.lse(*arguments)
        return output, lse
    return torch.ops.sage.attention.default(*arguments), None


def _attend_to_cache(random_call: RandomCall) -> tuple[Tensor, Tensor | None]:
    call, semantics = random_call.call, random_call.call.semantics
    batch, kv_heads, length, head_dim = call.key.shape
    cache = sage.PackedKV(
        batch,
        kv_heads,
        head_dim,
        value_head_dim=call.value.shape[3],
        capacity=length + random_call.number % 100,
        dtype=call.key.dtype,
        precision=random_call.template.way.recipe,
    )
    for end in random_call.ends:
        tokens = slice(cache.length, end)
        cache.append(call.key[:, :, tokens], call.value[:, :, tokens])
    window = None
    if semantics.mask_class is MaskClass.WINDOW_BOTTOM_RIGHT:
        left, right = (
            None if side == UNBOUNDED else side
            for side in (semantics.window_left, semantics.window_right)
        )
        window = (left, right)
    output, lse = cache.attend(
        call.query,
        is_causal=semantics.mask_class is MaskClass.CAUSAL_BOTTOM_RIGHT,
        scale=semantics.scale,
        softcap=semantics.softcap,
        window=window,
        sinks=call.sinks,
        attn_mask=call.attn_mask,
        return_lse=True,
    )
    return output, lse


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
    kinds = {launch["symbol"].split("_")[1] for launch in the_host().launches()}
    assert kinds >= _LAUNCHED[random_call.template.form], f"of kernels only {kinds}"
    clean, recipe = random_call.clean, random_call.template.way.recipe
    if random_call.template.form is Form.CACHE:
        exact, exact_lse = dense(clean)
    else:
        parts = [clean]
        if random_call.template.form is Form.PACKED:
            parts = [part for part in _parts(clean, random_call.lengths) if part.query.shape[2] > 0]
        expected, expected_lse = _joined(_reference(random_call), parts)
        limits = DISTANCE if output.numel() > FEW_ELEMENTS else DISTANCE_OF_FEW
        apart, limit = distance(output, expected), limits[recipe[:4]]
        assert apart <= limit, f"{apart:.2g} from the reference, at most {limit}"
        if lse is not None:
            # rtol: a row that sees nothing but a large bias has an LSE of its size.
            torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=LSE_DISTANCE)
        exact, exact_lse = _joined(dense, parts)
    check(output, exact, clean.value, recipe)
    if lse is not None:
        check_lse(lse, exact_lse.float(), recipe)


_LAUNCHED: Final = {
    Form.CALL: {"attend"},
    Form.PACKED: {"statistics", "query", "key", "value", "attend"},
    Form.CACHE: {"append", "query", "attend"},
}


def _reference(random_call: RandomCall) -> Callable[[Call], tuple[Tensor, Tensor]]:
    """What kernels compute, as they did last, of a call or a sequence."""
    way, last = random_call.template.way, _Registered.last
    assert last is not None
    softmax_blocks = last.kernels.attend.keys // TILE_MMA.kv_block
    recipe = named(way.recipe, way.accumulator, softmax_blocks)

    def attention(call: Call) -> tuple[Tensor, Tensor]:
        return reference.attention(
            call.query,
            call.key,
            call.value,
            recipe,
            call.semantics,
            attn_mask=call.attn_mask,
            sinks=call.sinks,
            splits=last.splits,
        )

    return attention


def _joined(
    attention: Callable[[Call], tuple[Tensor, Tensor]], parts: Sequence[Call]
) -> tuple[Tensor, Tensor]:
    """Of sequences that are behind one another. One without keys yields zeros, and the sink."""
    results = []
    for part in parts:
        if part.key.shape[2] > 0:
            results.append(attention(part))
            continue
        output = part.query.new_zeros((*part.query.shape[:3], part.value.shape[3]))
        sinks = torch.full(part.query.shape[1:2], -inf) if part.sinks is None else part.sinks
        results.append((output, sinks[None, :, None].expand(part.query.shape[:3])))
    outputs, lses = zip(*results, strict=True)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


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
