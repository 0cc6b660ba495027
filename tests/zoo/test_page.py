"""The page of the zoo says what was measured, and Inductor is counted as it would count."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.zoo import Measured, fuse_attention_matches, measure, page, rows_of
from tests.zoo.architecture import EAGER, SDPA, WRITTEN
from tests.zoo.harness import PADDED, PLAIN, Case, built
from tests.zoo.registry import BY_NAME

BERT = BY_NAME["BERT"]


@pytest.mark.parametrize(
    ("implementation", "circumstances", "matches"),
    [(EAGER, PLAIN, 2), (EAGER, PADDED, 0), (SDPA, PLAIN, 0)],
)
def test_inductor_is_counted_without_generating_code(
    implementation: str, circumstances: str, matches: int
) -> None:
    case = Case(BERT, implementation, circumstances)
    assert fuse_attention_matches(built(case), BERT.inputs(case.padded)) == matches


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "ViT", "T5"])
def test_inductor_counts_the_same_when_it_generates_code(name: str) -> None:
    case = Case(BY_NAME[name], EAGER, PLAIN)
    module, inputs = built(case), case.architecture.inputs(False)
    expected = fuse_attention_matches(module, inputs)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(lambda: module(**inputs), backend="inductor")()
    assert counters["inductor"]["fuse_attention"] == expected > 0


def test_a_case_is_measured() -> None:
    case = Case(BY_NAME["mixture of experts"], *WRITTEN, PLAIN)
    measured = measure(case)
    assert (measured.rewritten, measured.kept, measured.failure) == (1, 1, "")
    ((reason, number),) = measured.reasons
    assert reason and number == 1


def test_the_page_has_totals_reasons_and_what_was_not_run() -> None:
    plain = Measured(("BERT", EAGER, PLAIN), 1, 1, (("a|b", 1),), inductor=2)
    padded = Measured(("BERT", EAGER, PADDED), 2, 0, inductor=0)
    fused = Measured(("BERT", SDPA, PLAIN), 2, 0, inductor=0)
    failed = Measured(("GPT-2", SDPA, PLAIN), failure="outputs differ")
    written = page(rows_of([plain, padded, fused, failed]), [BY_NAME["timm ViT"]])
    assert "| **all** | 1 | 5 of 6 | 83.3 % | 3 of 4 | 2 of 4 |" in written
    assert "| BERT | eager | 2 | 1 of 2 | 2 of 2 |  |  |  |  |  | 2 | 0 | a\\|b |" in written
    assert "- timm ViT: " in written
    assert "GPT-2" not in written
