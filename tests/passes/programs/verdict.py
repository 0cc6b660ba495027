"""Whether a rewritten program computes what the program computes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sage_compiler.report import Report
from tests.passes.checks import Compiled
from tests.passes.programs.draft import Program

TOLERANCE: Final = 1e-5  # of values, where they are above one relative to them
GRADIENT_TOLERANCE: Final = 1e-4
_KINDS: Final = (
    ("result", TOLERANCE),
    ("input", TOLERANCE),
    ("gradient", GRADIENT_TOLERANCE),
)

Leaves = tuple[list[Any], list[Any], list[Any]]  # results, inputs afterwards, gradients
# Compiles a program: what to call instead, and what gives the report on all graphs so far.
Runner = Callable[[Program], tuple[Callable[..., Any], Callable[[], Report]]]


def through_passes(program: Program) -> tuple[Callable[..., Any], Callable[[], Report]]:
    """Rewritten graphs, run as they are."""
    compiled = Compiled(program.function(), dynamic=True if program.dynamic else None)
    return compiled, lambda: compiled.report


def verdict(program: Program, runner: Runner = through_passes) -> Report:
    """Run a program as it is and rewritten; what the passes report.

    Raises:
        AssertionError: the two differ; the message says how, and shows the program.
    """
    compiled, reported = runner(program)
    problems = _compare(_Run(program, program.inputs), compiled)
    report = reported()
    if len(report.graphs) != 1:
        problems.append(f"{len(report.graphs)} graphs, not one")
    if program.again:
        problems += [
            f"with other lengths, {problem}"
            for problem in _compare(_Run(program, program.again), compiled)
        ]
    assert not problems, "\n".join([*problems, str(report), str(program)])
    return report


class _Run:
    """Runs variants of one program on the same inputs, with the same random numbers."""

    def __init__(self, program: Program, inputs: Sequence[Tensor]) -> None:
        self.program = program
        self.inputs = inputs

    def leaves(self, function: Callable[..., Any], dtype: torch.dtype | None = None) -> Leaves:
        inputs = copy.deepcopy(list(self.inputs))
        if dtype is not None:
            inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        if self.program.gradients:
            inputs = [x.requires_grad_(x.is_floating_point()) for x in inputs]
        torch.manual_seed(self.program.seed)
        results = pytree.tree_leaves(function(*inputs))
        gradients = self._gradients(results, inputs) if self.program.gradients else []
        return results, [x.detach() for x in inputs], gradients

    def _gradients(self, results: list[Any], inputs: list[Tensor]) -> list[Tensor]:
        """Of a sum of all results, each element with a weight of its own."""
        generator = torch.Generator().manual_seed(self.program.seed)
        loss = torch.zeros(())
        for result in results:
            if isinstance(result, Tensor) and result.requires_grad:
                weight = torch.randn(result.shape, generator=generator)
                loss = loss + (result.nan_to_num() * weight).sum()
        sources = [x for x in inputs if x.requires_grad]
        if not loss.requires_grad:
            return [torch.zeros_like(x) for x in sources]
        return list(torch.autograd.grad(loss, sources, allow_unused=True, materialize_grads=True))


def _compare(run: _Run, compiled: Callable[..., Any]) -> list[str]:
    """How what a compiled program computes differs from what the program does."""
    wanted, found = run.leaves(run.program.function()), run.leaves(compiled)
    reference = functools.cache(lambda: run.leaves(run.program.wide(), torch.float64))
    problems = []
    for kind, (name, tolerance) in enumerate(_KINDS):
        if len(found[kind]) != len(wanted[kind]):
            problems.append(f"{len(found[kind])} {name}s, expected {len(wanted[kind])}")
            continue
        for at, pair in enumerate(zip(found[kind], wanted[kind], strict=True)):
            exact = functools.partial(lambda kind, at: reference()[kind][at], kind, at)
            problem = _difference(*pair, tolerance, exact, strict=name != "gradient")
            if problem is not None:
                problems.append(f"{name} {at}: {problem}")
    return problems


def _difference(
    actual: Any, expected: Any, tolerance: float, exact: Callable[[], Any], strict: bool
) -> str | None:
    """How one leaf differs from what it is to be, or None."""
    if not isinstance(expected, Tensor):
        return None if actual == expected else f"{actual}, expected {expected}"
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return f"{getattr(actual, 'shape', actual)}, expected {expected.shape}"
    if actual.dtype != expected.dtype:
        return f"{actual.dtype}, expected {expected.dtype}"
    if strict and _strides(actual) != _strides(expected):
        return f"strides {actual.stride()}, expected {expected.stride()}"
    if strict and actual.requires_grad != expected.requires_grad:
        return f"requires_grad {actual.requires_grad}, expected {expected.requires_grad}"
    if not expected.is_floating_point():
        return None if torch.equal(actual, expected) else "other integers"
    return _numeric_difference(actual.detach(), expected.detach(), tolerance, exact, strict)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides that say where an element lies: not those of dims of size one."""
    if tensor.numel() == 0:
        return ()
    return tuple(
        stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )


def _numeric_difference(
    actual: Tensor, expected: Tensor, tolerance: float, exact: Callable[[], Any], strict: bool
) -> str | None:
    """Values within the tolerance; else not much farther from float64 than eager is.

    That is twice as far in a half precision. In float32, eight times: a bias of -1e4 leaves four
    digits of the scores, and adding it in another order other ones. A half precision's tolerance
    is its unit in the last place at the size of the tensor. Where eager overflows and float64
    does not, anything is right.
    """
    single = expected.dtype in (torch.float32, torch.float64)
    found, wanted = actual.double(), expected.double()
    finite = wanted.isfinite()
    largest = wanted[finite].abs().max() if finite.any() else torch.zeros(())
    if single:
        allowed = tolerance * wanted.abs().clamp(min=1)
    else:
        allowed = (torch.finfo(expected.dtype).eps * largest).expand(wanted.shape)
    same = torch.where(finite, (found - wanted).abs() <= allowed, _alike(found, wanted))
    if not strict:
        same |= ~finite
    if same.all():
        return None
    reference = exact().detach()
    if not single:
        same |= ~finite & reference.isfinite()
    bound = (8 if single else 2) * _error_of_rows(
        (wanted - reference).abs(), largest, single
    ) + allowed
    same |= finite & ((found - reference).abs() <= bound)
    if same.all():
        return None
    at = tuple(int(index) for index in (~same).nonzero()[0])
    return (
        f"{int((~same).sum())} of {same.numel()} elements differ; at {at} {found[at]:.6g}, "
        f"eager {wanted[at]:.6g}, in float64 {reference[at]:.6g}"
    )


def _error_of_rows(error: Tensor, largest: Tensor, single: bool) -> Tensor:
    """For each row the largest error of rows like it.

    Rows that eager gets grossly wrong (every key hidden by -1e4, which rounds the scores away)
    say nothing about the others.
    """
    rows = error.nan_to_num(0, 0, 0).amax(-1, keepdim=True) if error.dim() else error.nan_to_num(0)
    gross = rows > (0.01 if single else 0.1) * largest.clamp(min=1)
    ordinary = torch.where(gross, 0, rows).amax()
    return torch.where(gross, rows.amax(), ordinary)


def _alike(found: Tensor, wanted: Tensor) -> Tensor:
    return (found == wanted) | (found.isnan() & wanted.isnan())
