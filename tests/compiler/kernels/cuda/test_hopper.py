"""The attention kernel of wgmma, executed on the CPU, against the reference and against float64."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels import reference
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.driver import DriverError
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.sizes import Sizes
from sage_compiler.kernels.cuda.spec import HopperAttendSpec
from sage_compiler.kernels.cuda.variants import variant
from sage_compiler.precision import Accumulator
from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass
from tests.compiler.kernels.cuda import emulation
from tests.compiler.kernels.cuda.emulation import broken, named, replacing
from tests.compiler.kernels.cuda.test_attention import (
    DISTANCE,
    LENGTHS,
    LSE_DISTANCE,
    MASKS,
    distance,
    make_call,
)
from tests.compiler.kernels.dense import Call, dense, laid_out, random_mask
from tests.cutlass_templates import host
from tests.tolerances import check, check_lse

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

ARCH = "sm_90a"
RECIPE = "int8_fp8"
DTYPES = {64: torch.float16, 128: torch.bfloat16}  # one each: the epilogue alone depends on it


def attend(call: Call, **options: object) -> emulation.Result:
    return emulation.attend(call, RECIPE, arch=ARCH, **options)  # type: ignore[arg-type]


def tiles_of(call: Call) -> int:
    """Blocks of keys that the kernel of a call takes in one step."""
    attend = variant(
        ARCH,
        str(call.query.dtype).removeprefix("torch."),
        call.query.shape[3],
        RECIPE,
        value_head_dim=call.value.shape[3],
        window=call.semantics.window_left != UNBOUNDED,
        masked=call.attn_mask is not None,
        softcap=kernel.has_softcap(call.semantics),
    ).attend
    assert isinstance(attend, HopperAttendSpec)
    return attend.tiles


def assert_right(call: Call, **options: object) -> None:
    """As the reference within rounding, and as float64 within the recipe's tolerance."""
    result = assert_close_to_reference(call, **options)
    assert result.lse is not None
    exact, exact_lse = dense(call)
    check(result.output, exact, call.value, RECIPE)
    check_lse(result.lse, exact_lse.float(), RECIPE)


def assert_close_to_reference(call: Call, **options: object) -> emulation.Result:
    """As the reference within rounding."""
    result = attend(call, **options)
    assert result.lse is not None
    expected, expected_lse = reference.attention(
        call.query,
        call.key,
        call.value,
        named(RECIPE, Accumulator.FP32, tiles_of(call)),
        call.semantics,
        attn_mask=call.attn_mask,
        sinks=call.sinks,
    )
    assert distance(result.output, expected) <= DISTANCE["int8"]
    torch.testing.assert_close(result.lse, expected_lse, rtol=1e-6, atol=LSE_DISTANCE)
    return result


@pytest.mark.parametrize("head_dim", DTYPES)
def test_the_whole_matrix(head_dim: int) -> None:
    cells = itertools.product(LENGTHS, MASKS, ((1, 1), (2, 4)))
    for seed, ((query_length, key_length), mask_class, (kv_heads, group)) in enumerate(cells):
        call = make_call(
            query_length,
            key_length,
            head_dim,
            DTYPES[head_dim],
            kv_heads=kv_heads,
            group=group,
            seed=seed,
            mask_class=mask_class,
        )
        assert_right(call, seed=seed)


@pytest.mark.parametrize("head_dim", DTYPES)
def test_rings_that_go_round(head_dim: int) -> None:
    """More steps than stages, an odd number of tiles, a tail."""
    for seed, key_length in enumerate((512, 1000, 1100)):
        call = make_call(128, key_length, head_dim, DTYPES[head_dim], seed=seed)
        assert_right(call, seed=seed)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(32, 32), (96, 96), (192, 192), (256, 256), (72, 51), (192, 128), (64, 256)],
)
def test_other_head_dims(head_dim: int, value_dim: int) -> None:
    call = make_call(
        150,
        400,
        head_dim,
        torch.float16,
        value_dim=value_dim,
        group=2,
        mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT,
    )
    assert_right(call)


def test_float32() -> None:
    assert_right(make_call(130, 200, 64, torch.float32, mask_class=MaskClass.CAUSAL))


@pytest.mark.parametrize(
    ("left", "right"), [(0, 0), (20, 5), (-1, 3), (3, -1), (100, 0), (0, 300), (500, 500)]
)
def test_windows(left: int, right: int) -> None:
    for mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT):
        for query_length, key_length in ((150, 150), (100, 700), (400, 100)):
            call = make_call(
                query_length,
                key_length,
                64,
                torch.float16,
                mask_class=mask_class,
                window_left=left,
                window_right=right,
                sinks=query_length == 400,
            )
            assert_right(call)


@pytest.mark.parametrize("softcap", [1e-3, 5.0, 1e9])
def test_softcap(softcap: float) -> None:
    for mask_class in MASKS:
        call = make_call(
            130, 300, 64, torch.float16, mask_class=mask_class, scale=-0.2, softcap=softcap
        )
        assert_right(call)


@pytest.mark.parametrize("head_dim", DTYPES)
def test_masks(head_dim: int) -> None:
    """Tiles that are hidden whole, shown whole, and neither; rows that see nothing; garbage."""
    call = make_call(150, 300, head_dim, DTYPES[head_dim], batch=2, kv_heads=2, group=2)
    shown = torch.ones(150, 300, dtype=torch.bool)
    shown[:, 64:256] = False
    shown[140:] = False
    shown[:70, 150:] = False
    padding = torch.arange(300) < torch.tensor([90, 170]).view(2, 1, 1, 1)
    for mask in (
        shown,
        padding,
        torch.zeros(150, 300).masked_fill(~shown, -torch.inf),
        shown.t().contiguous().t(),
        torch.zeros(150, 300, dtype=torch.bool),
    ):
        assert_right(dataclasses.replace(call, attn_mask=mask))
    # What padding hides may be anything.
    for x in (call.key, call.value):
        x[0, :, 90:], x[1, :, 170:] = torch.nan, torch.inf
    clean = [x.nan_to_num(0.0, 0.0) for x in (call.key, call.value)]
    results = [
        attend(Call(call.query, *kv, call.semantics, padding))
        for kv in (clean, (call.key, call.value))
    ]
    assert torch.equal(results[0].output, results[1].output)


def random_call(seed: int) -> Call:
    """Any call of a few kernels: layouts, batches, groups, scales, dead rows."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    head_dim = rng.choice((64, 128))
    everything = head_dim == 64 and rng.random() < 0.5  # window, softcap and mask
    call = make_call(
        rng.randint(1, 280),
        rng.randint(1, 700),
        head_dim - rng.choice((0, 0, 8, 3)),
        DTYPES[head_dim],
        batch=rng.randint(1, 2),
        kv_heads=rng.randint(1, 2),
        group=rng.choice((1, 2, 3)),
        seed=seed,
        value_dim=head_dim - rng.choice((0, 0, 16, 5)),
        sinks=rng.random() < 0.3,
        mask_class=MaskClass.WINDOW_BOTTOM_RIGHT if everything else rng.choice(MASKS),
        window_left=rng.choice((0, 3, 70, 300)) if everything else UNBOUNDED,
        window_right=rng.choice((UNBOUNDED, 0, 5, 70)) if everything else UNBOUNDED,
        scale=rng.choice((None, None, 0.05, -0.1)),
        softcap=20.0 if everything else None,
        dead_rows=rng.choice(tuple(DeadRows)),
    )
    layouts = ("contiguous", "tokens_first", "expanded", "every_other")
    query, key, value = (
        laid_out(x, rng.choice(layouts)) for x in (call.query, call.key, call.value)
    )
    mask: Tensor | None = None
    if everything:
        mask = random_mask(rng, generator, (*call.query.shape[:3], call.key.shape[2]))
    return dataclasses.replace(call, query=query, key=key, value=value, attn_mask=mask)


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed: int) -> None:
    assert_right(random_call(seed), seed=seed)


def test_the_order_of_threads_does_not_matter() -> None:
    """Bit by bit: a result that depends on it is a race."""
    call = make_call(130, 700, 64, torch.float16)
    first = attend(call, seed=0)
    for seed in range(1, 6):
        again = attend(call, seed=seed)
        assert torch.equal(first.output, again.output)
        assert first.lse is not None and again.lse is not None
        assert torch.equal(first.lse, again.lse)


@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_a_persistent_grid(head_dim: int) -> None:
    """Blocks that have several tasks, or one; bit by bit what a block for each task makes."""
    dtype = torch.bfloat16
    call = make_call(
        400, 700, head_dim, dtype, group=3, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT, batch=2
    )
    alone = assert_close_to_reference(call)
    assert alone.lse is not None
    for blocks in (1, 2, 5):
        result = attend(call, seed=blocks, multiprocessors=blocks)
        assert emulation.the_host().launches()[-1]["grid"] == blocks
        assert torch.equal(result.output, alone.output)
        assert result.lse is not None and torch.equal(result.lse, alone.lse)


def test_tasks_without_steps() -> None:
    """Query blocks that see nothing, before, between and behind those that do."""
    call = make_call(500, 300, 64, torch.float16, kv_heads=2, sinks=True)
    shown = torch.ones(500, 300, dtype=torch.bool)
    shown[128:256], shown[384:] = False, False
    masked = dataclasses.replace(call, attn_mask=shown)
    first_rows = make_call(
        500, 200, 64, torch.float16, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT, kv_heads=2
    )
    for each in (masked, first_rows):
        assert_right(each, multiprocessors=1)


def test_heads_are_worked_on_together() -> None:
    """No more than fit into a cache, evenly, whole groups, at least one; a table of cases."""
    attend = variant(ARCH, "bfloat16", 128, RECIPE).attend
    for batch, kv_heads, group, keys, expected in (
        (1, 2, 1, 64, 2),
        (1, 8, 4, 1024, 32),
        (4, 8, 4, 16384, 3 * 4),  # of 4 MB and some
        (1, 32, 1, 4096, 11),  # not 15, 15 and 2
        (1, 8, 4, 1 << 20, 4),
    ):
        sizes = Sizes.of(batch, group * kv_heads, kv_heads, 100, keys)
        assert sizes.heads_at_once(attend) == expected


def test_extreme_scores() -> None:
    """Scores of thousands, whose last bit is worth much; zeros; what is not finite."""
    call = make_call(130, 300, 64, torch.float16, scale=400.0)
    assert_close_to_reference(call)
    zeros = [torch.zeros_like(x) for x in (call.query, call.key, call.value)]
    assert torch.equal(attend(Call(*zeros, call.semantics)).output, zeros[0])
    call.value[0, 0, 5, 3] = torch.inf
    output = attend(call).output
    assert output[..., 3].isnan().all() and not output[..., 4:].isnan().any()


def test_a_head_dim_has_the_tiles_that_were_proved() -> None:
    """Those above; also that every geometry fits into shared memory."""
    for head_dim, value_dim in itertools.product((32, 64, 96, 128, 192, 256), repeat=2):
        for masked in (False, True):
            kernels = variant(
                ARCH, "bfloat16", head_dim, RECIPE, value_head_dim=value_dim, masked=masked
            )
            longest = max(head_dim, value_dim)
            assert isinstance(kernels.attend, HopperAttendSpec)
            few = longest > 128 or (masked and longest > 64)
            assert (kernels.attend.tiles, kernels.attend.stages) == (1 if few else 2, 4)
            assert kernels.attend.shared_bytes <= ARCHS[ARCH].shared_bytes
            assert kernels.query.panels and kernels.key.panels and kernels.value.panels


# Each is a change of the kernel, what finds it (a check of the executor, or None where the numbers
# are wrong), and the header that is changed.
TEMPLATE, PRODUCER = "attend_hopper", "hopper_producer"
TASK, MEMORY = "hopper_task", "hopper_memory"
DEAL = "hopper_deal"
FAULTS: dict[str, tuple[Callable[[str], str], str | None, str]] = {
    "a stage is never given back": (
        replacing(
            "arch::mbarrier_arrive_warp(Memory::value_empty(place.stage()));",
            "if (arch::thread_index() != 32) "
            "arch::mbarrier_arrive_warp(Memory::value_empty(place.stage()));",
        ),
        "deadlock|divergent",
        TEMPLATE,
    ),
    "the producer waits for the wrong phase": (
        replacing(
            "arch::mbarrier_wait(Memory::key_empty(place.stage()), place.parity() ^ 1);",
            "arch::mbarrier_wait(Memory::key_empty(place.stage()), place.parity());",
        ),
        "deadlock",
        PRODUCER,
    ),
    "the producer does not wait": (
        replacing(
            "arch::mbarrier_wait(Memory::value_empty(place.stage()), place.parity() ^ 1);", ""
        ),
        "race between copy_bulk|all 1 arrivals|mbarrier_arrive",
        PRODUCER,
    ),
    "consumers do not wait for K": (
        replacing("arch::mbarrier_wait(Memory::key_full(place.stage()), place.parity());", ""),
        "race between (load_shared|wgmma|copy_bulk)",
        TEMPLATE,
    ),
    "consumers do not wait for V": (
        replacing(
            "if (part == 0) "
            "arch::mbarrier_wait(Memory::value_full(place.stage()), place.parity());",
            "",
        ),
        "race between (wgmma|copy_bulk)",
        TEMPLATE,
    ),
    "consumers do not wait for Q": (
        replacing(
            "arch::mbarrier_wait(Memory::query_full(queries.stage()), queries.parity()); "
            "int const place",
            "int const place",
        ),
        "race between (load_shared|store_shared)|outside of the memory",  # a task that is garbage
        TEMPLATE,
    ),
    "fewer bytes are expected than come": (
        replacing("kKeyBytes = Key::kBytes + kTiles * kScaleBytes", "kKeyBytes = Key::kBytes"),
        "bytes|mbarrier",
        MEMORY,
    ),
    "scores are used before they are there": (
        replacing("arch::wgmma_wait<1>();", "arch::wgmma_wait<2>();"),
        "accumulators were written",
        TEMPLATE,
    ),
    "V is given back before it was read": (
        replacing(
            "Stages const& place) { SAGE_UNROLL for (int part = 0;",
            "Stages const& place) { "
            "arch::mbarrier_arrive_warp(Memory::value_empty(place.stage())); "
            "SAGE_UNROLL for (int part = 0;",
        ),
        "a product of wgmma|race between copy_bulk|all 8 arrivals|lands in phase|mbarrier_arrive",
        TEMPLATE,
    ),
    "P is packed while it is read": (
        replacing(
            "end_product(product, decay, place.before()); pack(scores, 0);",
            "pack(scores, 0); end_product(product, decay, place.before());",
        ),
        "operand A's registers were written",
        TEMPLATE,
    ),
    "no fence": (
        replacing("arch::wgmma_hold(scores); arch::wgmma_fence();", ""),
        "no wgmma_fence",
        TEMPLATE,
    ),
    "a swizzle of another width": (
        replacing("arch::matrix_rows<kKeyBlock>(Memory", "arch::matrix_rows<32>(Memory"),
        "descriptor has",
        TEMPLATE,
    ),
    "another thread's scale": (
        replacing(
            "(Memory::scales(place.stage(), i)) + first_column() / 2",
            "(Memory::scales(place.stage(), i))",
        ),
        None,
        TEMPLATE,
    ),
    "the scale of another tile": (
        replacing("query_scales_[of] * key_scales[i]", "query_scales_[of] * key_scales[0]"),
        None,
        TEMPLATE,
    ),
    "decay of another tile": (
        replacing(
            "end_product(product, decay, place.before());",
            "end_product(product, decay_, place.before());",
        ),
        None,
        TEMPLATE,
    ),
    "a key too many": (
        replacing(
            "task_->end_key(query(half)) - first - first_column();",
            "task_->end_key(query(half)) + 1 - first - first_column();",
        ),
        None,
        TEMPLATE,
    ),
    "a tile beyond the end": (
        replacing("(tile < last ? tile : last)", "tile"),
        "outside of the memory",
        TASK,
    ),
    "queries of the other warpgroup": (
        replacing("warpgroup_ * (kQueryBlock / 2 * Query::kWidth)", "0"),
        None,
        TEMPLATE,
    ),
    "too many registers": (
        replacing("kConsumerRegisters>();", "kConsumerRegisters + 8>();"),
        "setmaxnreg asks for",
        TEMPLATE,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_found(fault: str) -> None:
    change, found_by, header = FAULTS[fault]
    call = make_call(130, 1030, 64, torch.float16, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT)
    # The scales of a tile differ from those of the next.
    call.key[:, :, 64:128] *= 3
    assert_found(call, broken(TEMPLATE, change, header), found_by)


# The same of what blocks do between tasks.
FAULTS_BETWEEN_TASKS: dict[str, tuple[Callable[[str], str], str | None, str]] = {
    "the place of Q is taken before it is free": (
        replacing(
            "arch::mbarrier_wait(Memory::query_empty(place.stage()), place.parity() ^ 1);", ""
        ),
        "race between (store_shared|copy_bulk)|mbarrier_arrive",
        PRODUCER,
    ),
    "Q is given back before it was read": (
        replacing(
            "AttendHopper state(work.params(), task, warpgroup);",
            "AttendHopper state(work.params(), task, warpgroup); "
            "arch::mbarrier_arrive_warp(Memory::query_empty(place));",
        ),
        "race between|a product of wgmma|all 8 arrivals|mbarrier_arrive|deadlock",
        TEMPLATE,
    ),
    "a task is read after it was given back": (
        replacing(
            "Task const task(p_, arch::load_shared(Memory::task(query))); "
            "arch::mbarrier_arrive_warp(Memory::query_empty(query));",
            "arch::mbarrier_arrive_warp(Memory::query_empty(query)); "
            "Task const task(p_, arch::load_shared(Memory::task(query)));",
        ),
        "race between (load_shared|store_shared)",
        TEMPLATE,
    ),
    "a warp does not give a task back": (
        replacing(
            "arch::mbarrier_arrive_warp(Memory::query_empty(query));",
            "if (arch::thread_index() / 32 != 3) "
            "arch::mbarrier_arrive_warp(Memory::query_empty(query));",
        ),
        "deadlock",
        TEMPLATE,
    ),
    "consumers look for a task in the wrong phase": (
        replacing(
            "Memory::query_full(queries.stage()), queries.parity()); int const place",
            "Memory::query_full(queries.stage()), queries.parity() ^ 1); int const place",
        ),
        "race between (load_shared|store_shared)|outside of the memory",
        TEMPLATE,
    ),
    "Q has another number of bytes": (
        replacing(
            "arch::mbarrier_arrive_expect(Memory::query_full(place), kBytes);",
            "arch::mbarrier_arrive_expect(Memory::query_full(place), kBytes - 16);",
        ),
        "bytes",
        PRODUCER,
    ),
    "nobody says that there is no task": (
        replacing(
            "arch::store_shared(Memory::task(queries.stage()), Deal::kNone); "
            "arch::mbarrier_arrive(Memory::query_full(queries.stage()));",
            "",
        ),
        "deadlock",
        PRODUCER,
    ),
    "a task without steps is not announced": (
        replacing("} else { arch::mbarrier_arrive(Memory::query_full(queries.stage())); }", "}"),
        "deadlock",
        PRODUCER,
    ),
    "the ring begins again with each task": (
        replacing(
            "stages.turn = arch::warp_uniform(stages.turn); if constexpr",
            "stages.turn = 0; if constexpr",
        ),
        "race between|deadlock|all 8 arrivals|mbarrier_arrive",
        TEMPLATE,
    ),
    "a turn is not passed on": (
        replacing(
            "place.before()); pass_turn(warpgroup_);",
            "place.before()); if (tile != 2) pass_turn(warpgroup_);",
        ),
        "deadlock",
        TEMPLATE,
    ),
    "the first turn is nobody's": (
        replacing("if (warpgroup == 1) pass_turn(warpgroup);", ""),
        "deadlock",
        TEMPLATE,
    ),
    "a turn is passed on to who had it": (
        replacing(
            "arch::named_barrier_arrive<kConsumers>(2 - warpgroup);",
            "arch::named_barrier_arrive<kConsumers>(1 + warpgroup);",
        ),
        "deadlock",
        TEMPLATE,
    ),
    "a warpgroup waits at a barrier of its own": (
        replacing(
            "arch::named_barrier_sync<kConsumers>(1 + warpgroup);",
            "arch::named_barrier_sync<kConsumers>(3 + warpgroup);",
        ),
        "deadlock",
        TEMPLATE,
    ),
    "a turn of fewer threads": (
        replacing(
            "arch::named_barrier_arrive<kConsumers>(2 - warpgroup);",
            "arch::named_barrier_arrive<kWarpgroup>(2 - warpgroup);",
        ),
        "to which others came|deadlock",
        TEMPLATE,
    ),
    "a warpgroup does not wait for its turn": (
        replacing(
            "take_turn(warpgroup_); arch::wgmma_hold(scores);",
            "if (warpgroup_ == 0) take_turn(warpgroup_); arch::wgmma_hold(scores);",
        ),
        "it ends with 128 of 256 threads at named_barrier 2|deadlock",
        TEMPLATE,
    ),
    "the last turn is left over": (
        replacing("if (warpgroup == 0) take_turn(warpgroup);", ""),
        "it ends with 128 of 256 threads at named_barrier 1",
        TEMPLATE,
    ),
    "a task is left out": (
        replacing("arch::take_ticket(p.taken)", "2 * arch::take_ticket(p.taken)"),
        None,
        DEAL,
    ),
    "the last group has as many heads as all": (
        replacing(
            "Split const task(group.inner, left < heads ? left : heads);",
            "Split const task(group.inner, heads);",
        ),
        "outside of the memory",
        DEAL,
    ),
}


def call_of_several_tasks(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Of five heads, of which two are worked on at the same time; some tasks have no steps."""
    tile = variant(ARCH, "float16", 64, RECIPE).attend.tile
    monkeypatch.setattr("sage_compiler.kernels.cuda.sizes._CACHED_BYTES", 2 * 4 * tile.bytes)
    return make_call(
        400, 240, 64, torch.float16, kv_heads=5, mask_class=MaskClass.CAUSAL_BOTTOM_RIGHT
    )


def test_heads_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of_several_tasks(monkeypatch)
    results = [assert_close_to_reference(call, multiprocessors=n, seed=n) for n in (1, 4)]
    assert torch.equal(results[0].output, results[1].output)


@pytest.mark.parametrize("fault", FAULTS_BETWEEN_TASKS)
def test_a_fault_between_tasks_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, found_by, header = FAULTS_BETWEEN_TASKS[fault]
    call = call_of_several_tasks(monkeypatch)
    assert_found(call, broken(TEMPLATE, change, header), found_by, multiprocessors=1)


def test_a_counter_that_does_not_begin_at_zero_is_found() -> None:
    call = make_call(300, 200, 64, torch.float16)
    kernels = broken("query", replacing("arch::store_global(p.taken, 0u);", ""))
    assert_found(call, kernels, "must be zero before the launch", multiprocessors=1)


def assert_found(call: Call, kernels: Loader, found_by: str | None, **options: object) -> None:
    """A check of the executor fails, or where none can, the result is wrong."""
    if found_by is None:
        with pytest.raises(AssertionError):
            assert_close_to_reference(call, kernels=kernels, **options)
    else:
        with pytest.raises(DriverError):
            attend(call, kernels=kernels, **options)
        assert re.search(found_by, emulation.the_host().message())
