"""Every architecture: rewritten as expected, never wrongly, the rest with reasons."""

from __future__ import annotations

from typing import Final

import pytest

from tests.zoo.architecture import EAGER, SDPA, WRITTEN
from tests.zoo.expectations import Key, expected_keys, key_of, read
from tests.zoo.harness import (
    DYNAMIC,
    DYNAMIC_CACHE,
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    PADDED,
    PADDED_DYNAMIC,
    PLAIN,
    STATIC_CACHE,
    TRAINING,
    Case,
    cases_of,
    run,
)
from tests.zoo.registry import ARCHITECTURES, BY_NAME, unavailable

EXPECTED: Final = read()
LEAST_REWRITTEN: Final = 0.97  # of the true sites
(ONLY,) = WRITTEN

# What continuous integration runs: one or two cases of what is told apart.
TELLING: Final[tuple[Key, ...]] = (
    ("BERT", EAGER, PADDED),
    ("BERT", EAGER, TRAINING),
    ("DeBERTa-v2", EAGER, PADDED),
    ("ModernBERT (global and local)", SDPA, PADDED),
    ("Funnel", EAGER, PLAIN),
    ("Longformer", EAGER, PLAIN),
    ("GPT-2", EAGER, STATIC_CACHE),
    ("BLOOM (ALiBi)", EAGER, PADDED),
    ("Falcon (MQA)", EAGER, PADDED),
    ("MPT (ALiBi)", EAGER, PLAIN),
    ("Llama", SDPA, PADDED_DYNAMIC),
    ("Llama", EAGER, DYNAMIC),
    ("Llama", SDPA, DYNAMIC_CACHE),
    ("Mistral (window)", EAGER, PADDED),
    ("Mistral (window)", SDPA, STATIC_CACHE),
    ("Mixtral", EAGER, PLAIN),
    ("Gemma 2 (softcap)", EAGER, PADDED),
    ("GPT-OSS (sinks)", EAGER, TRAINING),
    ("DeepSeek-V3 (latent attention)", EAGER, PLAIN),
    ("T5", EAGER, PADDED),
    ("Whisper", SDPA, PADDED),
    ("ViT", EAGER, PLAIN),
    ("Swin", EAGER, PLAIN),
    ("SwinV2", EAGER, PLAIN),
    ("CLIP", SDPA, PADDED),
    ("SAM", EAGER, PLAIN),
    ("wav2vec 2.0", EAGER, PADDED),
    ("UNet2D (Stable Diffusion)", EAGER, PLAIN),
    ("DiT", SDPA, PLAIN),
    ("FLUX", SDPA, PLAIN),
    ("Sana (linear self-attention)", SDPA, PADDED),
    ("Wan", SDPA, PLAIN),
    *((name, ONLY, PADDED) for name in BY_NAME if name.startswith("MultiheadAttention")),
    ("TransformerEncoder", ONLY, PADDED),
    ("TransformerEncoder", ONLY, TRAINING),
    ("TransformerDecoder", ONLY, PLAIN),
    ("nanoGPT", EAGER, TRAINING),
    ("einsum", ONLY, PADDED),
    ("x-transformers style", ONLY, PADDED),
    ("Perceiver style", ONLY, PADDED),
    ("axial video, 5-D", SDPA, PLAIN),
    ("Llama's reference code", ONLY, DYNAMIC),
    ("gpt-fast, a decoding step", ONLY, PLAIN),
    ("classifier", ONLY, PLAIN),
    *((name, ONLY, PLAIN) for name in BY_NAME if BY_NAME[name].family == "Research variants"),
)
CASES: Final = {key_of(case): case for entry in ARCHITECTURES for case in cases_of(entry)}


def check(case: Case) -> None:
    reason = unavailable(case.architecture)
    if reason:
        pytest.skip(reason)
    result = run(case)
    report = result.report
    assert result.output_error <= OUTPUT_TOLERANCE, str(report)
    assert result.gradient_error <= GRADIENT_TOLERANCE, str(report)
    assert result.with_us == result.without_us
    assert all(site.reason for site in report.kept)
    assert (len(report.rewritten), len(report.kept)) == EXPECTED[key_of(case)], str(report)


@pytest.mark.parametrize("key", TELLING, ids=lambda key: str(CASES[key]))
def test_telling_cases(key: Key) -> None:
    check(CASES[key])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_every_case(case: Case) -> None:
    check(case)


def test_the_table_has_every_case_and_no_other() -> None:
    assert set(EXPECTED) == expected_keys()


def test_plain_cases_account_for_every_softmax() -> None:
    """No attention is missed, no other softmax is taken for one, and what is kept is known."""
    known = {name: 0 for name, entry in BY_NAME.items() if entry.keeps}
    for (name, implementation, circumstances), (rewritten, kept) in EXPECTED.items():
        if circumstances != PLAIN:
            continue
        entry = BY_NAME[name]
        found = f"{name} [{implementation}]"
        assert rewritten + kept == entry.true_sites + entry.others, found
        assert rewritten == entry.true_sites or (rewritten < entry.true_sites and entry.keeps), (
            found
        )
        if entry.keeps:
            known[name] += entry.true_sites - rewritten
    assert all(known.values()), "keeps is said of what is rewritten"


def test_true_sites_are_rewritten() -> None:
    """With padding and without, nearly all; the table holds what the cases assert."""
    counted = [key for key in EXPECTED if key[2] in (PLAIN, PADDED)]
    true = sum(BY_NAME[name].true_sites for name, _, _ in counted)
    rewritten = sum(EXPECTED[key][0] for key in counted)
    assert rewritten >= LEAST_REWRITTEN * true, f"{rewritten} of {true}"


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(ARCHITECTURES)
