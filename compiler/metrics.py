"""How far one attention, or one model output, is from another: the metrics of the papers.

Sources: SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958): cosine similarity
and relative L1 = sum |O' - O| / sum |O| over the flattened output, and RMSE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import inf, isfinite, sqrt
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

HIGHER_IS_BETTER: Final = frozenset({"cosine", "head_cosine"})
# What a budget of a layer may be about.
LAYER_METRICS: Final = ("cosine", "rel_l1", "rmse", "head_cosine", "head_rel_l1")


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of one recipe in one layer against exact attention; the worst over all calls.

    Attributes:
        cosine: least cosine similarity of a whole output, flattened.
        rel_l1: greatest sum |O' - O| / sum |O| of a whole output.
        rmse: greatest root mean square error of a whole output.
        head_cosine, head_rel_l1: the same of a single head of a single sequence.
        mean_cosine, mean_rel_l1: averages over the calls.
        calls: how many calls these are of.
    """

    cosine: float
    rel_l1: float
    rmse: float
    head_cosine: float
    head_rel_l1: float
    mean_cosine: float
    mean_rel_l1: float
    calls: int = 1

    def join(self, other: Errors) -> Errors:
        """The errors over the calls of both."""
        calls = self.calls + other.calls
        return Errors(
            cosine=min(self.cosine, other.cosine),
            rel_l1=max(self.rel_l1, other.rel_l1),
            rmse=max(self.rmse, other.rmse),
            head_cosine=min(self.head_cosine, other.head_cosine),
            head_rel_l1=max(self.head_rel_l1, other.head_rel_l1),
            mean_cosine=(self.mean_cosine * self.calls + other.mean_cosine * other.calls) / calls,
            mean_rel_l1=(self.mean_rel_l1 * self.calls + other.mean_rel_l1 * other.calls) / calls,
            calls=calls,
        )

    def beyond(self, limits: Mapping[str, float]) -> str | None:
        """The first limit that is not kept, in words; None when all are.

        Args:
            limits: names of ``LAYER_METRICS``; a least value for cosines, a greatest for the rest.
        """
        for name, limit in limits.items():
            value = getattr(self, name)
            if name in HIGHER_IS_BETTER:
                if not value >= limit:
                    return f"{name} {value:.6f} is below {limit}"
            elif not value <= limit:
                return f"{name} {value:.4g} is above {limit}"
        return None


EXACT_ERRORS: Final = Errors(1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)


def compare(actual: Tensor, expected: Tensor) -> Errors:
    """The errors of one output (B, H, L, Dv) against another.

    Where both are NaN, or the same infinity, they agree: a row that sees nothing is NaN in both. A
    number that only one of them has is an infinite error, with a cosine of -1.
    """
    if expected.numel() == 0:
        return EXACT_ERRORS
    a, e = actual.double(), expected.double()  # squares of what float32 holds overflow in it
    usual = e.isfinite()
    if not bool(usual.all()):
        same = (a == e) | (a.isnan() & e.isnan())
        # Both zero where they agree on something that is no number; else the difference stays.
        a = torch.where(usual, a, torch.where(same, 0.0, torch.nan))
        e = torch.where(usual, e, 0.0)
    dims = (-2, -1)  # sums over one head of one sequence, then over those
    sums = torch.stack(
        [
            (a * e).sum(dims),
            (a * a).sum(dims),
            (e * e).sum(dims),
            (a - e).abs().sum(dims),
            e.abs().sum(dims),
            (a - e).square().sum(dims),
        ]
    )
    heads = sums.flatten(1)
    whole = heads.sum(1, keepdim=True)
    cosine, rel_l1 = _ratios(whole)
    head_cosine, head_rel_l1 = _ratios(heads)
    square = float(whole[5])
    least, most = float(cosine), float(rel_l1)
    return Errors(
        cosine=least,
        rel_l1=most,
        rmse=sqrt(square / expected.numel()) if isfinite(square) else inf,
        head_cosine=float(head_cosine.min()),
        head_rel_l1=float(head_rel_l1.max()),
        mean_cosine=least,
        mean_rel_l1=most,
    )


def _ratios(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and relative L1 of each column of sums (6, n)."""
    product, actual, expected, difference, size = sums[:5]
    equal = difference == 0
    cosine = (product / (actual.sqrt() * expected.sqrt())).clamp(-1, 1)
    # 0 / 0: zeros against zeros agree, and zeros against anything else have nothing in common.
    cosine = torch.where(equal, 1.0, cosine.nan_to_num(nan=0.0))
    rel_l1 = torch.where(equal, 0.0, (difference / size).nan_to_num(nan=inf, posinf=inf))
    broken = ~difference.isfinite()
    return cosine.masked_fill(broken, -1.0), rel_l1.masked_fill(broken, inf)


def leaves(output: Any) -> Iterator[Any]:
    """What a model's output is made of: the contents of containers and dataclasses, in order."""
    for leaf in pytree.tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            yield from leaves([getattr(leaf, item.name) for item in fields(leaf)])
        else:
            yield leaf


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a model's output, whatever it is made of, in order."""
    for leaf in leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def output_rel_l1(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Relative L1 of two outputs of a model: the worst of their floating-point tensors.

    Not that of all together, where a large tensor would hide what becomes of a small one.

    Raises:
        ValueError: the outputs are made of different tensors.
    """
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            raise ValueError(f"outputs of shapes {tuple(a.shape)} and {tuple(e.shape)}")
        e = e.to(a.device)
        agree = (a == e) | (a.isnan() & e.isnan())
        distance = torch.where(agree, 0.0, (a.double() - e.double()).abs())
        difference = float(distance.sum())
        size = float(torch.where(e.isfinite(), e, 0.0).abs().sum(dtype=torch.float64))
        if difference:
            worst = max(worst, difference / size if size and difference == difference else inf)
    return worst
