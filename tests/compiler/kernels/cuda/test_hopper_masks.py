"""Explicit masks in the kernel of wgmma, of which TMA copies tiles by tensor maps.

That changes no bit against reading the mask where it lies, as the kernel does where there can be no
map, and as test_hopper.py has it against the reference.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sage_compiler.kernels.cuda.driver import Driver
from sage_compiler.kernels.cuda.masks import Mask
from sage_compiler.kernels.cuda.spec import HopperAttendSpec, QueryTile
from sage_compiler.kernels.cuda.tensor_map import TensorMap
from sage_compiler.kernels.cuda.variants import cache_variant, variant
from sage_compiler.semantics import UNBOUNDED, MaskClass
from tests.compiler.kernels.cuda import emulation
from tests.compiler.kernels.cuda.emulation import WGMMA, broken, replacing
from tests.compiler.kernels.cuda.test_attention import make_call
from tests.compiler.kernels.cuda.test_hopper import (
    ARCH,
    RECIPE,
    assert_close_to_reference,
    assert_found,
    assert_right,
)
from tests.compiler.kernels.dense import Call
from tests.cutlass_templates import host

pytestmark = pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))

KINDS = (torch.bool, torch.float16, torch.bfloat16, torch.float32)


def some_mask(kind: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Of tiles that are hidden whole, shown whole, and neither, some keys of these hidden."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randint(0, 4, [-(-n // 64) for n in shape[-2:]], generator=generator)
    of_tile = tiles.repeat_interleave(64, 0).repeat_interleave(64, 1)[: shape[-2], : shape[-1]]
    shown = torch.rand(shape, generator=generator) < 0.7
    shown = torch.where(of_tile > 1, shown, of_tile == 1)
    if kind == torch.bool:
        return shown
    added = torch.randn(shape, generator=generator).masked_fill(of_tile <= 1, 0.0)
    return added.masked_fill(~shown, -torch.inf).to(kind)


def attend_both_ways(
    call: Call, monkeypatch: pytest.MonkeyPatch, **options: object
) -> tuple[emulation.Result, emulation.Result]:
    """By a tensor map, and where the driver makes none."""
    maps: list[bytes | None] = []

    def encode(driver: Driver, tensor: TensorMap) -> bytes | None:
        maps.append(real(driver, tensor))
        return maps[-1]

    real = Driver.encode
    with monkeypatch.context() as patched:
        patched.setattr(Driver, "encode", encode)
        copied = WGMMA.attend(call, **options)  # type: ignore[arg-type]
        assert len(maps) == 1 and maps[0] is not None
        patched.setattr(Driver, "encode", lambda driver, tensor: None)
        read = WGMMA.attend(call, **options)  # type: ignore[arg-type]
    return copied, read


def assert_same(copied: emulation.Result, read: emulation.Result) -> None:
    assert torch.equal(copied.output.nan_to_num(7.0), read.output.nan_to_num(7.0))
    assert copied.lse is not None and read.lse is not None
    assert torch.equal(copied.lse, read.lse)


@pytest.mark.parametrize(
    ("head_dim", "kind"),
    [
        *((64, kind) for kind in KINDS),
        (128, torch.bool),
        (192, torch.bool),
        (256, torch.float32),
    ],
    ids=str,
)
def test_a_copied_mask_changes_no_bit(
    head_dim: int, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any type, with what broadcasts and what does not; tails of queries and keys."""
    dtype = torch.float16 if head_dim == 64 else torch.bfloat16
    call = make_call(140, 336, head_dim, dtype, batch=2, group=2)
    for seed, shape in enumerate([(2, 2, 140, 336), (2, 140, 336), (2, 1, 1, 336)]):
        masked = dataclasses.replace(call, attn_mask=some_mask(kind, *shape, seed=seed))
        assert_same(*attend_both_ways(masked, monkeypatch, seed=seed))
        if seed == head_dim // 64 % 3:
            assert_right(masked, seed=seed)


def test_rows_that_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with something behind them, queries before heads, lengths that are no multiples."""
    call = make_call(130, 331, 64, torch.float16, kv_heads=2, group=2)
    whole = some_mask(torch.bool, 1, 130, 4, 352)
    for mask in (whole.transpose(1, 2)[..., :331], whole[0, :, 1, 16 : 16 + 331]):
        masked = dataclasses.replace(call, attn_mask=mask)
        assert_same(*attend_both_ways(masked, monkeypatch))
        assert_right(masked)


@pytest.mark.parametrize("seed", range(10))
def test_random_calls(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows and a softcap on top, one or more tasks for a block, keys split or not."""
    rng = random.Random(seed)
    batch, kv_heads, group = rng.randint(1, 2), rng.randint(1, 2), rng.choice((1, 2, 3))
    queries, keys = rng.randint(1, 300), rng.randint(2, 500)
    everything = seed % 2 == 1
    call = make_call(
        queries,
        keys,
        64,
        torch.float16,
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        seed=seed,
        sinks=rng.random() < 0.3,
        mask_class=MaskClass.WINDOW_BOTTOM_RIGHT if everything else MaskClass.NONE,
        window_left=rng.choice((3, 70, 300)) if everything else UNBOUNDED,
        softcap=20.0 if everything else None,
    )
    kind = rng.choice(KINDS)
    full = (batch, kv_heads * group, queries)
    rows = [rng.choice((1, length)) for length in full]
    mask = some_mask(kind, *rows, -(-keys // 16) * 16, seed=seed)[..., :keys]
    splits = rng.choice((1, 1, 3))
    options = {"seed": seed, "multiprocessors": rng.choice((1, 3, None)), "splits": splits}
    tile = QueryTile(split=splits > 1)
    masked = dataclasses.replace(call, attn_mask=mask)
    assert_same(*attend_both_ways(masked, monkeypatch, tile=tile, **options))


def mask_of(values: Tensor, heads: int = 1) -> Mask:
    return Mask.of(values, None, 1, heads, 1, 64, 96)


def test_which_masks_have_a_map() -> None:
    """Keys behind one another, and all else at multiples of 16 bytes."""
    plain = torch.ones(64, 96, dtype=torch.bool)
    found = mask_of(plain).boxes()
    assert found is not None
    assert (found.sizes, found.strides, found.box) == (
        (1, 1, 64, 96),
        (96, 96, 96),
        (1, 1, 128, 64),
    )
    padding = mask_of(torch.zeros(1, 1, 1, 96)).boxes()
    assert padding is not None and padding.box == (1, 1, 1, 32)
    wider = torch.ones(64, 200, dtype=torch.bool)
    for without in (
        plain.t().contiguous().t()[:, :96],  # keys apart
        plain[:, :1],  # one for all keys
        wider[:, :96],  # rows of 200 bytes
        torch.ones(64, 208, dtype=torch.bool)[:, 1:97],  # off by one
        torch.zeros(64, 98, dtype=torch.float16)[:, :96],  # rows of 196 bytes
    ):
        assert mask_of(without).boxes() is None
    assert mask_of(torch.zeros(64, 98)[:, :96]).boxes() is None  # 392
    assert mask_of(torch.zeros(64, 100)[:, :96]).boxes() is not None  # 400


def test_which_kernels_copy_masks() -> None:
    """Those of query blocks; it fits into shared memory with each head_dim."""

    def places(attend: object) -> int:
        assert isinstance(attend, HopperAttendSpec)
        return attend.mask_places

    for head_dim, copies in ((64, 4), (128, 4), (192, 1), (256, 1)):
        common = (ARCH, "bfloat16", head_dim, RECIPE)
        assert places(variant(*common).attend) == 0
        assert places(variant(*common, masked=True).attend) == copies
        assert places(variant(*common, masked=True, tile=QueryTile(split=True)).attend) == copies
        packed = QueryTile(packed_heads=True)
        assert places(variant(*common, masked=True, tile=packed).attend) == 0
        assert places(cache_variant(*common, masked=True).attend) == 0


def test_a_driver_without_maps() -> None:
    """Those before CUDA 12 have none; one may refuse."""
    driver = emulation.loader().driver
    tensor = mask_of(torch.ones(64, 96, dtype=torch.bool)).boxes()
    assert tensor is not None and len(driver.encode(tensor) or b"") == 128
    assert driver.encode(dataclasses.replace(tensor, strides=(96, 96, 0))) is None
    older = Driver(str(host.driver()))
    older._encode = None
    assert older.encode(tensor) is None


TEMPLATE, PRODUCER = "attend_hopper", "hopper_producer"
MASK, COPIED = "hopper_mask", "copied_mask"
# As in test_hopper.py: a change, what finds it or None where the numbers are wrong, the header.
FAULTS: dict[str, tuple[Callable[[str], str], str | None, str]] = {
    "consumers do not wait for the mask": (
        replacing("arch::mbarrier_wait(Memory::mask_full(place.stage()), place.parity());", ""),
        "race between (load_shared|copy_tensor)",
        MASK,
    ),
    "consumers wait for the wrong phase": (
        replacing(
            "arch::mbarrier_wait(Memory::mask_full(place.stage()), place.parity());",
            "arch::mbarrier_wait(Memory::mask_full(place.stage()), place.parity() ^ 1);",
        ),
        "race between (load_shared|copy_tensor)|deadlock",
        MASK,
    ),
    "a place is never given back": (
        replacing("arch::mbarrier_arrive_warp(Memory::mask_empty(place.stage()));", ""),
        "deadlock",
        MASK,
    ),
    "a place is given back before it is read": (
        lambda header: replacing(
            "char const* const tile = Memory::mask(place.stage());",
            "char const* const tile = Memory::mask(place.stage()); "
            "arch::mbarrier_arrive_warp(Memory::mask_empty(place.stage()));",
        )(replacing("arch::mbarrier_arrive_warp(Memory::mask_empty(place.stage()));", "")(header)),
        "race between (load_shared|copy_tensor)",
        MASK,
    ),
    "whoever copies does not wait for a place": (
        replacing(
            "arch::mbarrier_wait(Memory::mask_empty(place.stage()), place.parity() ^ 1);", ""
        ),
        "race between copy_tensor|all 1 arrivals",
        PRODUCER,
    ),
    "whoever copies waits for the wrong phase": (
        replacing(
            "arch::mbarrier_wait(Memory::mask_empty(place.stage()), place.parity() ^ 1);",
            "arch::mbarrier_wait(Memory::mask_empty(place.stage()), place.parity());",
        ),
        "deadlock",
        PRODUCER,
    ),
    "fewer bytes are expected than come": (
        replacing("* kKeyBlock * bytes);", "* kKeyBlock * bytes - 16);"),
        "bytes",
        COPIED,
    ),
    "rows beyond the last are not expected": (
        replacing(
            "static_cast<int>(p.mask_rows) * kKeyBlock",
            "static_cast<int>(p.query_length) * kKeyBlock",
        ),
        "bytes",
        COPIED,
    ),
    "rows are read as if none was swizzled": (
        replacing("Tile::offset(row_, key * kBytes)", "row_ * Tile::kWidth + key * kBytes"),
        None,
        COPIED,
    ),
    "rows are read by the swizzle of another width": (
        replacing(
            "Tile::offset(row_, key * kBytes)",
            "Panels<kQueryBlock, 3 * 64 - Tile::kWidth>::offset(row_, key * kBytes)",
        ),
        None,
        COPIED,
    ),
    "the other half's rows are read": (
        replacing("half * apart_ * Tile::kWidth", "(1 - half) * apart_ * Tile::kWidth"),
        None,
        COPIED,
    ),
    "batch and head are mixed up": (
        replacing("key, query, of_head, batch);", "key, query, batch, of_head);"),
        None,
        COPIED,
    ),
    "queries and heads are mixed up": (
        replacing("key, query, of_head, batch);", "key, of_head, query, batch);"),
        None,
        COPIED,
    ),
    "the keys of another tile are copied": (
        replacing("tile * kKeyBlock + key, query", "tile * kKeyBlock + key + 1, query"),
        None,
        COPIED,
    ),
    "tiles are copied that nobody reads": (
        replacing("if (task.shown_of(tile) != kMixed) continue;", ""),
        "deadlock|race between",
        PRODUCER,
    ),
    "the ring begins again with each task": (
        replacing(
            "state.attend(place, stages, masks);",
            "masks.turn = 0; state.attend(place, stages, masks);",
        ),
        "race between|deadlock|all [18] arrivals",
        TEMPLATE,
    ),
    "whoever copies does not say that it knows the task": (
        replacing(
            "arch::mbarrier_arrive(Memory::query_empty(queries.stage())); if (p.mask_rows",
            "if (p.mask_rows",
        ),
        "deadlock",
        PRODUCER,
    ),
    "whoever copies does not wait for a task": (
        replacing(
            "arch::mbarrier_wait(Memory::query_full(queries.stage()), queries.parity()); "
            "int const index = arch::load_shared(Memory::task(queries.stage()));",
            "int const index = arch::load_shared(Memory::task(queries.stage()));",
        ),
        "race between (load_shared|store_shared)|outside of the memory",
        PRODUCER,
    ),
}


def masked_call(kind: torch.dtype = torch.bool) -> Call:
    """Of several tasks; more tiles of a mask than there are places."""
    call = make_call(80, 656, 64, torch.float16, batch=2, kv_heads=2)
    return dataclasses.replace(call, attn_mask=some_mask(kind, 2, 2, 80, 656))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str) -> None:
    change, found_by, header = FAULTS[fault]
    kernels = broken(TEMPLATE, change, *([] if header == TEMPLATE else [header]))
    assert_found(masked_call(), kernels, found_by, multiprocessors=1)


def test_nothing_is_found_where_there_is_no_fault() -> None:
    for kind, seed in itertools.product((torch.bool, torch.float32), range(3)):
        assert_close_to_reference(masked_call(kind), multiprocessors=1, seed=seed)


@pytest.mark.parametrize(
    ("fault", "kind", "change"),
    [
        (
            "the second half of the keys of a float tile is the first again",
            torch.float32,
            replacing("tile * kKeyBlock + key, query", "tile * kKeyBlock, query"),
        ),
        (
            "both halves of a float tile lie at the same place",
            torch.float32,
            replacing("place += kPanelBytes", "place += 0"),
        ),
        (
            "bfloat16 is taken for half",
            torch.bfloat16,
            replacing("if constexpr (kKind == MaskKind::kBfloat16)", "if constexpr (false)"),
        ),
    ],
)
def test_a_fault_of_a_type_is_found(
    fault: str, kind: torch.dtype, change: Callable[[str], str]
) -> None:
    race = "race between copy_tensor" if "same place" in fault else None
    assert_found(masked_call(kind), broken(TEMPLATE, change, COPIED), race, multiprocessors=1)


@pytest.mark.parametrize(
    ("change", "found_by"),
    [
        (replacing("has_pairs(p_.mask));", "true);"), "aligned|outside of the memory"),
        (replacing("+ first_atom * 8 + Scores", "+ Scores"), None),
        (replacing("mask_row(0, half)", "mask_row(0, 0)"), None),
        (replacing("p_.key_length, has_pairs", "704, has_pairs"), "outside of the mem"),
        (replacing("word < (i + 1) * Scores::kTileAtoms * 4; ++word)",
                   "word < (i + 1) * Scores::kTileAtoms * 4; word += 2)"),
         None),
    ],
    ids=["pairs", "keys", "rows", "beyond", "hidden"],
)  # fmt: skip
def test_a_fault_of_a_mask_where_it_lies_is_found(
    change: Callable[[str], str], found_by: str | None
) -> None:
    """Rows at odd elements; a step of a tile that is hidden and one that is not."""
    mask = some_mask(torch.float16, 2, 2, 60, 655, seed=2)
    assert Mask.of(mask, None, 2, 2, 1, 60, 655).boxes() is None
    call = make_call(60, 655, 64, torch.float16, batch=2, kv_heads=2)
    call = dataclasses.replace(call, attn_mask=mask)
    assert_close_to_reference(call)
    assert_found(call, broken(TEMPLATE, change, MASK), found_by)


def test_rows_that_are_taken_for_one_are_found() -> None:
    change = replacing("apart_(mask_rows == 1 ? 0 : 8)", "apart_(8)")
    call = make_call(200, 336, 64, torch.float16)
    padding = dataclasses.replace(call, attn_mask=(torch.arange(336) < 300).view(1, 1, 1, -1))
    assert_close_to_reference(padding)
    assert_found(padding, broken(TEMPLATE, change, COPIED), None)


@pytest.mark.parametrize(
    ("change", "found_by"),
    [
        (lambda map_: {"strides": (*map_.strides[:2], map_.strides[2] - 16)}, None),
        (lambda map_: {"strides": (*map_.strides[:2], map_.strides[2] + 16)}, "outside of the mem"),
        (lambda map_: {"sizes": (*map_.sizes[:3], map_.sizes[3] + 64)}, "outside of the memory"),
        (lambda map_: {"address": map_.address + 16}, "outside of the memory"),
        (lambda map_: {"box": (1, 1, 64, 64)}, None),
        (lambda map_: {"sizes": (*map_.sizes[:3], 600)}, None),
    ],
    ids=["stride", "far stride", "more keys", "address", "fewer rows", "fewer keys"],
)
def test_a_wrong_map_is_found(
    change: Callable[[TensorMap], dict[str, object]],
    found_by: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Mask.boxes

    def wrong(mask: Mask) -> TensorMap | None:
        right = real(mask)
        assert right is not None
        return dataclasses.replace(right, **change(right))  # type: ignore[arg-type]

    monkeypatch.setattr(Mask, "boxes", wrong)
    assert_found(masked_call(), emulation.loader(), found_by, multiprocessors=1)
