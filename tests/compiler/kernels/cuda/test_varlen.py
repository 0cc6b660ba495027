"""Packed batches in one set of launches, executed on the CPU: as each sequence alone, bit by bit.

That each alone is right, the other tests of the kernels say. So what is compared here is exact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
import re
import types
from collections.abc import Iterator, Sequence
from math import inf

import pytest
import torch
from torch import Tensor

import sage_compiler as sage
from sage_compiler.errors import InvalidAttentionError
from sage_compiler.kernels import reference, registry
from sage_compiler.kernels.cuda import dispatch, kernel
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.driver import DriverError
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.variants import Variant
from sage_compiler.kernels.cuda.varlen import Lengths
from sage_compiler.kernels.kernel import OPEN, Kernel
from sage_compiler.precision import TILE_MMA, Accumulator
from sage_compiler.semantics import DeadRows, MaskClass, RotaryPairs
from tests.compiler.kernels.cuda.emulation import (
    ARCH,
    WGMMA,
    Way,
    broken,
    loader,
    named,
    replacing,
    the_host,
)
from tests.compiler.kernels.cuda.test_attention import DISTANCE_OF_FEW, distance, make_call
from tests.compiler.kernels.dense import Call, dense, laid_out
from tests.cutlass_templates import host
from tests.tolerances import check

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

# Around the edges of tiles and of chunks for statistics; none, one, and several tiles.
EDGES = (0, 1, 63, 64, 65, 127, 128, 129, 255, 257, 300)
WAYS = (*map(Way, ("int4_fp8", "int8_fp8", "int4_fp16", "int8_fp16")), WGMMA)
INT8 = Way("int8_fp8")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences packed into a call, whose tensors are (1, heads, total, channels)."""

    call: Call
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]

    def lengths(self, dtypes: Sequence[torch.dtype] = (torch.int32, torch.int64)) -> Lengths:
        """As a caller has them on the device, where the host does not know the longest."""
        queries, keys = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)
            for lengths, dtype in zip((self.query_lengths, self.key_lengths), dtypes, strict=True)
        )
        return Lengths(queries, keys, self.call.key.shape[2])

    def parts(self) -> Iterator[tuple[slice, Call]]:
        """Each sequence that has queries: where they are, and its own call."""
        first_query = first_key = 0
        for queries, keys in zip(self.query_lengths, self.key_lengths, strict=True):
            of_query = slice(first_query, first_query + queries)
            of_key = slice(first_key, first_key + keys)
            first_query, first_key = of_query.stop, of_key.stop
            if queries > 0:
                call = self.call
                yield (
                    of_query,
                    dataclasses.replace(
                        call,
                        query=call.query[:, :, of_query],
                        key=call.key[:, :, of_key],
                        value=call.value[:, :, of_key],
                    ),
                )


def make_batch(
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    **options: object,
) -> Batch:
    """Gaussian sequences, as those who pack them have them: views of (total, heads, channels)."""
    call = make_call(
        sum(query_lengths),
        sum(key_lengths),
        head_dim,
        dtype,
        **options,  # type: ignore[arg-type]
    )
    query, key, value = (laid_out(x, "tokens_first") for x in (call.query, call.key, call.value))
    call = dataclasses.replace(call, query=query, key=key, value=value)
    return Batch(call, tuple(query_lengths), tuple(key_lengths))


def random_batch(seed: int, **options: object) -> Batch:
    """1 to 8 sequences of lengths around the edges."""
    rng = random.Random(seed)
    count = rng.randint(1, 8)
    query_lengths = [rng.choice(EDGES) for _ in range(count)]
    key_lengths = [rng.choice(EDGES) for _ in range(count)]
    kv_heads, group = rng.choice(((1, 1), (2, 1), (1, 4), (2, 2)))
    return make_batch(
        query_lengths,
        key_lengths,
        kv_heads=kv_heads,
        group=group,
        seed=seed,
        **options,
    )


def alone(part: Call, way: Way) -> tuple[Tensor, Tensor]:
    """What a sequence yields that is a call of its own, with all keys for a block of queries.

    Where few queries have their keys split, as calls have, sums are of other parts.
    """
    if part.key.shape[2] > 0:
        result = way.attend(part)
        assert result.lse is not None
        return result.output, result.lse
    return kernel.run(
        kernel.Target(way.arch, 0, 0, loader()),
        part.query,
        part.key,
        part.value,
        part.semantics,
        want_lse=True,
        recipe=way.recipe,
        sinks=part.sinks,
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN in the same places, and all else equal."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(), other.nan_to_num()
    )


def assert_as_each_alone(batch: Batch, way: Way, *, seed: int = 0, **options: object) -> None:
    result = way.attend(batch.call, lengths=batch.lengths(), seed=seed, **options)
    assert result.lse is not None
    for tokens, part in batch.parts():
        output, lse = alone(part, way)
        assert same_bits(result.output[:, :, tokens], output), tokens
        assert same_bits(result.lse[:, :, tokens], lse), tokens


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_sequence_is_as_alone(way: Way) -> None:
    masks = (MaskClass.NONE, MaskClass.CAUSAL, MaskClass.CAUSAL_BOTTOM_RIGHT)
    for seed, mask_class in enumerate(masks):
        batch = random_batch(seed, mask_class=mask_class, sinks=seed == 1)
        assert_as_each_alone(batch, way, seed=seed)
    # More keys than chunks of the least size serve, between sequences of none.
    long = make_batch((0, 3, 2), (7, 8400, 0), mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT)
    assert_as_each_alone(long, way)


@pytest.mark.parametrize("multiprocessors", [1, 5])
def test_a_persistent_grid_does_the_tasks_of_all_sequences(multiprocessors: int) -> None:
    for seed in range(2):
        batch = random_batch(20 + seed, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT, sinks=seed == 1)
        assert_as_each_alone(batch, WGMMA, seed=seed, multiprocessors=multiprocessors)
    WGMMA.attend(batch.call, lengths=batch.lengths(), multiprocessors=multiprocessors)
    assert the_host().launches()[-1]["grid"] == multiprocessors


def test_tasks_are_counted_where_no_query_is_quantized() -> None:
    """Sequences without keys or without queries: their output is zeros, or the sinks'."""
    batch = make_batch((0, 300, 200), (70, 0, 0), kv_heads=2, sinks=True)
    result = WGMMA.attend(batch.call, lengths=batch.lengths(), multiprocessors=2)
    assert result.lse is not None and batch.call.sinks is not None
    assert not result.output.any()
    assert torch.equal(result.lse, batch.call.sinks[:, None].expand_as(result.lse[0])[None])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_sequence_is_right(way: Way) -> None:
    """Against the reference and float64, which know nothing of kernels."""
    batch = make_batch(
        (130, 0, 65, 1, 200),
        (64, 10, 0, 333, 129),
        kv_heads=2,
        group=2,
        mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT,
        dead_rows=DeadRows.NAN,
    )
    result = way.attend(batch.call, lengths=batch.lengths())
    assert result.lse is not None
    blocks = result.call.kernels.attend.keys // TILE_MMA.kv_block
    recipe = named(way.recipe, way.accumulator, blocks)
    for tokens, part in batch.parts():
        output = result.output[:, :, tokens]
        expected, _ = reference.attention(part.query, part.key, part.value, recipe, part.semantics)
        assert distance(output, expected) <= DISTANCE_OF_FEW[way.recipe[:4]]
        if part.key.shape[2] > 0:
            check(output, dense(part)[0], part.value, way.recipe)
        else:
            assert not output.any() and (result.lse[:, :, tokens] == -inf).all()


@pytest.mark.parametrize("way", [INT8, Way("int4_fp16"), WGMMA], ids=str)
def test_windows_softcap_and_sinks(way: Way) -> None:
    for seed, (mask_class, left, right) in enumerate(
        (
            (MaskClass.WINDOW, 20, 5),
            (MaskClass.WINDOW_BOTTOM_RIGHT, 100, 0),
            (MaskClass.WINDOW_BOTTOM_RIGHT, 3, -1),
        )
    ):
        batch = random_batch(
            10 + seed,
            mask_class=mask_class,
            window_left=left,
            window_right=right,
            softcap=5.0,
            sinks=seed == 0,
            dead_rows=DeadRows.NAN,
        )
        assert_as_each_alone(batch, way)


@pytest.mark.parametrize(
    ("way", "head_dim", "value_dim", "dtype"),
    [
        (INT8, 128, 128, torch.bfloat16),
        (Way("int4_fp16"), 128, 40, torch.float32),
        (Way("int8_fp16"), 24, 192, torch.bfloat16),
        (WGMMA, 128, 128, torch.bfloat16),
        (WGMMA, 200, 96, torch.float32),
    ],
    ids=str,
)
def test_dims_and_dtypes(way: Way, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    lengths = (1, 129, 64, 0), (65, 200, 0, 3)
    batch = make_batch(*lengths, head_dim, dtype, value_dim=value_dim, kv_heads=2, group=2)
    assert_as_each_alone(batch, way)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 180, 10))
def test_random_batches(first: int) -> None:
    for seed in range(first, first + 10):
        rng = random.Random(seed)
        mask_class = rng.choice(tuple(MaskClass))
        windowed = mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)
        batch = random_batch(
            seed,
            head_dim=rng.choice((32, 64, 80, 128)),
            value_dim=rng.choice((None, 48, 128)),
            dtype=rng.choice((torch.float16, torch.bfloat16, torch.float32)),
            mask_class=mask_class,
            window_left=rng.choice((-1, 0, 70)) if windowed else -1,
            window_right=rng.choice((-1, 0, 5)) if windowed else -1,
            softcap=rng.choice((None, 20.0)),
            scale=rng.choice((None, -0.1)),
            sinks=rng.random() < 0.5,
            dead_rows=rng.choice(tuple(DeadRows)),
        )
        assert_as_each_alone(batch, rng.choice(WAYS), seed=seed)


def test_strides() -> None:
    """Channels and heads apart, tokens at odd places: nothing may be copied or misread."""
    batch = make_batch((65, 3), (70, 130), group=2)
    spread = [x.repeat_interleave(2, -1)[..., ::2] for x in (batch.call.query, batch.call.key)]
    odd = torch.empty(1, 1, 200, 65, dtype=torch.float16)[..., 1:]
    call = dataclasses.replace(
        batch.call, query=spread[0], key=spread[1], value=odd.copy_(batch.call.value)
    )
    for way in (Way("int4_fp8"), WGMMA):
        assert_as_each_alone(dataclasses.replace(batch, call=call), way)


def test_the_half_accumulator() -> None:
    batch = make_batch((65, 130), (70, 129), mask_class=MaskClass.CAUSAL)
    way = INT8._replace(accumulator=Accumulator.FP16)
    result = way.attend(batch.call, lengths=batch.lengths())
    for tokens, part in batch.parts():
        expected = way.attend(part).output
        assert same_bits(result.output[:, :, tokens], expected)


@pytest.mark.parametrize("way", [INT8, WGMMA], ids=str)
def test_queries_behind_the_last_sequence(way: Way) -> None:
    """As where a captured graph is replayed with less than it was captured for."""
    whole = make_batch((65, 70, 300), (64, 129, 100), sinks=True, dead_rows=DeadRows.NAN)
    batch = dataclasses.replace(whole, query_lengths=(65, 70), key_lengths=(64, 129))
    result = way.attend(batch.call, lengths=batch.lengths())
    assert result.lse is not None and batch.call.sinks is not None
    for tokens, part in batch.parts():
        assert same_bits(result.output[:, :, tokens], way.attend(part).output)
    assert not result.output[:, :, 135:].any()
    assert (result.lse[:, :, 135:] == batch.call.sinks[0]).all()
    nobody = Lengths(torch.tensor([0]), torch.tensor([0]), 293)
    result = way.attend(batch.call, lengths=nobody)
    assert not result.output.any()


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(Way("int4_fp8"), torch.int32), (Way("int4_fp8"), torch.int64), (WGMMA, torch.int32)],
    ids=str,
)
def test_no_offsets_reach_memory_of_others(way: Way, dtype: torch.dtype) -> None:
    """Whatever they are: an access outside of a tensor or of scratch would be an error."""
    rng = random.Random(0)
    batch = make_batch((200,), (333,), group=2, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT)
    limits = torch.iinfo(dtype)
    some = (limits.min, limits.max, -1, -200, 1 << 30, 0, 1, 65, 128, 199, 200, 201, 333, 334)
    hostile = [[200, 100, 0], [0, 200, 200, 5, 200], [limits.max, limits.min], [-5, 210]]
    hostile += [[rng.choice(some) for _ in range(rng.randint(1, 9))] for _ in range(20)]
    for offsets in hostile:
        queries = torch.tensor(offsets, dtype=dtype)
        keys = queries.flip(0) if rng.random() < 0.5 else queries.clone()
        way.attend(batch.call, lengths=Lengths(queries, keys, 333))


# --- what the host does -----------------------------------------------------------------------


def test_the_host_does_not_read_offsets_on_the_device() -> None:
    """Tensors without data stand for those of a GPU: to read an element of one is an error."""
    launched = []

    class Recorder(Loader):
        def loaded(self, spec, device, stream):  # type: ignore[no-untyped-def]
            return lambda blocks, stream, packed, *, dependent: launched.append(
                (spec, blocks, len(packed))
            )

    with torch.device("meta"):
        query, key = torch.empty(1, 4, 1000, 64), torch.empty(1, 2, 700, 64)
        offsets = torch.empty(6, dtype=torch.int32), torch.empty(6, dtype=torch.int64)
    lengths = Lengths.of(*offsets, query, key, read=False)
    assert lengths.longest == 700
    target = kernel.Target(
        ARCH, 0, 0, Recorder(None, None), lambda sizes, _: ([256] * len(sizes), None)
    )  # type: ignore[arg-type]
    kernel.run(
        target,
        query,
        key,
        key,
        make_call(1, 1, 64, torch.float32).semantics,
        want_lse=True,
        recipe="int4_fp8",
        lengths=lengths,
    )
    blocks = [2 * 2 * (700 // 256 + 5), 4 * (1000 // 128 + 6), *[2 * (700 // 64 + 5)] * 2]
    assert [found for _, found, _ in launched] == [*blocks, blocks[1]]
    assert all(spec.varlen and spec.params_bytes == size for spec, _, size in launched)


def test_offsets_on_the_cpu_are_checked_and_give_the_longest() -> None:
    call = make_call(10, 20, 64, torch.float16)
    tensors = call.query, call.key

    def of(queries: list[int], keys: list[int]) -> Lengths:
        return Lengths.of(torch.tensor(queries), torch.tensor(keys), *tensors, read=False)

    assert of([0, 4, 10], [0, 15, 20]).longest == 15
    for queries, keys in (([0, 4, 9], [0, 15, 20]), ([0, 4, 10], [0, 21, 20]), ([], [])):
        with pytest.raises(InvalidAttentionError):
            of(queries, keys)


def test_offsets_on_the_device_are_read_where_delta_would_be_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of INT4, and of so many tokens that one sequence of them all would take 1 GiB."""
    asked = []
    monkeypatch.setattr(kernel, "run", lambda *args, lengths, **options: None)
    monkeypatch.setattr(Lengths, "of", lambda *args, read: asked.append(read))
    with registered(monkeypatch), torch.device("meta"):
        offsets = torch.empty(65, dtype=torch.int32)
        for total in (1 << 12, 1 << 17):
            query = torch.empty(1, 32, total, 64)
            for recipe in ("int4_fp8", "int8_fp8"):
                kernel.attention_of_sequences(
                    query,
                    query,
                    query,
                    make_call(1, 1, 64, torch.float32).semantics,
                    offsets,
                    offsets,
                    sinks=None,
                    want_lse=False,
                    recipe=recipe,
                )
    assert asked == [False, False, True, False]


@contextlib.contextmanager
def registered(monkeypatch: pytest.MonkeyPatch, way: Way = INT8) -> Iterator[None]:
    """The kernels in the registry, for CPU tensors, launched on the look-alike."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: ARCHS[way.arch].capability
    )
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(kernel, "default_loader", loader)
    emulated = Kernel(
        name=lambda: "cuda-mma on the CPU",
        device_type="cpu",
        recipe="int8_fp8",
        refuse=functools.partial(kernel.refuse, "int8_fp8", arch=way.arch),
        gate=lambda problem: OPEN,
        run=functools.partial(kernel.attention, recipe="int8_fp8"),
        run_packed=functools.partial(kernel.attention_of_sequences, recipe="int8_fp8"),
    )
    monkeypatch.setattr(registry, "KERNELS", [emulated])
    kernel._arch.cache_clear()
    the_host().reset()
    yield
    kernel._arch.cache_clear()


def launched_kinds() -> list[str]:
    return [launch["symbol"].split("_")[1] for launch in the_host().launches()]


KINDS = ["statistics", "query", "key", "value", "attend"]
KINDS_ALONE = ["quantize", "attend"]  # of a call that is one sequence


@pytest.mark.parametrize("way", [INT8, WGMMA], ids=str)
def test_the_operator_launches_once_for_all_sequences(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch((65, 0, 70), (64, 5, 129), kv_heads=2, group=2, sinks=True)
    call, lengths = batch.call, batch.lengths()
    with registered(monkeypatch, way):
        output, lse = sage.attention(
            call.query,
            call.key,
            call.value,
            enable_gqa=True,
            sinks=call.sinks,
            cu_seqlens=(lengths.queries, lengths.keys),
            precision="int8_fp8",
            return_lse=True,
        )
        assert launched_kinds() == KINDS
        for tokens, part in batch.parts():
            expected, expected_lse = alone(part, way)
            assert same_bits(output[:, :, tokens], expected)
            assert same_bits(lse[:, :, tokens], expected_lse)
        assert output.stride() == call.query.stride()
        the_host().reset()  # it was told what a call may touch

        # Nothing to attend to at all.
        nothing = call.key[:, :, :0]
        output, lse = sage.attention(
            call.query,
            nothing,
            nothing,
            enable_gqa=True,
            cu_seqlens=(lengths.queries, torch.zeros(4, dtype=torch.int32)),
            precision="int8_fp8",
            return_lse=True,
        )
        assert not output.any() and (lse == -inf).all()


@pytest.mark.parametrize("way", [INT8, WGMMA], ids=str)
def test_sequences_whose_kernels_cannot_be_had_are_calls_of_their_own(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch((65, 0, 70), (64, 5, 129), kv_heads=2, group=2, sinks=True)
    call, lengths = batch.call, batch.lengths()

    def missing(kernels: Variant) -> str | None:
        return "in no pack" if kernels.attend.varlen else None

    monkeypatch.setattr(kernel, "_missing", missing)
    with registered(monkeypatch, way):
        output, lse = sage.attention(
            call.query,
            call.key,
            call.value,
            enable_gqa=True,
            sinks=call.sinks,
            cu_seqlens=(lengths.queries, lengths.keys),
            precision="int8_fp8",
            return_lse=True,
        )
        assert launched_kinds() == 2 * KINDS_ALONE  # the second sequence has no queries
        for tokens, part in batch.parts():
            expected, expected_lse = alone(part, way)
            assert same_bits(output[:, :, tokens], expected)
            assert same_bits(lse[:, :, tokens], expected_lse)


def test_no_sequences() -> None:
    call = make_call(3, 5, 64, torch.float16)
    none = torch.zeros(1, dtype=torch.int32)
    output, lse = kernel.run(
        kernel.Target(ARCH, 0, 0, loader()),
        call.query,
        call.key,
        call.value,
        call.semantics,
        want_lse=True,
        recipe="int8_fp16",
        lengths=Lengths(none, none, 5),
    )
    assert not output.any() and (lse == -inf).all()


def test_rotated_sequences_are_rotated_before(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch((65, 70), (64, 129), dtype=torch.float32)
    call, lengths = batch.call, batch.lengths()
    offsets = {"cu_seqlens_q": lengths.queries, "cu_seqlens_k": lengths.keys}
    angles = torch.arange(135.0).view(-1, 1) / torch.arange(1.0, 33.0)
    how = (angles.cos(), angles.sin(), None, None, "half", 64, "float32")
    tensors = (call.query, call.key, call.value)
    with registered(monkeypatch):
        output = torch.ops.sage.rotary_attention(*tensors, *how, recipe="int8_fp8", **offsets)
        assert launched_kinds() == KINDS
        first, second = call.query.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        expected = torch.ops.sage.attention(rotated, *tensors[1:], recipe="int8_fp8", **offsets)
    assert torch.equal(output, expected)
    assert "rotated" in dispatch.decide(
        ARCH, "int8_fp8", "float16", 64, 64, varlen=True, rotary_query=RotaryPairs.HALF
    )


def test_where_lengths_decide_each_sequence_is_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate, of `auto` or a call's own, and a guard; and a gradient is that of exact attention."""
    batch = make_batch((65, 70), (65, 70), dtype=torch.float32)
    call, offsets = batch.call, batch.lengths().queries
    operator = torch.ops.sage.attention.default
    tensors = (call.query, call.key, call.value)
    arguments = {"recipe": "int8_fp8", "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    with registered(monkeypatch):
        operator(*tensors, min_seq_len=66, **arguments)
        assert launched_kinds() == KINDS_ALONE
        the_host().reset()
        operator(*tensors, min_seq_len=64, **arguments)
        assert launched_kinds() == 2 * KINDS_ALONE
        the_host().reset()
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = operator(*leaves, **arguments)
        output.sum().backward()
        assert launched_kinds() == KINDS
        exact = [x.clone().requires_grad_() for x in tensors]
        operator(*exact, **{**arguments, "recipe": "exact"}).sum().backward()
        for found, expected in zip(leaves, exact, strict=True):
            assert torch.equal(found.grad, expected.grad)  # type: ignore[arg-type]


# --- what must fail ---------------------------------------------------------------------------

BATCH = make_batch(
    (130, 0, 65, 200, 1),
    (64, 10, 0, 333, 129),
    kv_heads=2,
    group=2,
    mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT,
    dead_rows=DeadRows.NAN,
)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        # the search: a sequence too early, and blocks that are not its own
        ("varlen", "kTokens + middle <= tile", "kTokens + middle < tile"),
        ("varlen", "kTokens + middle <= tile", "kTokens <= tile"),
        # lengths and diagonals of another, or of the whole batch
        ("varlen", "? key_length_ - query_length_ : 0", "? batch.keys - batch.queries : 0"),
        ("varlen", "of_keys.at(index + 1) : key_", "of_keys.total() : key_"),
        # another sequence's part of what the kernels share
        ("varlen", "query_ / kQueryBlock + index_", "query_ / kQueryBlock"),
        ("varlen", "key_ / kKeyBlock + index_", "key_ / kKeyBlock"),
        ("varlen", "key_ / kLeastChunk + index_", "key_ / kLeastChunk"),
        ("statistics", "p.key_sums += before * kKeyDim;", ""),
        ("query", "p.scales += before * kGroups;", ""),
        ("query", "p.means += before * kHeadDim;", ""),
        ("query", "p.row_term += sequence.first_query_token() * p.heads;", ";"),
        ("key", "p.codes += before * p.tile_bytes;", ""),
        ("key", "p.delta += rows * batch.most_key_blocks * kKeyBlock;", ""),
        ("value", "p.scales += sequence.index() * p.heads * kHeadDim;", ""),
        ("varlen", "p.value_scales += sequence.index()", "p.value_scales += 0"),
        # tokens, and what becomes of those that see nothing
        ("value", "skip<Input>(p.value, sequence.first_key_token());", ""),
        ("varlen", "if (p.lse != nullptr) p.lse += sequence.first_query_token();", ""),
        ("varlen", "if (p.key_length == 0) p.dead_value = 0.0f;", ""),
    ],
)
def test_what_is_broken_is_noticed(name: str, old: str, new: str) -> None:
    kernels = broken("" if name == "varlen" else name, replacing(old, new), name)
    # DriverError: what is read or written outside of the tensors ends the launch.
    with pytest.raises((AssertionError, DriverError)):
        assert_as_each_alone(BATCH, Way("int4_fp8"), kernels=kernels)


@pytest.mark.parametrize(
    ("header", "old", "new", "found_by"),
    [
        # the words of a sequence: mixed up, those of another place, written too early
        ("varlen", "key_(word(words, 3))", "key_(word(words, 1))", None),
        (
            "hopper_memory",
            "task(kQueries) + place * kTaskWords",
            "task(kQueries)",
            "race between (store|load)_shared",
        ),
        (
            "hopper_producer",
            "wait_for_place(queries); int* const words",
            "int* const words",
            "race between (store|load)_shared",
        ),
        # a task with nothing to do
        ("hopper_producer", "if (index < 0) continue;", "if (index < 0) break;", None),
        # the order, and the same task again
        ("hopper_deal", "blocks + arch::take_ticket", "blocks + 1 + arch::take_ticket", None),
        (
            "hopper_work",
            "attended_sequence(p.call, p.sequences, position)",
            "attended_sequence(p.call, p.sequences, position / 2)",
            None,
        ),
    ],
)
def test_what_is_broken_between_sequences_is_noticed(
    header: str, old: str, new: str, found_by: str | None
) -> None:
    kernels = broken("attend_hopper", replacing(old, new), header)
    with pytest.raises(AssertionError if found_by is None else DriverError):
        assert_as_each_alone(BATCH, WGMMA, kernels=kernels, multiprocessors=1)
    assert found_by is None or re.search(found_by, the_host().message())


def test_a_counter_that_is_not_cleared_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.Target, "clear", lambda *_: None)
    with pytest.raises(DriverError):
        WGMMA.attend(BATCH.call, lengths=BATCH.lengths(), multiprocessors=1)
    assert "must be zero before the launch" in the_host().message()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        # of the kernel of wgmma: codes, tiles, scales and a diagonal of another sequence
        ("varlen", "before * kQueryBytes", "0 * kQueryBytes"),
        ("varlen", "sequence.first_key_block() * kv_heads * kTileBytes", "0 * kTileBytes"),
        ("varlen", "p.query_scales += before *", "p.query_scales += 0 *"),
        ("varlen", "p.upper = sequence.upper();", "p.upper = batch.keys - batch.queries;"),
        ("varlen", "p.key_length = sequence.key_length();", "p.key_length = batch.keys;"),
        ("attend_hopper", "padded_dim(kValueDim), false>", "kKeyBlock / 2, false>"),
    ],
)
def test_what_is_broken_of_wgmma_is_noticed(name: str, old: str, new: str) -> None:
    kernels = broken("attend_hopper", replacing(old, new), name)
    with pytest.raises((AssertionError, DriverError)):
        assert_as_each_alone(BATCH, WGMMA, kernels=kernels)


def test_offsets_that_are_not_clamped_are_noticed() -> None:
    kernels = broken("", replacing("x < low ? low : x < high ? x : high", "x"), "varlen")
    lengths = Lengths(torch.tensor([0, 200]), torch.tensor([0, 5000]), 523)
    with pytest.raises(DriverError):
        INT8.attend(BATCH.call, lengths=lengths, kernels=kernels)
