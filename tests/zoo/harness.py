"""Run one case of the zoo: eager, and rewritten with precision="exact"; compare and count."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
import transformers
from torch import Tensor, fx, nn

from sage_compiler.precision import EXACT
from sage_compiler.report import Report
from tests.capture import rewritten
from tests.passes.checks import Compiled
from tests.zoo.architecture import BOTH, Architecture, seeded, tokens

OUTPUT_TOLERANCE: Final = 1e-5
GRADIENT_TOLERANCE: Final = 1e-4

PLAIN: Final = "plain"
PADDED: Final = "padded"
DYNAMIC: Final = "dynamic"
PADDED_DYNAMIC: Final = "padded dynamic"
TRAINING: Final = "training"
DYNAMIC_CACHE: Final = "dynamic cache"
STATIC_CACHE: Final = "static cache"
CIRCUMSTANCES: Final = (
    PLAIN,
    PADDED,
    DYNAMIC,
    PADDED_DYNAMIC,
    TRAINING,
    DYNAMIC_CACHE,
    STATIC_CACHE,
)
PROMPT: Final = 8  # tokens, before single ones are decoded
STEPS: Final = 4


# The outputs, and the gradient of each parameter.
Evaluation: TypeAlias = tuple[list[Tensor], list[Tensor | None]]


@dataclass(frozen=True, slots=True)
class Case:
    """One architecture, the way its attention is written, and the circumstances it runs in."""

    architecture: Architecture
    implementation: str
    circumstances: str

    @property
    def padded(self) -> bool:
        return self.circumstances in (PADDED, PADDED_DYNAMIC)

    @property
    def dynamic(self) -> bool | None:
        """As torch.compile takes it; None leaves the first capture static."""
        return True if self.circumstances in (DYNAMIC, PADDED_DYNAMIC) else None

    @property
    def training(self) -> bool:
        return self.circumstances == TRAINING

    @property
    def decoding(self) -> bool:
        return self.circumstances in (DYNAMIC_CACHE, STATIC_CACHE)

    def __str__(self) -> str:
        return f"{self.architecture.name} [{self.implementation}, {self.circumstances}]"


@dataclass(frozen=True, slots=True)
class Captures:
    """What Dynamo made of a call: graphs, and graph breaks by their reasons."""

    graphs: int
    breaks: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case.

    Attributes:
        report: every site, from all graphs of one call, or of a prompt and the steps after it.
        output_error: the largest difference from eager, relative to max(1, largest output).
        gradient_error: the same of the parameters' gradients; 0 outside training.
        with_us, without_us: what Dynamo captured with the passes and without.
    """

    report: Report
    output_error: float
    gradient_error: float
    with_us: Captures
    without_us: Captures


def cases_of(architecture: Architecture) -> Iterator[Case]:
    """All cases of one architecture."""
    for implementation in architecture.implementations:
        for circumstances in CIRCUMSTANCES:
            case = Case(architecture, implementation, circumstances)
            if (
                (architecture.pads or not case.padded)
                and (architecture.trains or not case.training)
                and (architecture.decodes or not case.decoding)
            ):
                yield case


def built(case: Case) -> nn.Module:
    """The module of a case, seeded, in its mode, without a gradient unless it trains."""
    torch.manual_seed(0)
    module = seeded(case.architecture.build(case.implementation))
    check_implementation(module, case.implementation)
    module.requires_grad_(case.training)
    return module.train(case.training)


def check_implementation(module: nn.Module, implementation: str) -> None:
    """A transformers model may fall back to another attention; then a case tests nothing.

    Raises:
        AssertionError: a module that attends was configured otherwise than asked for.
    """
    for name, child in module.named_modules():
        config = getattr(child, "config", None)
        used = getattr(config, "_attn_implementation", implementation)
        if implementation in BOTH and not name.startswith("backbone"):
            assert used == implementation, f"{name or '(root)'} uses {used}"


def run(case: Case) -> Result:
    """Run a case in eager mode, captured without the passes, and rewritten."""
    module = built(case)
    with torch.set_grad_enabled(case.training):
        expected, expected_gradients = evaluate(module, case)
        without_us = captures_of(lambda: evaluate(module, case, captured(module, case)))
        ours = Rewritten(module, case)
        results: list[Evaluation] = []
        with_us = captures_of(lambda: results.append(evaluate(module, case, ours)))
    ((actual, gradients),) = results
    return Result(
        ours.report,
        largest_difference(actual, expected),
        largest_difference(gradients, expected_gradients),
        with_us,
        without_us,
    )


class Rewritten:
    """A module called through Dynamo and the passes; ``report`` says what they did."""

    def __init__(self, module: nn.Module, case: Case) -> None:
        # Of the module alone: layers would be named after what else the function belongs to.
        self._function = lambda given: module(**given)
        self._dynamic = case.dynamic
        self.report = Report()
        # Steps of decoding share their compiled graphs; other cases are one call.
        self._steps = Compiled(self._function) if case.decoding else None

    def __call__(self, **given: Any) -> Any:
        if self._steps is not None:
            self.report = self._steps.report
            return self._steps(given)
        result, self.report = rewritten(
            self._function, given, dynamic=self._dynamic, precision=EXACT
        )
        return result


def captured(module: nn.Module, case: Case) -> Callable[..., Any]:
    """The module called through Dynamo alone."""

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda given: module(**given), backend=backend, dynamic=case.dynamic)
    return lambda **given: compiled(given)


def captures_of(function: Callable[[], object]) -> Captures:
    """What Dynamo's counters say of a call."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    function()
    return Captures(counters["stats"]["unique_graphs"], dict(counters["graph_break"]))


def evaluate(module: nn.Module, case: Case, call: Callable[..., Any] | None = None) -> Evaluation:
    """Outputs of a case and, where gradients are on, what they give each parameter.

    Buffers that a call writes into, as batch normalization does, are put back.
    """
    torch.manual_seed(0)
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    outputs = list(tensors(outputs_of(module, case, call or module)))
    gradients = gradients_of(module, outputs) if torch.is_grad_enabled() else []
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if not torch.equal(buffer, before[name]):
                buffer.copy_(before[name])
    return outputs, gradients


def outputs_of(module: nn.Module, case: Case, call: Callable[..., Any]) -> Any:
    """What a case returns: of one call, or of a prompt and of each step of decoding."""
    if not case.decoding:
        # In fresh tensors: a model may change what it is given.
        return call(**copy.deepcopy(case.architecture.inputs(case.padded)))
    if case.circumstances == STATIC_CACHE:
        cache = transformers.StaticCache(config=module.config, max_cache_len=PROMPT + STEPS + 4)
    else:
        cache = transformers.DynamicCache(config=module.config)
    text = tokens(PROMPT + STEPS)
    pieces = text.split([PROMPT] + [1] * STEPS, dim=1)
    return [
        call(input_ids=piece, past_key_values=cache, use_cache=True).last_hidden_state
        for piece in pieces
    ]


def gradients_of(module: nn.Module, outputs: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradient of each parameter, for seeded normal gradients of the outputs."""
    generator = torch.Generator().manual_seed(1)
    differentiable = [output for output in outputs if output.requires_grad]
    cotangents = [torch.randn(output.shape, generator=generator) for output in differentiable]
    module.zero_grad()
    torch.autograd.backward(differentiable, cotangents)
    gradients = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    return gradients


def tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a model's result, in order: of dataclasses, mappings, sequences."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        yield from tensors(list(result.values()))
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from tensors(part)
    elif dataclasses.is_dataclass(result):
        for field in dataclasses.fields(result):
            yield from tensors(getattr(result, field.name))


def largest_difference(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> float:
    """The largest |a - b| / max(1, max |b|) over pairs of tensors; infinity for NaN against not.

    Raises:
        ValueError: one has more tensors than the other.
        AssertionError: a pair of other shapes or dtypes, or a tensor against None.
    """
    worst = 0.0
    for found, wanted in zip(actual, expected, strict=True):
        if found is None or wanted is None:
            assert found is wanted, "a gradient on one side only"
            continue
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        found, wanted = found.detach(), wanted.detach()
        if not wanted.numel():
            continue
        if not wanted.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(found, wanted) else torch.inf)
            continue
        same = (found == wanted) | (found.isnan() & wanted.isnan())  # infinities too
        difference = torch.where(same, 0.0, (found - wanted).abs()).nan_to_num(torch.inf, torch.inf)
        finite = wanted[wanted.isfinite()]
        scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
        worst = max(worst, float(difference.max()) / scale)
    return worst
