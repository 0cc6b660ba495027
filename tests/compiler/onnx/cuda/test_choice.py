"""C++ and Python choose the same kernels and launch them with the same parameters, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sage_compiler.kernels.cuda import attending, dispatch, kernel
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.driver import Driver
from sage_compiler.kernels.cuda.masks import Mask
from sage_compiler.kernels.cuda.pack import Pack
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.variants import Variant, standalone_specs, variant
from sage_compiler.semantics import UNBOUNDED, DeadRows, MaskClass, Semantics
from tests.compiler.onnx.cuda import native
from tests.compiler.onnx.cuda.native import AUTO, RECIPES, STREAM, Launch, NativeError, TestDriver
from tests.compiler.onnx.cuda.packs import pack_of_names

PROBLEMS = 600  # for each architecture
MULTIPROCESSORS = 20  # of the device of driver.cpp
SCRATCH = 0x7F12_3456_7801  # nobody touches it
SINKS, LSE, MASK = 0x1000, 0x2000, 0x3000
SOFTCAPS = (1e-35, 20.0, 50.5, 1e29, 1e31)

# What serves a recipe, the nearest first: as fast where it can be, never less accurate.
SERVED = {
    "int4_fp8": ("int4_fp8", "int4_fp16", "int8_fp8", "int8_fp16"),
    "int4_fp16": ("int4_fp16", "int8_fp16"),
    "int8_fp8": ("int8_fp8", "int8_fp16"),
    "int8_fp16": ("int8_fp16",),
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    specs = [spec for arch in ARCHS for spec in standalone_specs(arch)]
    return pack_of_names(specs, tmp_path_factory.mktemp("choice") / "pack")


@dataclass(frozen=True)
class Problem:
    """One attention without its tensors; sizes are B, H, Hkv, Lq, Lk, D, Dv."""

    sizes: tuple[int, int, int, int, int, int, int]
    dtype: torch.dtype
    semantics: Semantics
    recipe: str
    mask: tuple[int, int, int, int] | None
    sinks: torch.dtype | None
    lse: bool


def random_problem(rng: random.Random) -> Problem:
    def length() -> int:
        return rng.choice((1, rng.randint(1, 300), rng.randint(1, 20_000), 64, 128, 4096))

    kv_heads, group = rng.choice((1, 2, 3, 4, 90)), rng.choice((1, 1, 2, 4))
    head_dim = rng.choice((64, 128, 32, 96, rng.randint(1, 256)))
    value_dim = head_dim if rng.random() < 0.9 else rng.choice((head_dim - head_dim % 7, 64, 256))
    sizes = (rng.randint(1, 3), kv_heads * group, kv_heads, length(), length(), head_dim)
    mask_class = rng.choice(tuple(MaskClass))
    windowed = mask_class in (MaskClass.WINDOW, MaskClass.WINDOW_BOTTOM_RIGHT)
    semantics = Semantics(
        mask_class=mask_class,
        window_left=rng.choice((UNBOUNDED, 0, 3, 5000, 1 << 50)) if windowed else UNBOUNDED,
        window_right=rng.choice((UNBOUNDED, 0, 7, 5000, 1 << 50)) if windowed else UNBOUNDED,
        scale=_float32(rng.choice((0.125, -0.3, 0.0, rng.random()))),
        softcap=_float32(rng.choice((1e-35, 20.0, 50.5, 1e29, 1e31)))
        if rng.random() < 0.3
        else None,
        dead_rows=rng.choice(tuple(DeadRows)),
    )
    full = (sizes[0], sizes[1], sizes[3], sizes[4])
    mask = tuple(n if rng.random() < 0.5 else 1 for n in full)
    return Problem(
        sizes=(*sizes, max(1, value_dim)),
        dtype=rng.choice(native.DTYPES[:2]) if rng.random() < 0.95 else torch.float32,
        semantics=semantics,
        recipe=rng.choice((*RECIPES, AUTO)),
        mask=mask if rng.random() < 0.4 else None,  # type: ignore[arg-type]
        sinks=rng.choice((None, torch.float32, torch.float16, torch.bfloat16)),
        lse=rng.random() < 0.5,
    )


def _float32(x: float) -> float:
    """As an attribute of a node has it."""
    return float(torch.tensor(x))


def chosen(arch: str, problem: Problem, pack: Pack) -> Variant | None:
    """What Python chooses of a pack."""
    first = dispatch.default_recipe(arch) if problem.recipe == AUTO else problem.recipe
    head_dim, value_dim = problem.sizes[5:]
    for recipe in SERVED[first]:
        kernels = dispatch.decide(
            arch,
            recipe,
            str(problem.dtype).removeprefix("torch."),
            head_dim,
            value_dim,
            window=problem.semantics.window_left != UNBOUNDED,
            masked=problem.mask is not None,
            softcap=kernel.has_softcap(problem.semantics),
        )
        if isinstance(kernels, str):
            continue
        if all(spec.symbol in pack.entries for spec in kernels.specs()):
            return kernels
    return None


class Recorder:
    """Notes launches in place of a ``Loader``, and encodes as a driver does."""

    def __init__(self, driver: TestDriver) -> None:
        self.launches: list[Launch] = []
        self.driver = self
        self.encode = Driver(str(driver.path)).encode

    def clear(self, address: int, size: int, device: int, stream: int) -> None:
        """A driver's call, which is not compared here."""

    def loaded(self, spec: KernelSpec, device: int, stream: int) -> Any:
        def launch(blocks: int, on: int, packed: bytes, *, dependent: bool) -> None:
            geometry = (blocks, spec.threads, spec.shared_bytes)
            self.launches.append(Launch(spec.symbol, *geometry, on, dependent, packed))

        return launch


class Address:
    """What has a data_ptr, and no more."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class Elements(Address):
    """The elements of a mask, which are at an address, and are no data."""

    def __init__(self, address: int, elements: torch.Tensor) -> None:
        super().__init__(address)
        self.dtype, self.shape, self.stride = elements.dtype, elements.shape, elements.stride
        self.element_size = elements.element_size


class FoundMask:
    """A mask whose tiles and tokens lie where C++ has them."""

    packed, boxes = Mask.packed, Mask.boxes

    def __init__(self, problem: Problem, base: int) -> None:
        batch, _, kv_heads, query_length, key_length = problem.sizes[:5]
        assert problem.mask is not None
        query_blocks, key_blocks = -(-query_length // 128), -(-key_length // 64)
        mask_batch, mask_heads = problem.mask[:2]
        mask_kv_heads = 1 if mask_heads == 1 else kv_heads
        at = _aligned_from(
            base,
            mask_batch * mask_heads * query_blocks * key_blocks,
            mask_batch * mask_heads * query_length,
            mask_batch * mask_heads * query_length,
            mask_batch * mask_kv_heads * key_length,
            batch * kv_heads * 4,
        )

        def flags(address: int, heads: int, tokens: int, size: int) -> tuple[int, ...]:
            batch_stride = 0 if mask_batch == 1 else heads * tokens * size
            return (address, batch_stride, 0 if heads == 1 else tokens * size, size)

        self.tiles = flags(at[0], mask_heads, query_blocks, key_blocks)
        self.live = flags(at[1], mask_heads, query_length, 1)
        self.keys = flags(at[3], mask_kv_heads, key_length, 1)
        self.counts = Address(at[4])
        self.sinks = at[5]
        elements = torch.empty(problem.mask, dtype=torch.bool, device="meta")
        self.values = Elements(MASK, elements)


def _aligned_from(base: int, *sizes: int) -> list[int]:
    """Where each begins, and where the last one ends."""
    found = [base]
    for size in sizes:
        found.append(found[-1] + -(-size // 256) * 256)
    return found


def python_launches(
    arch: str,
    problem: Problem,
    kernels: Variant,
    driver: TestDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> list[Launch]:
    """The two launches of ``kernel.Call``, with C++'s addresses."""
    recorder = Recorder(driver)
    end = 0

    def allocate(sizes: Sequence[int], device: torch.device) -> tuple[list[int], object]:
        nonlocal end
        *addresses, end = _aligned_from(-(-SCRATCH // 256) * 256, *sizes)
        return addresses, None

    batch, heads, kv_heads, query_length, key_length, head_dim, value_dim = problem.sizes
    place = (arch, 0, STREAM, recorder, allocate, MULTIPROCESSORS)
    target = kernel.Target(*place)  # type: ignore[arg-type]

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=problem.dtype, device="meta")

    call = kernel.Call(
        target,
        kernels,
        tensor(batch, heads, query_length, head_dim),
        tensor(batch, kv_heads, key_length, head_dim),
        tensor(batch, kv_heads, key_length, value_dim),
        problem.semantics,
        tensor(batch, heads, query_length, value_dim),
        Address(LSE) if problem.lse else None,  # type: ignore[arg-type]
        None if problem.sinks is None else torch.zeros(heads),
    )
    converted = end
    if problem.mask is not None:
        found = FoundMask(problem, end)
        call.mask, converted = found, found.sinks  # type: ignore[assignment]
        for module in (kernel, attending):
            monkeypatch.setattr(module, "flags", lambda bits: bits)
    if problem.sinks is not None:
        is_float = problem.sinks == torch.float32
        call.sinks = Address(SINKS if is_float else converted)  # type: ignore[assignment]
    call.run()
    return recorder.launches


def describe(problem: Problem) -> native.Attention:
    a = native.describe(problem.sizes, problem.dtype, problem.semantics, problem.recipe)
    if problem.mask is not None:
        packed = FoundMask(problem, 0).packed()
        a.mask.data, a.mask.kind = packed[0], packed[5]
        a.mask.strides[:] = packed[1:5]
    if problem.sinks is not None:
        a.sinks, a.sinks_kind = SINKS, native.KINDS[problem.sinks]
    a.lse = LSE if problem.lse else None
    return a


@pytest.mark.parametrize("arch", ARCHS)
def test_the_same_choice_and_the_same_launches(
    arch: str, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the dims, dtypes, recipes, bands, masks, sinks, lengths and scales of random calls."""
    driver = TestDriver()
    driver.set_capability(*ARCHS[arch].capability)
    rng, entries = random.Random(arch), Pack(pack)
    served = maps = 0
    with native.opened(driver.path, pack) as device:
        for _ in range(PROBLEMS):
            problem = random_problem(rng)
            kernels, attention = chosen(arch, problem, entries), describe(problem)
            if kernels is None:
                with pytest.raises(NativeError, match=r"no \w+ kernel for sm_"):
                    device.scratch_bytes(attention)
                continue
            served += 1
            device.launch(attention, SCRATCH, STREAM)
            launches = driver.launches()
            preparing = 3 * (problem.mask is not None)
            preparing += problem.sinks in (torch.float16, torch.bfloat16)
            expected = python_launches(arch, problem, kernels, driver, monkeypatch)
            assert len(launches) == preparing + 2
            overlaps = ARCHS[arch].overlaps_launches
            assert [x.dependent for x in launches] == [False] * (preparing + 1) + [overlaps]
            assert [x.symbol for x in launches[preparing:]] == [x.symbol for x in expected]
            for ours, theirs, spec in zip(
                launches[preparing:], expected, kernels.specs(), strict=True
            ):
                packed = [spec.params.unpack_from(each.params) for each in (ours, theirs)]
                assert packed[0] == pytest.approx(packed[1], rel=0, abs=0, nan_ok=True)
                assert ours == theirs, problem
                maps += any(ours.params[spec.params.size :])
    assert (maps > 0) == (arch == "sm_90a")
    assert served > PROBLEMS / 4
    assert driver.held() == (0, 0, 0)


def test_the_nearest_recipe_of_a_pack(tmp_path: Path) -> None:
    """Products of Q and K of the same format come first: int4_fp16, not int8_fp8, for int4_fp8."""
    driver = TestDriver()
    for held, served in (
        (("int8_fp16", "int8_fp8", "int4_fp16"), "int4_fp16"),
        (("int8_fp16", "int8_fp8"), "int8_fp8"),
        (("int8_fp16",), "int8_fp16"),
    ):
        specs = [spec for each in held for spec in variant("sm_89", "float16", 64, each).specs()]
        pack = pack_of_names([*dict.fromkeys(specs)], tmp_path / "pack")
        a = native.describe(
            (1, 1, 1, 9, 9, 64, 64), torch.float16, Semantics(scale=0.1), "int4_fp8"
        )
        with native.opened(driver.path, pack) as device:
            device.launch(a, SCRATCH, STREAM)
        assert f"_{served}_" in driver.launches()[-1].symbol


def test_a_recipe_is_never_served_by_a_less_accurate_one(pack: Path) -> None:
    """INT8 is not served by INT4, nor FP16 by FP8, on any architecture."""
    driver = TestDriver()
    for arch in ARCHS.values():
        driver.set_capability(*arch.capability)
        with native.opened(driver.path, pack) as device:
            for recipe in (*RECIPES, AUTO):
                semantics = Semantics(scale=0.1)
                a = native.describe((1, 1, 1, 9, 9, 64, 64), torch.float16, semantics, recipe)
                device.launch(a, SCRATCH, STREAM)
                symbol = driver.launches()[-1].symbol
                (served,) = (
                    ["int8_fp8"]  # the only one that it has
                    if symbol.startswith("sage_attend_hopper_")
                    else [known for known in RECIPES if f"_{known}_" in symbol]
                )
                wanted = dispatch.default_recipe(arch.name) if recipe == AUTO else recipe
                assert served == next(r for r in SERVED[wanted] if r in arch.recipes)
