"""Extras that make a program something else than one plain attention, or hide that it is one.

The rewritten program must compute what the program computes, whatever the detector does.
Each extra knows the moment at which it adds lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch

from tests.passes.programs.draft import Draft

# An assignment into a tensor: x.mul_(2), x += 1, x[...] = 1.
_IN_PLACE: Final = re.compile(r"\w_\(|[-+*/]= |\] = ")
# Of a key or value: not where it may be an expanded view, whose heads are one.
_OF_KEYS: Final = re.compile(r"\b[kv](\[|\.\w+_\(|\.transpose| [-+*/]= )")


class Moment(StrEnum):
    """Between which parts of the program lines are added."""

    INPUTS = "after q, k and v"
    PRODUCT = "after Q K^T"
    TERMS = "after the masks"
    WEIGHTS = "after the softmax"
    OUTPUT = "after the second product"


@dataclass(frozen=True, slots=True)
class Extra:
    """Lines to choose from at a moment.

    Attributes:
        name: why the attention may be kept.
        lines: the choices, or None where the program cannot have it; of the axis of the keys,
            counted from the end, and the draft.
    """

    name: str
    moment: Moment
    lines: Callable[[Draft, int], list[str] | None]


def _always(*lines: str) -> Callable[[Draft, int], list[str] | None]:
    return lambda draft, axis: [line.replace("{axis}", str(axis)) for line in lines]


def _square(*lines: str) -> Callable[[Draft, int], list[str] | None]:
    """Only where the last two dims of scores and weights have one size."""

    def choices(draft: Draft, axis: int) -> list[str] | None:
        square = draft.sizes.query_length == draft.sizes.key_length
        usual = draft.frame.endswith(("qk", "kq"))
        return list(lines) if square and usual and not draft.sinks else None

    return choices


def _by_key(draft: Draft, axis: int) -> list[str] | None:
    if draft.sinks:
        return None
    shape = [draft.sizes.key_length] + [1] * (-axis - 1)
    name = draft.floats("by_key", shape)
    return [f"s = s * {name}", f"s = s / ({name}.abs() + 1)", f"s *= {name}"]


def _mix_heads(target: str) -> Callable[[Draft, int], list[str] | None]:
    def choices(draft: Draft, axis: int) -> list[str] | None:
        if draft.frame != "bhqk" or draft.sizes.heads == 1:
            return None
        name = draft.floats("mix", (draft.sizes.heads, draft.sizes.heads))
        return [f'{target} = torch.einsum("bhqk,hg->bgqk", {target}, {name}.to({target}.dtype))']

    return choices


def _key_weights(draft: Draft, axis: int) -> list[str] | None:
    shape = [draft.sizes.key_length] + [1] * (-axis - 1)
    name = draft.floats("bias_late", shape)
    return [f"a = a + {name}", f"a += {name}", f"a = a * {name}"]


def _masked_values(draft: Draft, axis: int) -> list[str] | None:
    shape = [draft.size(at) if at == "k" else 1 for at in draft.value_letters]
    name = draft.bools("v_mask", shape, 0.3)
    return [f"v = v.masked_fill({name}, 0.0)", f"v = v * {name}", f"v = v.masked_fill({name}, 1e4)"]


def _late_mask(draft: Draft, axis: int) -> list[str] | None:
    name = draft.bools("a_mask", [draft.sizes.key_length] + [1] * (-axis - 1), 0.5)
    return [
        f"a = a.masked_fill({name}, 0.0)",
        f"a = a * {name}.to(a.dtype)",
        f"a = torch.where({name}, a, 0.0)",
        f"a.masked_fill_({name}, 0.0)",
    ]


def _source_changed(draft: Draft, axis: int) -> list[str] | None:
    """An input of which q, k or v may be a view, changed after its use."""
    stems = ("q_in", "k_in", "v_in", "qkv_in", "x")
    names = [name for name in draft.inputs if name.startswith(stems)]
    if not names:
        return None
    name = draft.pick(names)
    return [f"{name}.mul_(2)", f"{name}[..., -1] = 0", f"{name}[-1:] += 1"]


def _given_changed(draft: Draft, axis: int) -> list[str] | None:
    """An input that is a bias, changed after it was added."""
    names = [name for name in draft.inputs if name.startswith(("bias_in", "mask"))]
    if not names:
        return None
    name = draft.pick(names)
    return [f"{name}.logical_not_()"] if name.startswith("mask") else [f"{name}.mul_(3)"]


def _wrong_dim(draft: Draft, axis: int) -> list[str] | None:
    """Instead of the line that took the softmax."""
    if draft.sinks or "softmax(" not in draft.lines[-1]:
        return None
    draft.lines.pop()
    other = draft.pick([dim for dim in range(-len(draft.frame), 0) if dim != axis])
    return [f"a = torch.softmax(s, dim={other})", f"a = s.softmax({other + len(draft.frame)})"]


EXTRAS: Final = [
    Extra(
        "query or key changed after use",
        Moment.PRODUCT,
        _always("q.mul_(2)", "k.add_(1)", "k.zero_()", "q[..., 0] = 1", "q.neg_()", "k *= 0.5"),
    ),
    Extra(
        "query or key changed late",
        Moment.WEIGHTS,
        _always("q.mul_(2)", "k.add_(1)", "k.zero_()", "k[..., 0].fill_(1)", "q.sub_(k.sum())"),
    ),
    Extra(
        "values changed",
        Moment.TERMS,
        _always("v.mul_(2)", "v.add_(1)", "v[..., 0] = 1", "v.transpose(-1, -2).mul_(0.5)"),
    ),
    Extra("values changed after use", Moment.OUTPUT, _always("v.mul_(2)", "v.zero_()")),
    Extra(
        "scores changed through a view",
        Moment.TERMS,
        _always(
            "s[..., 0] += 1",
            "s.select(-1, 0).mul_(0.5)",
            "s.transpose(-1, -2)[..., 0] = 0.25",
            "part = s[..., :1]; part.fill_(0.5)",
            "s.detach().add_(1)",
        ),
    ),
    Extra(
        "weights changed through a view",
        Moment.WEIGHTS,
        _always("a[..., 0] += 1", "a.select(-1, 0).mul_(0.5)", "a.transpose(-1, -2)[..., 0] = 0"),
    ),
    Extra("an input changed after Q K^T", Moment.PRODUCT, _source_changed),
    Extra("an input changed after the softmax", Moment.WEIGHTS, _source_changed),
    Extra("an input changed after all", Moment.OUTPUT, _source_changed),
    Extra(
        "query, key or value detached",
        Moment.INPUTS,
        _always("k = k.detach()", "q = q.detach()", "v = v.detach()"),
    ),
    Extra("a bias or mask changed after use", Moment.WEIGHTS, _given_changed),
    Extra("a scale by key", Moment.TERMS, _by_key),
    Extra(
        "scores changed by a function",
        Moment.TERMS,
        _always(
            "s = s.clamp(-1, 1)",
            "s = s.relu()",
            "s = torch.tanh(s)",
            "s = s * s",
            "s = s.abs()",
            "s = s + torch.rand_like(s)",
            "s = torch.nan_to_num(s, neginf=-3.0)",
            "s = s.half().to(s.dtype)",
            "s = s.detach()",
            "with torch.no_grad(): s = s * 0.5",
            "s = torch.where(s > 0.5, s, -1.0)",
            "s = s - s.mean({axis}, keepdim=True)",
            "s = s + s.roll(1, {axis})",
            "s = torch.softmax(s, {axis})",
            "s = s.masked_fill(s < s.topk(1, {axis}).values, float('-inf'))",
        ),
    ),
    Extra("scale after the mask", Moment.TERMS, _always("s = s * 0.5", "s = s / 3", "s *= -1")),
    Extra("bool added", Moment.TERMS, _always("s = s + (s > 0)", "s += (s > 0)")),
    Extra("scores transposed", Moment.TERMS, _square("s = s.mT", "s = s.transpose(-1, -2)")),
    Extra("heads mixed before", Moment.TERMS, _mix_heads("s")),
    Extra("heads mixed after", Moment.WEIGHTS, _mix_heads("a")),
    Extra("wrong softmax dim", Moment.WEIGHTS, _wrong_dim),
    Extra("mask on the values", Moment.TERMS, _masked_values),
    Extra("mask on the weights", Moment.WEIGHTS, _late_mask),
    Extra("bias on the weights", Moment.WEIGHTS, _key_weights),
    Extra(
        "weights changed by a function",
        Moment.WEIGHTS,
        _always(
            "a = a * 0.5",
            "a = a + 1e-3",
            "a = a ** 2",
            "a = a / (a.sum({axis}, keepdim=True) + 1e-9)",
            "a = a * (a > 0.1)",
            "a = torch.softmax(a, {axis})",
            "a = 1 - a",
            "a = F.dropout(a, 0.2, True)",
            "a = F.dropout(a, 0.2)",
            "a = torch.nan_to_num(a, nan=0.25)",
            "a = a.roll(1, {axis})",
            "a = a - a.mean({axis}, keepdim=True)",
            "a = torch.where(a > 0.05, a, 0.0)",
            "a = a.clamp(max=0.5)",
            "a = a.flip({axis})",
            "a = torch.sigmoid(s)",
            "a = a - 0.3 * torch.softmax(s * 0.5, {axis})",
            "a = a.detach()",
            "with torch.no_grad(): a = a * 1.0",
        ),
    ),
    Extra("weights transposed", Moment.WEIGHTS, _square("a = a.mT", "a = a.transpose(-1, -2)")),
    Extra(
        "scores used elsewhere",
        Moment.TERMS,
        _always("extra = s.exp().sum()", "extra = s.clone()", "extra = s", "extra = s * 2"),
    ),
    Extra(
        "scores used before the masks",
        Moment.PRODUCT,
        _always("extra = s.sum()", "extra = s.clone()", "extra = s", "extra = s.mT"),
    ),
    Extra(
        "weights used elsewhere",
        Moment.WEIGHTS,
        _always("extra = a", "extra = a.mean()", "extra = a.argmax({axis})", "extra = a.sum(1)"),
    ),
    Extra("output changed", Moment.OUTPUT, _always("o.mul_(2)", "o[..., 0] = 0", "o += 1")),
    Extra(
        "query, key or value used elsewhere",
        Moment.OUTPUT,
        _always("o = o + q.sum()", "o = o * k.mean()", "extra = k", "extra = (q, v)"),
    ),
]


def draw_extras(draft: Draft, share: float) -> list[Extra]:
    """None as a rule; one or two for a share of the programs."""
    if not draft.chance(share):
        return []
    return draft.rng.sample(EXTRAS, draft.weighted({1: 4, 2: 1}))


def add_extras(draft: Draft, extras: list[Extra], moment: Moment) -> None:
    """Emit the lines of the extras whose moment it is."""
    for extra in extras:
        if extra.moment != moment:
            continue
        axis = draft.frame.index("k") - len(draft.frame)
        lines = [line for line in extra.lines(draft, axis) or [] if _possible(draft, line)]
        if lines:
            draft.doubt(f"hostile: {extra.name}")
            draft.emit(*draft.pick(lines).split("; "))


def _possible(draft: Draft, line: str) -> bool:
    if _IN_PLACE.search(line):
        shared = draft.features & {"heads: expand", "heads: expand one"}
        if draft.gradients or (shared and _OF_KEYS.search(line)):
            return False
    if re.search(r"rand_like|dropout", line) and draft.dtype != torch.float32:
        return False  # the reference in float64 draws other numbers
    return not (draft.sinks and re.search(r"a = .*\bs\b", line))
