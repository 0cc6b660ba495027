"""What is explained is what is launched, over random attention; the tables and their reasons."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sage_compiler import cli
from sage_compiler.commands import kernels_explain, kernels_question
from sage_compiler.commands.kernels_question import Question
from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels import registry
from sage_compiler.kernels.cuda import attending, dispatch, kernel, packed
from sage_compiler.kernels.cuda.arch import ARCHS, Arch, Measurement
from sage_compiler.kernels.cuda.packed import CudaStore
from sage_compiler.kernels.cuda.spec import DTYPES, HEAD_DIMS, AttendSpec, KernelSpec
from sage_compiler.kernels.cuda.variants import accumulators, variant
from sage_compiler.kernels.kernel import CLOSED, Gate, Kernel, Problem
from sage_compiler.kernels.layout import empty_output
from sage_compiler.kernels.packed import PackedShape
from sage_compiler.kernels.rotary import Rotary, Tables
from sage_compiler.precision import AUTO, EXACT, PRECISIONS, RECIPES
from sage_compiler.semantics import RotaryPairs

PROBLEMS = 500  # for each architecture
STREAM = 4711
RESULTS = Path(__file__).parents[4] / "benchmarks" / "results"

# What each architecture's mma.sync or wgmma multiplies by single instructions, from NVIDIA's PTX
# manual and from compiled code: a copy by hand of what the tables have to offer.
OFFERED = {
    "sm_80": {"int8_fp16", "int4_fp16"},
    "sm_86": {"int8_fp16", "int4_fp16"},
    "sm_89": {"int8_fp8", "int4_fp8", "int8_fp16", "int4_fp16"},
    "sm_90a": {"int8_fp8", "int8_fp16"},
    "sm_100a": {"int8_fp16"},
    "sm_120a": {"int8_fp8", "int8_fp16"},
}
CUDA_RECIPES = sorted(OFFERED["sm_89"])


def question_of(*words: str) -> Question:
    """As ``sagec kernels explain`` understands its arguments."""
    arguments = PARSER.parse_args(["kernels", "explain", *words])
    return kernels_question.parse(arguments)


PARSER = cli.parser()


def random_words(rng: random.Random, arch: str) -> list[str]:
    """A command line about a random attention."""
    kv_heads, group = rng.choice((1, 2, 3, 8, 90)), rng.choice((1, 1, 2, 4))
    batch, head_dim = rng.randint(1, 3), rng.choice((64, 128, 32, 96, rng.randint(1, 300)))

    def length() -> int:
        return rng.choice((1, 64, 128, 4096, rng.randint(1, 300), rng.randint(1, 20_000)))

    words = [f"{batch}x{kv_heads * group}x{length()}x{head_dim}", "--arch", arch]
    words += ["--kv", f"{batch}x{kv_heads}x{length()}x{head_dim}"]
    if rng.random() < 0.3:
        words += ["--value-dim", str(rng.choice((64, 256, rng.randint(1, 300))))]
    words += ["--dtype", rng.choice(tuple(DTYPES)), "--recipe", rng.choice(PRECISIONS)]
    sides = [rng.choice((-1, 0, 3, 5000, 1 << 50)) for _ in range(2)]
    window = f"{rng.choice(('window', 'window_bottom_right'))}:{sides[0]},{sides[1]}"
    band = rng.choice((None, "causal", "causal_bottom_right", window))
    for mask in (band, rng.choice((None, "bool", "float"))):
        words += [] if mask is None else ["--mask", mask]
    words += [flag for flag in ("--softcap", "--sinks") if rng.random() < 0.3]
    return words + (["--rotary", rng.choice(tuple(RotaryPairs))] if rng.random() < 0.3 else [])


def random_words_of_cache(rng: random.Random, arch: str) -> list[str]:
    """A command line for ``parse`` about a cache that there can be."""
    kv_heads, head_dim = rng.randint(1, 9), rng.choice((64, 128, rng.randint(1, 256)))
    queries = rng.choice((1, 1, rng.randint(1, 300)))
    tokens = queries + rng.choice((0, 64, 4096, rng.randint(0, 600), rng.randint(0, 20_000)))
    shape, batch = f"x{queries}x{head_dim}", rng.randint(1, 3)
    words = [f"{batch}x{kv_heads * rng.choice((1, 4))}{shape}", "--arch", arch, "--cache"]
    words += ["--kv", f"{batch}x{kv_heads}x{tokens}x{head_dim}"]
    words += ["--dtype", rng.choice(tuple(DTYPES))]
    words += ["--recipe", rng.choice((AUTO, *ARCHS[arch].recipes))]
    band = rng.choice((None, "causal_bottom_right", "window_bottom_right:70,0"))
    for mask in (band, rng.choice((None, None, "bool"))):
        words += [] if mask is None else ["--mask", mask]
    return words + [flag for flag in ("--softcap", "--sinks") if rng.random() < 0.3]


@dataclass
class Launched:
    """What ``kernel.run`` starts, as far as ``sagec kernels explain`` tells of it."""

    launches: list[tuple[str, int, int, int]]
    scratch_bytes: int = 0

    @property
    def driver(self) -> Launched:
        """A loader's driver."""
        return self

    def clear(self, address: int, size: int, device: int, stream: int) -> None:
        """A driver's call, which is not told of."""

    def loaded(self, spec: KernelSpec, device: int, stream: int) -> Any:
        """A loader's answer; a launch is noted."""

        def launch(blocks: int, on: int, packed: bytes, *, dependent: bool) -> None:
            self.launches.append((spec.symbol, blocks, spec.threads, spec.shared_bytes))

        return launch

    def allocate(self, sizes: Sequence[int], device: torch.device) -> tuple[list[int], object]:
        """``kernel.allocate`` of real memory, whose size is noted."""
        addresses, arena = kernel.allocate(sizes, torch.device("meta"))
        assert isinstance(arena, Tensor)
        self.scratch_bytes = arena.numel()
        return addresses, arena


class FoundMask:
    """Stands for a mask that was looked through, which takes data."""

    tiles = live = keys = counts = torch.empty(0)

    @classmethod
    def of(cls, *arguments: object) -> FoundMask:
        """No look."""
        return cls()

    def packed(self) -> tuple[int, ...]:
        """As ``Mask.packed``."""
        return (0,) * 6

    def boxes(self) -> None:
        """As ``Mask.boxes``, of one that is read where it lies."""


def launched(question: Question, arch: str, recipe: str) -> Launched:
    """Run a call as the operator does once it has chosen a kernel, without a device."""
    seen = Launched([])
    target = kernel.Target(arch, 0, STREAM, seen, seen.allocate)  # type: ignore[arg-type]
    kernel.run(
        target,
        question.query,
        question.key,
        question.value,
        question.semantics,
        want_lse=False,
        recipe=recipe,
        attn_mask=question.attn_mask,
        sinks=None if question.sinks is None else torch.zeros(question.query.shape[1]),
        rotary=rotation(question),
    )
    return seen


def rotation(question: Question) -> Rotary | None:
    """That of a question, of all channels."""
    if question.rotary is None:
        return None
    query, key = (
        Tables(*(torch.empty(1, 1, x.shape[2], x.shape[3], device="meta") for _ in range(2)))
        for x in (question.query, question.key)
    )
    return Rotary(question.rotary, question.query.shape[3], torch.float32, query, key)


def launched_with_cache(question: Question, arch: str) -> Launched:
    """Append all tokens but the queries' to a cache, then note what these and an attention take."""
    seen = Launched([])
    target = kernel.Target(arch, 0, STREAM, seen, seen.allocate)  # type: ignore[arg-type]
    query, key, value = question.query, question.key, question.value
    batch, kv_heads, tokens, head_dim = key.shape
    store = CudaStore(
        PackedShape(batch, kv_heads, head_dim, value.shape[3], tokens, key.dtype),
        torch.device("meta"),
        None if question.recipe == AUTO else question.recipe,
        lambda device: contextlib.nullcontext(target),
    )
    before = tokens - query.shape[2]
    store.append(0, key[:, :, :before], value[:, :, :before])
    seen.launches.clear()
    store.append(before, key[:, :, before:], value[:, :, before:])
    store.attend(
        tokens,
        query,
        question.semantics,
        empty_output(query, value),
        attn_mask=question.attn_mask,
        sinks=None if question.sinks is None else torch.zeros(query.shape[1]),
        lse=None,
    )
    return seen


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """Devices of any architecture, without one: ``on.capability`` is what torch says of them.

    Nobody has measured any.
    """
    unmeasured = {name: dataclasses.replace(arch, measured=None) for name, arch in ARCHS.items()}
    monkeypatch.setattr(dispatch, "ARCHS", unmeasured)
    dispatch.smallest.cache_clear()
    here = types.SimpleNamespace(capability=(0, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: here.capability)
    for module in (kernel, packed):
        monkeypatch.setattr(module, "Mask", FoundMask)
    for module in (kernel, attending, packed):
        monkeypatch.setattr(module, "flags", lambda bits: (0,) * 4)
    kernel._arch.cache_clear()
    yield here
    kernel._arch.cache_clear()
    dispatch.smallest.cache_clear()


def chosen_here(question: Question, on: types.SimpleNamespace) -> object:
    """What the operator chooses for these tensors on a device of the question's capability."""
    on.capability = question.capability
    kernel._arch.cache_clear()
    query, key, value = question.query, question.key, question.value
    problem = Problem(
        device_type="cuda",
        dtype=query.dtype,
        head_dim=query.shape[3],
        value_head_dim=value.shape[3],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        mask_class=question.semantics.mask_class,
        has_mask=question.attn_mask is not None,
    )
    lengths = (query.shape[2], key.shape[2])
    least = -1 if question.recipe == AUTO else 0
    products = query.numel() * key.shape[2]
    return registry.choose(question.recipe, problem, least, *lengths, products)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_explained_is_what_is_launched(arch: str, on: types.SimpleNamespace) -> None:
    """The kernels, their blocks and memory, and the sentence of each refusal."""
    rng = random.Random(arch)
    served = refused = 0
    for _ in range(PROBLEMS):
        words = random_words(rng, arch)
        question = question_of(*words)
        found = kernels_explain.answer(question)
        told = kernels_explain.to_dict(question, found)
        chosen = chosen_here(question, on)
        fits = max(question.query.shape[3], question.value.shape[3]) <= 256
        taken = question.recipe in OFFERED[arch] and fits
        assert isinstance(chosen, Kernel) == taken == (told["served_by"] == "kernels"), words
        assert told["reason"]
        if question.recipe in (AUTO, EXACT):
            assert chosen is None
            assert (told["served_by"], told["recipe"]) == ("exact", EXACT)
        elif not taken:
            refused += 1
            assert isinstance(chosen, registry.Unavailable)
            assert told["reason"] == chosen.reason and told["served_by"] == "reference"
            assert told["launches"] == [] and told["shown"] is None
            with pytest.raises(KernelUnavailableError) as error:
                launched(question, arch, question.recipe)
            if question.recipe in CUDA_RECIPES:
                refusals = chosen.reason.split("; triton: ")  # of a recipe that Triton has too
                assert refusals[0] == f"cuda-mma: {str(error.value).rpartition(';')[0]}"
        if told["shown"] is None:
            continue
        served += 1
        run = launched(question, arch, told["shown"])
        shown = [
            (each["symbol"], each["blocks"], each["threads"], each["shared_bytes"])
            for each in told["launches"]
        ]
        assert shown == run.launches, words
        assert told["scratch_bytes"] == run.scratch_bytes
        assert next(r for r in told["recipes"] if r["recipe"] == told["shown"])["seconds"] > 0
    assert served > PROBLEMS / 6 and refused > PROBLEMS / 12


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_explained_of_a_cache_is_what_is_launched(
    arch: str, on: types.SimpleNamespace
) -> None:
    rng, kinds = random.Random(arch), set()
    for _ in range(PROBLEMS // 2):
        words = random_words_of_cache(rng, arch)
        question = question_of(*words)
        found = kernels_explain.to_dict(question, kernels_explain.answer(question))
        assert found["served_by"] == "kernels" and found["recipe"] in ARCHS[arch].recipes, words
        run = launched_with_cache(question, arch)
        shown = [
            (each["symbol"], each["blocks"], each["threads"], each["shared_bytes"])
            for each in found["launches"]
        ]
        assert shown == run.launches, words
        assert found["scratch_bytes"] == run.scratch_bytes
        assert found["cache_bytes"] > 0
        kinds |= {each["symbol"].split("_")[1] for each in found["launches"]}
    assert kinds >= {"key", "append", "query", "attend", "merge"}  # the first is "key_mean"
    assert ("delta" in kinds) == any("int4" in name for name in ARCHS[arch].recipes)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_measurement_switches_auto_on(
    arch: str, on: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one field of the table; the sizes that it names are kept to, and other GPUs stay exact."""
    gate = Gate(query_length=100, key_length=200, products=1 << 26)
    assert {dispatch.smallest(name) for name in CUDA_RECIPES} == {CLOSED}
    measured = dataclasses.replace(ARCHS[arch], measured=Measurement("a-gpu.json", gate))
    monkeypatch.setattr(dispatch, "ARCHS", {**dispatch.ARCHS, arch: measured})
    dispatch.smallest.cache_clear()
    default, rng = dispatch.default_recipe(arch), random.Random(arch)
    seen = set()
    for _ in range(PROBLEMS // 2):
        words = random_words(rng, rng.choice((arch, *ARCHS)))
        words[words.index("--recipe") + 1] = AUTO
        question = question_of(*words)
        query, key = question.query, question.key
        fits = max(query.shape[3], question.value.shape[3]) <= 256
        products = query.numel() * key.shape[2]
        large = query.shape[2] >= 100 and key.shape[2] >= 200 and products >= 1 << 26
        taken = words[2] == arch and fits and large
        found, chosen = kernels_explain.answer(question), chosen_here(question, on)
        assert isinstance(chosen, Kernel) == taken == (found.served_by == "kernels"), words
        assert found.recipe == (default if taken else EXACT)
        lengths = (query.shape[2], key.shape[2])
        # Asked without a look at the GPU; what it leaves open, the above decides.
        assert not (taken and registry.too_small("cuda", -1, *lengths, products))
        if not large:
            assert registry.too_small("cuda", -1, *lengths, products)
        seen.add((taken, large, words[2] == arch))
    assert len(seen) >= 4
    other = dispatch.gate(arch, "int8_int16")
    assert other == f"int8_int16 is not the recipe that a-gpu.json measured on {arch}"


def test_auto_is_exact_where_nobody_measured(on: types.SimpleNamespace) -> None:
    for arch in ARCHS.values():
        words = ("2x16x8192x128", "--arch", arch.name)
        found = kernels_explain.answer(question_of(*words))
        if arch.measured is None:
            assert found.recipe == EXACT
            assert f"not measured on this GPU ({arch.name})" in found.reason
        else:
            assert (RESULTS / arch.measured.file).is_file()
        assert found.shown == arch.recipes[0]


def test_int4_is_never_the_default_from_sm_90_on() -> None:
    for arch in ARCHS.values():
        if arch.capability >= (9, 0):
            assert not dispatch.default_recipe(arch.name).startswith("int4")
    # Nor is it before, but by a policy: it is not lossless everywhere.
    assert {dispatch.default_recipe(arch) for arch in ARCHS} == {"int8_fp16", "int8_fp8"}


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
def test_a_table_is_whole(arch: Arch) -> None:
    assert set(arch.recipes) == OFFERED[arch.name]
    for recipe in RECIPES:
        lack = dispatch.lacking(arch.name, recipe)
        assert (lack is None) == (recipe in arch.recipes)
        if recipe in CUDA_RECIPES and lack is not None:
            formats = {RECIPES[recipe].qk, RECIPES[recipe].pv}
            assert formats & set(arch.lacking), "the reason is a format's"
    for table in (arch.geometries, arch.rings):
        longest = [each.longest for each in table]
        assert longest == sorted(set(longest)) and longest[-1:] in ([], [HEAD_DIMS[-1]])
    assert arch.geometries
    assert all(each.reason for each in (*arch.offers, *arch.geometries, *arch.rings))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_fits_and_is_the_one_that_was_proved(arch: str) -> None:
    """Warps and stages are those with which all kernels were executed and looked at."""
    for recipe in ARCHS[arch].recipes:
        for head_dim in HEAD_DIMS:
            for value_head_dim in HEAD_DIMS:
                for masked in (False, True):
                    for accumulator in accumulators(arch, recipe):
                        kernels = variant(
                            arch,
                            "float32",
                            head_dim,
                            recipe,
                            accumulator,
                            value_head_dim=value_head_dim,
                            masked=masked,
                        )
                        short = max(head_dim, value_head_dim) <= 64
                        attend = kernels.attend
                        for spec in kernels.specs():
                            assert spec.shared_bytes <= ARCHS[arch].shared_bytes
                        if not isinstance(attend, AttendSpec):  # see test_hopper.py
                            continue
                        assert attend.warp_rows == (32 if short and not masked else 16)
                        assert attend.stages == (3 if short else 2)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_the_reasons_say_of_shared_memory(arch: str) -> None:
    of_a_multiprocessor = ARCHS[arch].shared_bytes + 1024  # a block's share, and what CUDA keeps
    for recipe in ARCHS[arch].recipes:
        short = variant(arch, "bfloat16", 64, recipe).attend
        if not isinstance(short, AttendSpec):
            continue
        assert short.shared_bytes <= 45 << 10
        assert 2 * (short.shared_bytes + 1024) <= of_a_multiprocessor
        long = variant(arch, "bfloat16", 128, recipe).attend
        a_third = dataclasses.replace(long, stages=3)
        assert long.shared_bytes < a_third.shared_bytes <= ARCHS[arch].shared_bytes
        longest = variant(arch, "bfloat16", 256, recipe).attend
        assert longest.shared_bytes <= (96 << 10) + 512


def test_a_decision_is_a_sentence_for_every_dim_and_dtype() -> None:
    refused: Mapping[tuple[object, ...], str] = {
        ("float64", 64, 64): "float64 is none of float16, bfloat16, float32",
        ("float16", 0, 64): "head_dim 0 is not from 1 to 256",
        ("float16", 257, 64): "head_dim 257 is not from 1 to 256",
        ("float16", 64, 1000): "value head_dim 1000 is not from 1 to 256",
    }
    for (dtype, head_dim, value_dim), reason in refused.items():
        decided = dispatch.decide("sm_80", "int8_fp16", dtype, head_dim, value_dim)  # type: ignore[arg-type]
        assert decided == reason
    for head_dim in range(1, 257):
        decided = dispatch.decide("sm_80", "int8_fp16", "float16", head_dim, 257 - head_dim)
        assert not isinstance(decided, str)
        assert decided.attend.head_dim >= head_dim > decided.attend.head_dim - 64


def test_an_accumulator_that_a_recipe_has_no_kernel_for() -> None:
    fp16 = accumulators("sm_89", "int8_fp8")[1]
    assert not isinstance(
        dispatch.decide("sm_89", "int8_fp8", "float16", 64, 64, accumulator=fp16), str
    )
    assert dispatch.decide("sm_89", "int8_fp16", "float16", 64, 64, accumulator=fp16) == (
        "int8_fp16 on sm_89 accumulates in fp32, not in fp16"
    )
    assert dispatch.decide("sm_90a", "int8_fp8", "float16", 64, 64, accumulator=fp16) == (
        "int8_fp8 on sm_90a accumulates in fp32, not in fp16"
    )
