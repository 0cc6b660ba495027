"""Random masks: what an analysis says must do to a softmax what the masks did."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from sage_compiler.passes import joint
from sage_compiler.passes.masks import Analysis
from sage_compiler.semantics import MaskClass
from tests.passes.mask_programs import SIZES, inputs, program
from tests.passes.masked_softmax import Masks

CHUNK = 50


def run(seed: int, sizes: list[tuple[int, int]], **options: bool) -> list[Analysis]:
    """The analyses of a seed's program; each was compared on its inputs."""
    made = program(seed)
    masks = Masks(made.function, made.kinds, **options)
    try:
        return [masks(*inputs(query, key, seed)) for query, key in sizes]
    except Exception as error:
        error.add_note(f"seed {seed}\n{made.source}\nkinds {made.kinds}\n{masks.analysis}")
        raise


def run_chunk(first: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        (analysis,) = run(seed, [random.Random(seed).choice(SIZES)])
        found["band"] += analysis.mask_class is not MaskClass.NONE
        found["nothing explicit"] += not analysis.terms
        found["live"] += analysis.live
    return found


@pytest.mark.parametrize("first", range(0, 300, CHUNK))
def test_programs(first: int) -> None:
    found = run_chunk(first)
    assert min(found["band"], found["nothing explicit"], found["live"]) >= CHUNK // 20


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 20_000, CHUNK))
def test_many_programs(first: int) -> None:
    run_chunk(first)


@pytest.mark.parametrize("first", range(0, 50, 25))
def test_programs_of_any_size(first: int) -> None:
    """One graph for all sizes: what was proved with symbols must hold for each."""
    bands = 0
    for seed in range(first, first + 25):
        analyses = run(seed, [(5, 7), (6, 6), (9, 4), (2, 3)], dynamic=True)
        bands += analyses[0].mask_class is not MaskClass.NONE
    assert bands


def test_finite_fills_that_exclude_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "keeps_rows_alive", lambda *_: True)
    with pytest.raises(AssertionError):
        for first in range(0, 400, CHUNK):
            run_chunk(first)


def test_a_forgotten_term_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    explicit = joint.Joint.explicit
    monkeypatch.setattr(joint.Joint, "explicit", lambda self: explicit(self)[1:])
    with pytest.raises(AssertionError):
        run_chunk(0)


def test_the_generator_is_reproducible() -> None:
    assert program(7).source == program(7).source
    for one, other in zip(inputs(5, 7, 3), inputs(5, 7, 3), strict=True):
        assert torch.equal(one, other)
