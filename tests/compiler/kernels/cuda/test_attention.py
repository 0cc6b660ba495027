"""Every attention kernel, executed on the CPU, against the reference and against float64."""

from __future__ import annotations

import dataclasses
import itertools
import random
from math import inf, log, nan

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels import reference
from sage_compiler.kernels.cuda.driver import DriverError
from sage_compiler.kernels.cuda.variants import Variant
from sage_compiler.precision import RECIPES, Accumulator
from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass, Semantics
from tests.compiler.kernels.cuda import emulation
from tests.compiler.kernels.cuda.emulation import RECIPE_VARIANTS, attend, broken, named, replacing
from tests.compiler.kernels.dense import Call, dense, laid_out, random_mask
from tests.cutlass_templates import host
from tests.tolerances import check, check_lse

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

MASKS = (MaskClass.NONE, MaskClass.CAUSAL, MaskClass.CAUSAL_BOTTOM_RIGHT)
DTYPES = (torch.float16, torch.bfloat16)  # of the matrix

# Lq, Lk: one token, one short of a tile, whole tiles, one more, several with a tail.
LENGTHS = [(1, 1), (1, 190), (63, 64), (128, 128), (129, 65), (200, 333), (300, 130)]

# How far a kernel may be from the reference, which computes the same: the relative L2 distance of
# the outputs, and the absolute one of the LSE. They add up in other orders, so that a rounding at a
# tie goes the other way now and then; one of INT4 is a seventh of a channel's range. Worst of 500
# random calls, and of the matrix: INT8 .00075, INT4 .0035, and .012 in outputs of few elements; LSE
# .00025.
DISTANCE = {"int8": 1.5e-3, "int4": 6e-3}
DISTANCE_OF_FEW = {"int8": 1.5e-3, "int4": 3e-2}
FEW_ELEMENTS = 4096
LSE_DISTANCE = 1e-3


def make_call(
    query_length: int,
    key_length: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    kv_heads: int = 1,
    group: int = 1,
    seed: int = 0,
    value_dim: int | None = None,
    sinks: bool = False,
    **semantics: object,
) -> Call:
    """Gaussian Q, K, V and sinks, with a channel bias on K."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads = kv_heads * group
    key = normal(batch, kv_heads, key_length, head_dim) + 2 * normal(1, kv_heads, 1, head_dim)
    return Call(
        normal(batch, heads, query_length, head_dim).to(dtype),
        key.to(dtype),
        normal(batch, kv_heads, key_length, value_dim or head_dim).to(dtype),
        Semantics(**semantics),  # type: ignore[arg-type]
        sinks=normal(heads) if sinks else None,
    )


def assert_right(call: Call, recipe: str, accumulator: Accumulator, **options: object) -> None:
    """As the reference within rounding, and as float64 within the recipe's tolerance."""
    result = attend(call, recipe, accumulator, **options)  # type: ignore[arg-type]
    assert result.lse is not None
    expected, expected_lse = reference.attention(
        call.query,
        call.key,
        call.value,
        named(recipe, accumulator),
        call.semantics,
        attn_mask=call.attn_mask,
        sinks=call.sinks,
    )
    limits = DISTANCE if call.query.numel() > FEW_ELEMENTS else DISTANCE_OF_FEW
    assert distance(result.output, expected) <= limits[recipe[:4]]
    # rtol: a row that sees nothing but a large bias has an LSE of its size.
    torch.testing.assert_close(result.lse, expected_lse, rtol=1e-6, atol=LSE_DISTANCE)
    exact, exact_lse = dense(call)
    check(result.output, exact, call.value, recipe)
    check_lse(result.lse, exact_lse.float(), recipe)


def distance(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|; NaN must be in the same places."""
    assert torch.equal(actual.isnan(), expected.isnan())
    a, e = actual.double().nan_to_num(), expected.double().nan_to_num()
    norm = float(e.norm())
    return float((a - e).norm()) / norm if norm > 0 else float(a.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("recipe", "accumulator"), RECIPE_VARIANTS)
def test_the_whole_matrix(
    recipe: str, accumulator: Accumulator, head_dim: int, dtype: torch.dtype
) -> None:
    cells = itertools.product(LENGTHS, MASKS, ((1, 1), (2, 4)))
    for seed, ((query_length, key_length), mask_class, (kv_heads, group)) in enumerate(cells):
        call = make_call(
            query_length,
            key_length,
            head_dim,
            dtype,
            kv_heads=kv_heads,
            group=group,
            seed=seed,
            mask_class=mask_class,
        )
        assert_right(call, recipe, accumulator, seed=seed)


@pytest.mark.parametrize("head_dims", [(32, 32), (96, 96), (192, 192), (256, 256)], ids=str)
@pytest.mark.parametrize("recipe", ["int4_fp8", "int8_fp8", "int4_fp16", "int8_fp16"])
def test_other_head_dims(recipe: str, head_dims: tuple[int, int]) -> None:
    """And what is filled up to them, with an odd one."""
    largest = head_dims[0]
    for seed, smaller in enumerate((0, 8, 15)):
        call = make_call(
            150,
            200,
            largest - smaller,
            torch.float16,
            value_dim=largest - smaller,
            seed=seed,
            group=2,
            mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT,
        )
        assert_right(call, recipe, Accumulator.FP32, seed=seed)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 128), (128, 40), (192, 128), (64, 256)])
def test_another_head_dim_of_v(head_dim: int, value_dim: int) -> None:
    call = make_call(130, 200, head_dim, torch.bfloat16, value_dim=value_dim)
    for recipe in ("int4_fp16", "int8_fp8"):
        assert_right(call, recipe, Accumulator.FP32)


@pytest.mark.parametrize("recipe", ["int8_fp8", "int4_fp16"])
@pytest.mark.parametrize(
    ("left", "right"), [(0, 0), (20, 5), (-1, 3), (3, -1), (100, 0), (0, 300), (500, 500)]
)
def test_windows(recipe: str, left: int, right: int) -> None:
    for mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT):
        for query_length, key_length in ((150, 150), (100, 333), (300, 100)):
            call = make_call(
                query_length,
                key_length,
                64,
                torch.float16,
                mask_class=mask_class,
                window_left=left,
                window_right=right,
                sinks=query_length == 300,
            )
            assert_right(call, recipe, Accumulator.FP32)


@pytest.mark.parametrize("recipe", ["int8_fp8", "int4_fp16"])
@pytest.mark.parametrize("softcap", [1e-40, 1e-3, 5.0, 50.0, 1e9, 1e38])
def test_softcap(recipe: str, softcap: float) -> None:
    for mask_class in MASKS:
        for scale in (None, -0.2):
            call = make_call(
                130, 100, 64, torch.float16, mask_class=mask_class, scale=scale, softcap=softcap
            )
            assert_right(call, recipe, Accumulator.FP32)


def test_sinks() -> None:
    """Of ordinary size, far above and below the scores, none, infinite; and in dead rows."""
    for recipe in ("int8_fp8", "int4_fp16"):
        call = make_call(
            200,
            100,
            64,
            torch.float16,
            kv_heads=5,
            sinks=True,
            mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT,
            dead_rows=DeadRows.NAN,
        )
        sinks = torch.tensor([0.5, 30.0, -80.0, -inf, 8.0])
        assert_right(dataclasses.replace(call, sinks=sinks), recipe, Accumulator.FP32)
        for sink in (inf, nan):
            result = attend(dataclasses.replace(call, sinks=torch.full((5,), sink)), recipe)
            assert result.output.isnan().all()
            assert result.lse is not None
            assert result.lse.isnan().all()
        call.query[:, :, 150:] = nan
        result = attend(dataclasses.replace(call, sinks=torch.full((5,), -inf)), recipe)
        assert result.lse is not None
        assert result.lse[:, :, 150:].isnan().all()


@pytest.mark.parametrize("recipe", ["int4_fp8", "int8_fp8", "int4_fp16", "int8_fp16"])
def test_float32(recipe: str) -> None:
    for head_dim in (64, 128, 72):
        call = make_call(130, 200, head_dim, torch.float32, mask_class=MaskClass.CAUSAL)
        assert_right(call, recipe, Accumulator.FP32)


def test_tiles_of_other_architectures() -> None:
    """16 rows a warp where the table has 32, and the other way round; other numbers of stages."""
    for recipe, rows, stages in itertools.product(("int8_fp16", "int4_fp8"), (16, 32), (2, 3, 4)):

        def change(kernels: Variant, rows: int = rows, stages: int = stages) -> Variant:
            attend = dataclasses.replace(kernels.attend, warp_rows=rows, stages=stages)
            return dataclasses.replace(kernels, attend=attend)

        call = make_call(150, 400, 64, torch.float16, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT)
        assert_right(call, recipe, Accumulator.FP32, change=change)


def random_call(seed: int) -> tuple[Call, str, Accumulator]:
    """Any call that the kernels take: layouts, batches, groups, scales, dead rows."""
    rng = random.Random(seed)
    recipe, accumulator = rng.choice(RECIPE_VARIANTS)
    head_dim = rng.choice((64, 128))
    mask_class = rng.choice((*MASKS, *MaskClass))
    windowed = mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)
    call = make_call(
        rng.randint(1, 280),
        rng.randint(1, 280),
        head_dim - rng.choice((0, 0, 8, 24, 3)),
        rng.choice(DTYPES),
        batch=rng.randint(1, 2),
        kv_heads=rng.randint(1, 2),
        group=rng.choice((1, 2, 3)),
        seed=seed,
        value_dim=head_dim - rng.choice((0, 0, 16, 5)),
        sinks=rng.random() < 0.3,
        mask_class=mask_class,
        window_left=rng.choice((UNBOUNDED, 0, 3, 70)) if windowed else UNBOUNDED,
        window_right=rng.choice((UNBOUNDED, 0, 5, 70)) if windowed else UNBOUNDED,
        scale=rng.choice((None, None, 0.05, -0.1)),
        softcap=rng.choice((None, None, 20.0)),
        dead_rows=rng.choice(tuple(DeadRows)),
    )
    layouts = ("contiguous", "tokens_first", "expanded", "every_other")
    query, key, value = (
        laid_out(x, rng.choice(layouts)) for x in (call.query, call.key, call.value)
    )
    return dataclasses.replace(call, query=query, key=key, value=value), recipe, accumulator


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed: int) -> None:
    call, recipe, accumulator = random_call(seed)
    assert_right(call, recipe, accumulator, seed=seed)


@pytest.mark.parametrize("seed", range(60))
def test_random_calls_with_masks(seed: int) -> None:
    """Bool and float masks of any broadcast, over any band, with everything else."""
    call, recipe, accumulator = random_call(1000 + seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    full = (*call.query.shape[:3], call.key.shape[2])
    mask = random_mask(rng, generator, full)
    if mask.is_floating_point() and rng.random() < 0.5:
        mask = mask.clamp(min=torch.finfo(torch.float16).min).half()
    assert_right(dataclasses.replace(call, attn_mask=mask), recipe, accumulator, seed=seed)


@pytest.mark.parametrize("recipe", ["int8_fp8", "int4_fp16"])
def test_masks(recipe: str) -> None:
    """Tiles that are hidden whole, shown whole, and neither; rows that see nothing; garbage."""
    call = make_call(150, 200, 64, torch.float16, batch=2, kv_heads=2, group=2)
    shown = torch.ones(150, 200, dtype=torch.bool)
    shown[:, 64:128] = False
    shown[140:] = False
    shown[:70, 150:] = False
    padding = torch.arange(200) < torch.tensor([90, 170]).view(2, 1, 1, 1)
    low = torch.finfo(torch.float32).min
    for mask in (
        shown,
        padding,
        torch.zeros(150, 200).masked_fill(~shown, -inf),
        torch.zeros(2, 1, 1, 200).masked_fill(~padding, low),
        shown.expand(2, 4, 150, 200),
        shown.t().contiguous().t(),
    ):
        assert_right(dataclasses.replace(call, attn_mask=mask), recipe, Accumulator.FP32)
    # What padding hides may be anything.
    for x in (call.key, call.value):
        x[0, :, 90:], x[1, :, 170:] = nan, inf
    clean = [x.nan_to_num(0.0, 0.0) for x in (call.key, call.value)]
    results = [
        attend(Call(call.query, *kv, call.semantics, padding), recipe)
        for kv in (clean, (call.key, call.value))
    ]
    assert torch.equal(results[0].output, results[1].output)


@pytest.mark.parametrize(("recipe", "accumulator"), RECIPE_VARIANTS)
def test_what_does_not_count_is_clipped(recipe: str, accumulator: Accumulator) -> None:
    """Beside counted zeros, whose scale is the smallest there is, in V and in K."""
    call = make_call(64, 128, 64, torch.bfloat16)
    call.value[:, :, :50, 3], call.value[:, :, 50:, 3] = 0.0, 8.0
    call.key[:, :, :64] = 1.0
    call.key[:, :, 50:64] = 9.0
    mask = torch.zeros(64, 128)
    mask[:, 50:64] = torch.finfo(torch.float32).min
    assert_right(dataclasses.replace(call, attn_mask=mask), recipe, accumulator)


MASK_KINDS = (torch.bool, torch.float16, torch.bfloat16, torch.float32)


def mask_elements(head_dim: int, kind: torch.dtype, layout: str) -> Call:
    """A call whose mask is in pairs of neighbours, or not: with rows of an odd length, from an odd
    element on, or with neighbours apart. A tile is whole, another one ends with the keys."""
    call = make_call(70, 127, head_dim, torch.float16, group=2, seed=head_dim)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(1, 2, 70, 127, generator=generator)
    mask = drawn > -0.5
    if kind is not torch.bool:
        mask = drawn.masked_fill(~mask, torch.finfo(kind).min).to(kind)
    if layout == "padding":
        return dataclasses.replace(call, attn_mask=mask[:, :1, :1])
    begin, head, query, key = {
        "pairs": (0, 70 * 128, 128, 1),
        "odd rows": (0, 70 * 127, 127, 1),
        "odd begin": (1, 70 * 128, 128, 1),
        "apart": (0, 70 * 254, 254, 2),
        "turned": (0, 70 * 127, 1, 70),
    }[layout]
    # Behind the last element there is nothing.
    memory = torch.zeros(begin + head + 69 * query + 126 * key + 1, dtype=kind)
    placed = memory.as_strided(mask.shape, (2 * head, head, query, key), begin).copy_(mask)
    return dataclasses.replace(call, attn_mask=placed)


@pytest.mark.parametrize("layout", ["pairs", "odd rows", "odd begin", "apart", "turned", "padding"])
@pytest.mark.parametrize("head_dim", [64, 96], ids=["where it is applied", "ahead"])
def test_elements_of_masks(head_dim: int, layout: str) -> None:
    for kind in MASK_KINDS:
        assert_right(mask_elements(head_dim, kind, layout), "int8_fp16", Accumulator.FP32)


@pytest.mark.parametrize(
    ("layout", "kind", "old", "new"),
    [
        ("odd begin", torch.bool, "% (2 * bytes) == 0", ">= 0"),
        ("odd rows", torch.float16, "mask.query_stride) % 2 == 0", "0) % 2 == 0"),
        ("apart", torch.float32, "mask.key_stride == 1 &&", ""),
        ("turned", torch.bfloat16, "row + key * mask.key_stride", "row + key"),
        ("apart", torch.float16, "low + mask.key_stride * bytes", "low + bytes"),
        (
            "apart",
            torch.bfloat16,
            "? arch::unpack_bfloat16(pair[0])",
            "? arch::unpack_half(pair[0])",
        ),
        ("pairs", torch.float16, "pairs + atom * 4", "pairs + atom"),
        ("pairs", torch.bool, ">> 8 * i & 0xff", "& 0xff"),
        ("pairs", torch.float16, "natural.y * kLog2E", "natural.x * kLog2E"),
        ("pairs", torch.float32, "words[1] = arch::bits(pair.y)", "words[1] = words[0]"),
        ("pairs", torch.float32, "* 8 + 1 < key_length", "* 8 < key_length + 1"),
        ("odd rows", torch.bool, "if (exist[1])", ""),
        ("odd rows", torch.bfloat16, "<< 8 * bytes", "<< 8"),
    ],
)
def test_broken_elements_are_noticed(layout: str, kind: torch.dtype, old: str, new: str) -> None:
    loader = broken("attend", replacing(old, new), "mask_row")
    # DriverError: what is read outside of the mask, or across its alignment, ends the launch.
    with pytest.raises((AssertionError, DriverError)):
        for head_dim in (64, 96):
            call = mask_elements(head_dim, kind, layout)
            assert_right(call, "int8_fp16", Accumulator.FP32, kernels=loader)


def test_hidden_tiles_are_not_read() -> None:
    """With keys in one tile only, no other is copied or computed."""
    call = make_call(128, 256, 64, torch.float16)
    mask = torch.zeros(128, 256, dtype=torch.bool)
    mask[:, 64:128] = True
    masked = attend(dataclasses.replace(call, attn_mask=mask), "int8_fp16")
    alone = dataclasses.replace(call, key=call.key[:, :, 64:128], value=call.value[:, :, 64:128])
    assert torch.equal(masked.output, attend(alone, "int8_fp16").output)
    assert masked.call.mask is not None
    assert masked.call.mask.tiles.flatten().tolist() == [0, 1, 0, 0]


def test_the_order_of_threads_does_not_matter() -> None:
    """Bit by bit: a result that depends on it is a race."""
    call = make_call(130, 200, 64, torch.float16)
    for recipe in ("int4_fp8", "int8_fp16"):
        first = attend(call, recipe, seed=0)
        for seed in range(1, 6):
            again = attend(call, recipe, seed=seed)
            assert torch.equal(first.output, again.output)
            assert first.lse is not None and again.lse is not None
            assert torch.equal(first.lse, again.lse)


def test_a_scale_of_zero_and_zeros() -> None:
    for recipe in ("int8_fp16", "int4_fp8"):
        call = make_call(70, 90, 64, torch.float16, scale=0.0, mask_class=MaskClass.CAUSAL)
        assert_right(call, recipe, Accumulator.FP32)
        zeros = [torch.zeros_like(x) for x in (call.query, call.key, call.value)]
        result = attend(Call(*zeros, Semantics()), recipe)
        assert torch.equal(result.output, zeros[0])
        assert result.lse is not None
        torch.testing.assert_close(result.lse, torch.full_like(result.lse, log(90)))


@pytest.mark.parametrize(("recipe", "accumulator"), RECIPE_VARIANTS)
def test_large_values_stay_finite(recipe: str, accumulator: Accumulator) -> None:
    """V near the top of float16, and of bfloat16 far above it, in an accumulator of 16 bits too."""
    for dtype, size in ((torch.float16, 6e4), (torch.bfloat16, 1e30)):
        call = make_call(64, 128, 64, dtype)
        value = torch.full_like(call.value, size)
        result = attend(dataclasses.replace(call, value=value), recipe, accumulator)
        torch.testing.assert_close(result.output, value[:, :, :64], rtol=4e-2, atol=0)


@pytest.mark.parametrize("recipe", ["int4_fp8", "int8_fp8", "int4_fp16", "int8_fp16"])
def test_large_scores(recipe: str) -> None:
    """Up to where the last bit of a score is worth many powers of two: attention to one key.

    Rows where two scores are nearly equal may go either way; the others agree.
    """
    for size in (30.0, 300.0, 1e4):
        call = make_call(64, 128, 64, torch.bfloat16)
        call = dataclasses.replace(call, query=call.query * size, key=call.key * size)
        result = attend(call, recipe)
        expected, lse = reference.attention(
            call.query, call.key, call.value, RECIPES[recipe], call.semantics
        )
        wrong = (result.output - expected).float().norm(dim=-1) > 0.02 * expected.float().norm(
            dim=-1
        )
        assert wrong.float().mean() < 0.1
        norms = result.output.float().norm(dim=-1) / expected.float().norm(dim=-1)
        assert (norms > 0.5).all()
        assert result.lse is not None
        torch.testing.assert_close(result.lse, lse, rtol=1e-3, atol=0)


def test_the_end_of_the_range() -> None:
    """The rounded P may sum to more than 1; an average of finite values is finite all the same."""
    for recipe, accumulator in RECIPE_VARIANTS:
        call = make_call(64, 128, 64, torch.float16)
        value = torch.full_like(call.value, torch.finfo(torch.float16).max)
        call = dataclasses.replace(call, value=value)
        if recipe.endswith("fp8"):
            assert attend(call, recipe, accumulator).output.isfinite().all()
    call = make_call(64, 128, 64, torch.bfloat16)
    value = torch.full_like(call.value, 2e38)
    result = attend(dataclasses.replace(call, value=value), "int8_fp8", Accumulator.FP16)
    torch.testing.assert_close(result.output, value[:, :, :64], rtol=4e-2, atol=0)


def test_dead_rows_beside_what_is_not_finite() -> None:
    """A row without keys is zeros, and its LSE -inf, whatever others of its group are."""
    for recipe in ("int8_fp8", "int4_fp16"):
        call = make_call(100, 90, 64, torch.float16, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT)
        for name in ("query", "key"):
            poisoned = getattr(call, name).clone()
            poisoned[0, 0, 17, 5] = nan
            result = attend(dataclasses.replace(call, **{name: poisoned}), recipe)
            assert not result.output[:, :, :10].any()
            assert result.lse is not None
            assert (result.lse[:, :, :10] == -inf).all()


def test_what_nobody_sees_has_no_effect() -> None:
    """Keys after the last query, queries before the first key: NaN there is bitwise as zero."""
    for recipe in ("int4_fp8", "int8_fp16"):
        call = make_call(100, 150, 64, torch.bfloat16, mask_class=MaskClass.CAUSAL)
        clean = [call.key.clone(), call.value.clone()]
        for x in clean:
            x[:, :, 100:] = 0.0
        dirty = [call.key.clone(), call.value.clone()]
        for x in dirty:
            x[:, :, 100:] = nan
        results = [attend(Call(call.query, *kv, call.semantics), recipe) for kv in (clean, dirty)]
        assert torch.equal(results[0].output, results[1].output)
        assert not results[1].output.isnan().any()

        call = make_call(100, 40, 64, torch.bfloat16, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT)
        queries = [call.query.clone(), call.query.clone()]
        queries[0][:, :, :60], queries[1][:, :, :60] = 0.0, inf
        results = [attend(dataclasses.replace(call, query=query), recipe) for query in queries]
        assert torch.equal(results[0].output, results[1].output)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("what", [nan, inf])
def test_what_is_not_finite_is_seen(where: str, what: float) -> None:
    """NaN in all that it has a part in, as docs/numerics.md has it, never a plausible number."""
    reached = {"query": (0, 0, 17), "key": (0, 0), "value": (0, 0, slice(None), 5)}
    for recipe, accumulator in RECIPE_VARIANTS:
        call = make_call(70, 100, 64, torch.bfloat16)
        poisoned = getattr(call, where).clone()
        poisoned[0, 0, 17, 5] = what
        call = dataclasses.replace(call, **{where: poisoned})
        result = attend(call, recipe, accumulator)
        assert result.output[reached[where]].isnan().all()


def test_positions_beyond_32_bits() -> None:
    """Offsets above 2**31 elements, and above 2**32 bytes: memory that is mostly never touched."""
    call = make_call(5, 6, 64, torch.float16)
    stride = (1 << 31) // 5 + 64
    assert stride * 5 > 1 << 31

    def far_apart(x: Tensor) -> Tensor:
        length = x.shape[2]
        memory = torch.empty(stride * (length - 1) + 64, dtype=x.dtype)
        spread = memory.as_strided((1, 1, length, 64), (0, 0, stride, 1))
        return spread.copy_(x)

    try:
        spread = [far_apart(x) for x in (call.query, call.key, call.value)]
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    near = attend(call, "int8_fp16")
    assert torch.equal(attend(Call(*spread, call.semantics), "int8_fp16").output, near.output)


# --- what must fail ---------------------------------------------------------------------------

CAUSAL = make_call(150, 333, 64, torch.float16, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT)
DEAD_BLOCK = make_call(300, 130, 64, torch.float16, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT)
PREFETCH = "if (tile + kStages - 1 < end_tile_ &&"  # what follows the barrier of a tile
MANY_BLOCKS = make_call(150, 100, 64, torch.float16, group=6)  # 12 rows of means


@pytest.mark.parametrize(
    ("kind", "old", "new", "call", "words"),
    [
        ("attend", "arch::copy_async_wait<kStages - 2>();", "", CAUSAL, "in flight"),
        (
            "attend",
            "arch::copy_async_wait<0>(); sum_up_totals();",
            "sum_up_totals();",
            DEAD_BLOCK,
            "in flight",
        ),
        ("attend", f"arch::barrier(); {PREFETCH}", PREFETCH, CAUSAL, "race"),
        (
            "attend",
            f"arch::barrier(); {PREFETCH}",
            f"if (arch::thread_index() < 64) arch::barrier(); {PREFETCH}",
            CAUSAL,
            "barrier",
        ),
        ("statistics", "if (kSlices > 1) arch::barrier();", "", CAUSAL, "race"),
        ("value", "arch::barrier();", "", CAUSAL, "race"),
    ],
)
def test_broken_synchronization_is_reported(
    kind: str, old: str, new: str, call: Call, words: str
) -> None:
    loader = broken(kind, replacing(old, new))
    with pytest.raises(DriverError):
        attend(call, "int8_fp8", kernels=loader)
    assert words in emulation.the_host().message()


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        # a scale of the wrong rows, of the wrong columns, of the wrong channel
        ("attend/query_rows", "query % kQueryGroups;", "0;"),
        ("attend", "load_shared(key_scales + column / 2)", "load_shared(key_scales)"),
        ("value", "at.channel + i, scale[i]", "at.channel + i, scale[0]"),
        # one key more than there are, and one fewer than the diagonal shows
        ("attend", "? key : end;", "? key : end + 1;"),
        ("attend", "query + static_cast<int>(p_.upper) + 1", "query + static_cast<int>(p_.upper)"),
        # sums not made relative to the new maximum
        ("attend", "arch::fma(total_[band][half], decay[band][half], total)", "total"),
        # tokens of V in the order of memory
        ("value", "at_token(column, token + 8)", "at_token(column, token + 2)"),
        # K not smoothed; a scale from a part of its group
        ("key", "key[t][i] - mean[i]", "key[t][i]"),
        (
            "key",
            "largest = larger(largest, arch::load_shared(amax + group * kParts + other));",
            "largest = arch::load_shared(amax + group * kParts);",
        ),
        (
            "query",
            "largest = larger(largest, arch::load_shared(amax + index));",
            "largest = arch::load_shared(amax + index);",
        ),
    ],
)
def test_broken_numerics_are_noticed(kind: str, old: str, new: str) -> None:
    kind, *headers = kind.split("/")
    loader = broken(kind, replacing(old, new), *headers)
    with pytest.raises(AssertionError):
        assert_right(CAUSAL, "int8_fp8", Accumulator.FP32, kernels=loader)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("query", "live ? x[i] - mean[i] : 0.0f", "live ? x[i] : 0.0f"),
        ("key", "of_low[2 * step], of_high[2 * step]", "of_low[2 * step], of_low[2 * step]"),
        ("attend", "fma(x[atom][1], scale, of_keys.y)", "fma(x[atom][1], scale, of_keys.x)"),
    ],
)
def test_broken_smoothing_is_noticed(kind: str, old: str, new: str) -> None:
    loader = broken(kind, replacing(old, new))
    with pytest.raises(AssertionError):
        assert_right(MANY_BLOCKS, "int4_fp16", Accumulator.FP32, kernels=loader)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("attend", "if (mixed) apply_mask(x, mask[band][half], band, half, tile);", ""),
        ("attend", "if (shows(shown, 0)) {", "if ((shown & 3) == kMixed) {"),
        ("attend", "shown = (shown | further) >> 2;", "shown = shown | further;"),
        ("attend", "<< 2 * kStages : 0", "<< 2 * (kStages - 1) : 0"),
        ("attend", "capped(x[atom][i] + row_term)", "x[atom][i] * kLog2E"),
        ("attend", "if (p_.sinks != nullptr) end", "if (false) end"),
        ("statistics", "seen & kCounts ? sum + x : sum", "sum + x"),
        ("key", "counted_keys(p.counts, head, p.first_key, p.end_key)", "100.0f"),
        ("query", "seen.of(token(t)) != 0", "true"),
    ],
)
def test_a_mask_softcap_or_sink_left_out_is_noticed(kind: str, old: str, new: str) -> None:
    """Whole tiles hidden, shown and mixed, rows that see nothing, keys that do not count."""
    call = make_call(200, 320, 64, torch.float16, softcap=3.0, sinks=True)
    mask = torch.zeros(200, 320)
    mask[:, 64:128] = -inf
    mask[:, 300:] = -1e4
    mask[::3, 130:190] = -2.0
    mask[150:180] = -inf
    # Before the first query that sees a key, what is read counts too unless the flags are heeded.
    call.query[:, :, 150:180] = 50.0
    call.key[:, :, 300:] = 20.0
    call = dataclasses.replace(call, attn_mask=mask)
    assert_right(call, "int4_fp16", Accumulator.FP32)
    loader = broken(kind, replacing(old, new))
    # DriverError: what is read outside of the tensors ends the launch.
    with pytest.raises((AssertionError, DriverError)):
        assert_right(call, "int4_fp16", Accumulator.FP32, kernels=loader)
