"""Attentions as models write them, with one thing changed: kept, or rewritten rightly.

Each form is proved to be rewritten as it is; then each mutation edits its captured graph, and the
passes, given the edited graph, must leave what it computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.passes.checks import TOLERANCE, check
from tests.passes.programs.canonical import (
    BATCH,
    CANONICAL,
    HEADS,
    LENGTH,
    WIDTH,
    Canonical,
    chain,
)
from tests.passes.programs.mutations import MUTATIONS
from tests.passes.programs.subject import Capture


@functools.cache
def capture(form: str) -> Capture:
    return Capture(CANONICAL[form])


@functools.cache
def unedited(form: str) -> list[Any]:
    """Results and inputs of a form as it is."""
    return capture(form).subject().run()


def alike(found: list[Any], wanted: list[Any], tolerance: float = TOLERANCE) -> bool:
    """The same number of tensors, each with the same shape, dtype, values and NaN."""
    return len(found) == len(wanted) and all(
        _tensors_alike(a, b, tolerance) for a, b in zip(found, wanted, strict=True)
    )


def _tensors_alike(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    a, b = found.double(), wanted.double()
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_there_are_enough() -> None:
    assert len(CANONICAL) >= 12
    assert len(MUTATIONS) >= 30


@pytest.mark.parametrize("form", CANONICAL)
def test_unedited_form_is_rewritten(form: str) -> None:
    subject = capture(form).subject()
    report = subject.rewrite()
    assert len(report.rewritten) == 1, str(report)
    assert not report.kept, str(report)
    assert alike(subject.run(), unedited(form))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name: str) -> None:
    mutation = MUTATIONS[name]
    applied, problems = 0, []
    for form in CANONICAL:
        subject = capture(form).subject()
        if not mutation.edit(subject):
            continue
        applied += 1
        subject.finish()
        wanted, code = subject.run(), subject.gm.code
        changed = not alike(wanted, unedited(form))
        if not changed and not mutation.silent:
            problems.append(f"{form}: computes what it computed before\n{code}")
        report = subject.rewrite()
        found = subject.run()
        # A rewrite may leave out a rounding, and nothing else.
        right = alike(found, wanted) or (mutation.rounds and alike(found, unedited(form)))
        if not right:
            problems.append(f"{form}: rewritten wrongly\n{code}\n{report}\n{subject.gm.code}")
    assert applied, "it applies to no form"
    assert not problems, "\n".join(problems)


MUST_BE_KEPT: Final = (
    "scores returned",
    "weights returned",
    "weights dropped",
    "softmax over the batch",
    "sigmoid for softmax",
    "weights cut to a triangle",
)


@pytest.mark.parametrize("name", MUST_BE_KEPT)
def test_hopeless_mutation_is_kept_with_a_reason(name: str) -> None:
    for form in CANONICAL:
        subject = capture(form).subject()
        if MUTATIONS[name].edit(subject):
            subject.finish()
            report = subject.rewrite()
            assert not report.rewritten, f"{form}: {report}"
            assert all(site.reason for site in report.kept)


# --- nn.MultiheadAttention, which is one call in a captured graph -----------------------------

MODULE_SHAPES: Final = ((LENGTH, BATCH, WIDTH), (3 * WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,))
CAUSAL: Final = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING: Final = torch.zeros(BATCH, LENGTH, dtype=torch.bool).index_fill_(1, torch.tensor(7), True)


def multi_head(**changes: Any) -> Callable[..., Any]:
    """The function behind the module, with some arguments changed."""

    def function(x: Tensor, w: Tensor, w_out: Tensor, extra: Tensor) -> Any:
        arguments: dict[str, Any] = {
            "embed_dim_to_check": WIDTH,
            "num_heads": HEADS,
            "in_proj_weight": w,
            "in_proj_bias": None,
            "bias_k": None,
            "bias_v": None,
            "add_zero_attn": False,
            "dropout_p": 0.2,
            "out_proj_weight": w_out,
            "out_proj_bias": None,
            "training": False,
            "need_weights": False,
            "attn_mask": CAUSAL,
        }
        given = {
            name: extra.view(1, 1, -1) if value == "extra" else value
            for name, value in changes.items()
        }
        return F.multi_head_attention_forward(x, x, x, **{**arguments, **given})

    return function


MODULE_MUTATIONS: Final[dict[str, dict[str, Any]]] = {
    "dropout in training": {"training": True},
    "weights returned": {"need_weights": True},
    "weights of each head returned": {"need_weights": True, "average_attn_weights": False},
    "a column of zeros": {"add_zero_attn": True},
    "a column of its own": {"bias_k": "extra", "bias_v": "extra"},
    "fewer heads": {"num_heads": HEADS // 2},
    "other mask": {"attn_mask": CAUSAL.mT},
    "shifted mask": {"attn_mask": CAUSAL.roll(1, 1)},
    "dead rows": {"attn_mask": torch.ones_like(CAUSAL)},
    "no mask": {"attn_mask": None},
    "padding": {"key_padding_mask": PADDING},
    "padding of every key": {"key_padding_mask": torch.ones_like(PADDING)},
    "other biases": {"attn_mask": CAUSAL * 0.5},
}


def module_inputs() -> list[Tensor]:
    return Canonical(chain, MODULE_SHAPES).inputs()


def test_module_is_rewritten() -> None:
    report = check(multi_head(), *module_inputs())
    assert len(report.rewritten) == 1, str(report)


@pytest.mark.parametrize("name", MODULE_MUTATIONS)
def test_module_mutation(name: str) -> None:
    function, inputs = multi_head(**MODULE_MUTATIONS[name]), module_inputs()
    check(function, *inputs)
    was, now = (
        [leaf for leaf in pytree.tree_leaves(made(*inputs)) if isinstance(leaf, Tensor)]
        for made in (multi_head(), function)
    )
    assert not alike(now, was)
