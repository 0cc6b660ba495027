"""Random masks: programs of plain PyTorch that return masks for scores of any size.

A program is source text, so that its numbers are literals and a failure can be read. It has the
scores ``s`` (Lq, Lk), the bool tensors ``pad`` (2, Lk) and ``full`` (2, 1, Lq, Lk), and ``bias``
(3, Lq, Lk).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from tests.passes.masked_softmax import ADDITIVE, HIDDEN, VISIBLE, Kind

LOWEST: Final = torch.finfo(torch.float32).min
SIZES: Final = ((5, 7), (6, 6), (7, 4), (3, 3), (1, 6), (6, 1), (2, 9), (1, 1))


@dataclass(frozen=True)
class Program:
    """``function`` of (s, pad, full, bias) returns a tuple of masks of these kinds."""

    source: str
    function: Callable[..., tuple[Tensor, ...]]
    kinds: tuple[Kind, ...]


def inputs(query: int, key: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed + 100 * query + key)

    def rand(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    scores = 4 * torch.randn(query, key, generator=generator)
    bias = torch.randn(3, query, key, generator=generator)
    return scores, rand(2, key) > 0.3, rand(2, 1, query, key) > 0.3, bias


def program(seed: int) -> Program:
    """The program of a seed."""
    choose = random.Random(seed)
    masks: list[str] = []
    kinds: list[Kind] = []
    for _ in range(choose.choice((1, 1, 1, 2, 2, 3))):
        if choose.random() < 0.5:
            masks.append(_bool(choose, 3))
            fill = choose.choice((-math.inf, -math.inf, LOWEST, -1e9))
            kinds.append((choose.choice((VISIBLE, VISIBLE, HIDDEN)), fill))
        else:
            masks.append(_additive(choose, 2))
            kinds.append((ADDITIVE, -math.inf))
    body = ",\n        ".join(masks)
    source = f"{_PREAMBLE}\ndef masks(s, pad, full, bias):\n    Lq, Lk = s.shape\n    return (\n"
    source += f"        {body},\n    )\n"
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return Program(source, namespace["masks"], tuple(kinds))


_PREAMBLE: Final = """import torch
from math import inf


def and_in_place(x, y, size):
    x = x.expand(2, 1, *size).clone()
    x &= y
    return x


def narrowed(x, y, size):
    x = x.expand(2, 3, *size).contiguous()
    x.logical_and_(y)
    return x[:, :1]


def cleared(x, y, size):
    x = x.expand(2, 1, *size).clone()
    x[~y.expand(2, 1, *size)] = False
    return x


def add_in_place(x, y, size):
    x = x.expand(2, 3, *size).clone()
    x += y
    return x


def triu_in_place(fill, diagonal, size):
    x = torch.full(size, fill)
    x.triu_(diagonal)
    return x[None, None]


def written(fill, width, size):
    x = torch.zeros(size)
    x[:, :width] = fill
    return x
"""

_SIZE: Final = "(Lq, Lk)"


def _positions(choose: random.Random) -> tuple[str, str]:
    """Expressions for query and key positions that broadcast against each other."""
    offset = choose.choice((0, 0, 0, 1, -1, 2, 3))
    add = f" + {offset}" if offset else ""
    if choose.random() < 0.4:
        add += " + Lk - Lq"
    return choose.choice(
        [
            (f"(torch.arange(Lq)[:, None]{add})", "torch.arange(Lk)[None]"),
            (
                f"(torch.arange(Lq){add})[None, None, :, None]",
                "torch.arange(Lk)[None, None, None, :]",
            ),
            (f"torch.arange({offset}, Lq + {offset}).unsqueeze(-1)", "torch.arange(Lk)"),
            ("torch.arange(Lq).view(1, Lq, 1)", f"torch.arange(Lk).sub(0{add}).view(1, 1, -1)"),
            (
                f"(torch.ones(Lq, dtype=torch.int64).cumsum(0) - 1{add}).unsqueeze(1)",
                "torch.arange(Lk).expand(Lq, Lk)",
            ),
            (
                f"(2 * torch.arange(Lq)[:, None]{add})",
                "(torch.arange(Lk)[None] + torch.arange(Lq)[:, None])",
            ),
        ]
    )


def _condition(choose: random.Random) -> str:
    query, key = _positions(choose)
    diagonal, width = choose.choice((0, 0, 1, -1, 2, -2)), choose.choice((0, 1, 2, 4))
    return choose.choice(
        [
            f"({key} <= {query})",
            f"torch.ge({query}, {key})",
            f"({key} > {query} - {width})",
            f"(({query} - {key}).abs() <= {width})",
            f"(~(({key} - {query}).abs() > {width}))",
            f"torch.ones({_SIZE}, dtype=torch.bool).tril({diagonal})",
            f"(torch.ones({_SIZE}).triu({diagonal}) == 1)",
            f"torch.ones({_SIZE}, dtype=torch.bool).tril(Lk - Lq)",
            "pad[:, None, None, :]",
            "full.clone()",
            "(torch.arange(Lk) < Lk)",
            "(torch.arange(Lq)[:, None] >= 0)",
            "((torch.arange(Lq)[:, None] - torch.arange(Lk)) % 2 == 0)",
            "(torch.arange(Lq)[:, None] // 3 == torch.arange(Lk) // 3)",
            f"pad.any(0)[None].expand{_SIZE}",
            f"torch.eye(*{_SIZE}, dtype=torch.bool)",
        ]
    )


def _bool(choose: random.Random, depth: int) -> str:
    if depth == 0 or choose.random() < 0.25:
        return _condition(choose)
    a, b = _bool(choose, depth - 1), _bool(choose, depth - 1)
    return choose.choice(
        [
            f"({a} & {b})",
            f"({a} & {b})",
            f"torch.logical_and({a}, {b})",
            f"({a} * {b})",
            f"({a} | {b})",
            f"(~(~{a} | ~{b}))",
            f"(~{a})",
            f"{a}.expand(2, 1, *{_SIZE})",
            f"({a}.to(torch.float32) == 1)",
            f"({a}.long() * {b}.long()).bool()",
            f"and_in_place({a}, {b}, {_SIZE})",
            f"narrowed({a}, {b}, {_SIZE})",
            f"cleared({a}, {b}, {_SIZE})",
            f"torch.where({a}, {b}, False)",
            f"{a}.masked_fill(~{b}, False)",
        ]
    )


def _additive(choose: random.Random, depth: int) -> str:
    mask = _bool(choose, 2)
    fill = choose.choice(("-inf", "-inf", str(LOWEST), "-1e9", "-1e4"))
    finite = "-1e30" if fill == "-inf" else fill
    diagonal = choose.choice((1, 1, 0, 2))
    if depth and choose.random() < 0.4:
        a, b = _additive(choose, depth - 1), _additive(choose, depth - 1)
        return choose.choice(
            [f"({a} + {b})", f"torch.add({a}, {b})", f"add_in_place({a}, {b}, {_SIZE})"]
        )
    upper = f"torch.ones({_SIZE}, dtype=torch.bool).triu({diagonal})"
    return choose.choice(
        [
            f"torch.where({mask}, 0.0, {fill})",
            f"torch.where(~{mask}, {fill}, 0.0)",
            f"torch.zeros(2, 3, *{_SIZE}).masked_fill(~{mask}, {fill})",
            f"((1 - {mask}.to(torch.float32)) * {finite})",
            f"torch.full({_SIZE}, {fill}).triu({diagonal})",
            f"triu_in_place({fill}, {diagonal}, {_SIZE})",
            f"written({fill}, {choose.choice((0, 1, 2))}, {_SIZE})",
            "(bias * 1)",
            f"torch.zeros(1, 1, *{_SIZE})",
            f"torch.where({mask}, torch.zeros(()), torch.full((), {fill}))",
            f"torch.zeros({_SIZE}).masked_fill({upper}, {fill}).expand(2, 1, *{_SIZE})",
            "((torch.arange(Lk) - torch.arange(Lq)[:, None]).float() * 0.5)",
            f"torch.where({mask}, bias[:1], {fill})",
        ]
    )
