"""One check of one kind of call: running it, and comparing with what it must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu.device import Device, target
from benchmarks.gpu.guarded import GARBAGE, Outcome, attend, plan, same_bits
from benchmarks.gpu.matrix import LARGE, LENGTHS, LSE_DISTANCE, Case, Subject
from sage_compiler.kernels import reference
from sage_compiler.kernels.cuda import kernel
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.variants import Variant
from tests.compiler.kernels.dense import Call, dense
from tests.tolerances import check, check_lse

_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is checked.

    Attributes:
        lengths: Lq and Lk of ``matrix``.
        random_calls: how many.
        large: Lq and Lk of ``large``.
        pair: Lq and Lk of the two calls with which the others are done.
        seed: of all inputs.
    """

    lengths: tuple[tuple[int, int], ...] = LENGTHS
    random_calls: int = 60
    large: tuple[tuple[int, int], ...] = LARGE
    pair: tuple[tuple[int, int], tuple[int, int]] = ((200, 333), (129, 257))
    seed: int = 0


@dataclass(frozen=True)
class _Probe(kernel.Target):
    """A target that notes which kernels would be launched."""

    specs: list[KernelSpec] = field(default_factory=list)

    def launch(
        self, spec: KernelSpec, blocks: int, packed: bytes, *, dependent: bool = False
    ) -> None:
        self.specs.append(spec)

    def clear(self, address: int, size: int) -> None:
        pass


@dataclass(slots=True)
class Trial:
    """One check of the kernels of one kind of call, and what it found.

    Attributes:
        calls: attentions that were compared.
        distance: the greatest relative L2 distance from the reference, of the rows that count.
        failures: one sentence each.
        skipped: why nothing was compared.
    """

    device: Device
    subject: Subject
    plan: Plan
    calls: int = 0
    distance: float = 0.0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def run(
        self, call: Call, loader: Loader | None = None, **serving: Any
    ) -> tuple[Tensor, Tensor]:
        """Output and LSE of a call on the device, without waiting for it.

        Args:
            serving: what ``kernel.run`` takes besides: lengths of a packed batch, or a rotation.
        """
        return self._run(target(self.device, loader=loader), call, **serving)

    def _run(self, place: kernel.Target, call: Call, **serving: Any) -> tuple[Tensor, Tensor]:
        return kernel.run(
            place,
            call.query,
            call.key,
            call.value,
            call.semantics,
            want_lse=True,
            recipe=self.subject.recipe,
            attn_mask=call.attn_mask,
            sinks=call.sinks,
            accumulator=self.subject.accumulator,
            **serving,
        )

    def expect(self, holds: bool, sentence: str) -> None:
        """Count one comparison; ``sentence`` is the failure if it does not hold."""
        self.calls += 1
        if not holds:
            self.failures.append(sentence)

    def expect_right(self, case: Case, *, on_device: bool = False) -> None:
        """Run a case twice over different garbage, and compare with what it must be.

        Args:
            on_device: compute the reference there, and leave out float64.
        """
        call = case.on(self.device.place)
        chosen = self.chosen(call)
        if uncut(chosen, self.subject.kernels) != self.subject.kernels:
            self.expect(False, f"{case.label}: is served by other kernels: {chosen}")
            return
        first, second = (attend(self.device, self.subject, call, byte) for byte in GARBAGE)
        here = call if on_device else case.on(_CPU)
        expected = reference.attention(
            here.query,
            here.key,
            here.value,
            self.subject.reference(),
            here.semantics,
            attn_mask=here.attn_mask,
            sinks=here.sinks,
            splits=first.splits,
        )
        problems = [first.problem, second.problem, differ(first, second)]
        problems += self.far_from(first, *expected)
        if not on_device:
            problems.append(self.outside(first, here))
        told = "; ".join(problem for problem in dict.fromkeys(problems) if problem is not None)
        self.expect(not told, f"{case.label}: {told}")

    def chosen(self, call: Call) -> Variant:
        """The kernels that a call is served by, without launching them."""
        probe = _Probe(self.device.arch, self.device.index, 0, self.device.loader)
        self._run(probe, call)
        kernels = plan(probe, self.subject, call).kernels
        assert tuple(probe.specs) == kernels.specs()
        return kernels

    def far_from(self, outcome: Outcome, output: Tensor, lse: Tensor) -> Iterator[str | None]:
        """How an outcome differs from the reference's output and LSE."""
        found = outcome.output.to(output.device)
        if not torch.equal(found.isnan(), output.isnan()):
            yield f"NaN in {int(found.isnan().sum())} elements, not {int(output.isnan().sum())}"
            return
        apart = distance(found, output, self.subject.spared(output[..., 0].numel()))
        self.distance = max(self.distance, apart)
        limit = self.subject.distance(output.numel())
        if not apart <= limit:
            yield f"{apart:.2g} from the reference, at most {limit:.2g}"
        found_lse = outcome.lse.to(lse.device)
        off = torch.where(found_lse == lse, 0.0, (found_lse - lse).abs())  # -inf is -inf
        if not bool((off <= LSE_DISTANCE).all()):
            yield f"LSE {float(off.max()):.2g} from the reference, at most {LSE_DISTANCE}"

    def outside(self, outcome: Outcome, call: Call) -> str | None:
        """How an outcome leaves the tolerance of its recipe around float64, if it does."""
        exact, exact_lse = dense(call)
        try:
            check(outcome.output.cpu(), exact, call.value, self.subject.recipe)
            check_lse(outcome.lse.cpu(), exact_lse.float(), self.subject.recipe)
        except AssertionError as error:
            return str(error)
        return None


def uncut(kernels: Variant, like: Variant) -> Variant:
    """Kernels whose products are cut into blocks as others' are; short calls are cut finer."""
    if type(kernels.attend) is not type(like.attend):
        return kernels
    cut = ("warp_rows", "stages", "tile_rows", "packed_heads", "split")
    own = {each.name for each in fields(like.attend)}
    same = {name: getattr(like.attend, name) for name in cut if name in own}
    return replace(kernels, attend=replace(kernels.attend, **same), merge=like.merge)


def differ(first: Outcome, second: Outcome) -> str | None:
    """What to say of two outcomes that must be the same, if they are not."""
    same = same_bits(first.output, second.output) and same_bits(first.lse, second.lse)
    return None if same else "not the same bits twice"


def distance(actual: Tensor, expected: Tensor, spared: int) -> float:
    """|actual - expected| / |expected|, without NaN and without the rows that differ most."""
    a, e = (x.double().nan_to_num().flatten(0, -2) for x in (actual, expected))
    apart = (a - e).square().sum(-1).sort().values
    norm = float(e.norm())
    difference = float(apart[: len(apart) - spared].sum().sqrt())
    return difference / norm if norm > 0 else difference
