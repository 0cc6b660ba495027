"""What a report comes to in a few numbers, and how those are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isnan

from sage_compiler.policy import Policy
from sage_compiler.precision import EXACT
from sage_compiler.record import REWRITE, Site
from sage_compiler.text import duration


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the same work, exact and with the recipes that were chosen."""

    exact: float
    chosen: float

    @property
    def gain(self) -> float:
        """How many times as fast the recipes are."""
        return self.exact / self.chosen if self.chosen else inf

    def __str__(self) -> str:
        return f"{duration(self.exact)} exact, {duration(self.chosen)} by the policy"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first lines of a report.

    Attributes:
        sites, rewritten, kept: how many.
        predicted: of the attention here whose times a policy predicts; None where none does.
        measured: of the whole model, once for each policy that was timed and is applied here in
            full.
        worst: the site with the greatest error; None where no policy says.
        end_to_end: for each policy with a bound on the model's output, what became of it.
    """

    sites: int
    rewritten: int
    kept: int
    predicted: Times | None
    measured: tuple[Times, ...]
    worst: Site | None
    end_to_end: tuple[str, ...]

    @property
    def sentences(self) -> list[str]:
        """What a policy adds to the counts: one line each."""
        lines = []
        if self.predicted is not None:
            lines.append(
                f"predicted: attention {self.predicted.gain:.2f} times as fast ({self.predicted})"
            )
        lines += [
            f"measured: the model {times.gain:.2f} times as fast ({times})"
            for times in self.measured
        ]
        if self.worst is not None:
            lines.append(f"worst error: {errors_text(self.worst)} in {self.worst.layer}")
        return lines + list(self.end_to_end)


def judge(sites: Sequence[Site], policies: Sequence[Policy]) -> Verdict:
    """The verdict on these sites, whose recipes these policies chose, if any."""
    made = [policy.calibration for policy in policies]
    return Verdict(
        sites=len(sites),
        rewritten=sum(site.decision == REWRITE for site in sites),
        kept=sum(site.decision != REWRITE for site in sites),
        predicted=_predicted(sites),
        measured=_measured(sites, policies),
        worst=max((site for site in sites if site.rel_l1 is not None), key=_error, default=None),
        end_to_end=tuple(str(each.end_to_end) for each in made if each.end_to_end is not None),
    )


def error_text(value: float | None, digits: int) -> str:
    """An error, or "" where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def errors_text(site: Site) -> str:
    """``rel_l1 0.0312, cosine 0.999512``."""
    return f"rel_l1 {error_text(site.rel_l1, 4)}, cosine {error_text(site.cosine, 6)}"


def _error(site: Site) -> float:
    """For comparing: what is no number is the worst."""
    assert site.rel_l1 is not None
    return inf if isnan(site.rel_l1) else site.rel_l1


def _predicted(sites: Sequence[Site]) -> Times | None:
    exact = chosen = 0.0
    for site in sites:
        if site.seconds is not None and site.exact_seconds is not None:
            exact += site.exact_seconds
            chosen += site.seconds
    return Times(exact, chosen) if exact and chosen else None


def _measured(sites: Sequence[Site], policies: Sequence[Policy]) -> tuple[Times, ...]:
    """What calibration measured; where a layer is kept after all, this model gains less."""
    applied = {(site.layer, site.recipe) for site in sites if site.decision == REWRITE}
    found = []
    for policy in policies:
        seconds = policy.calibration.model_seconds
        quantized = {
            (name, layer.recipe) for name, layer in policy.layers.items() if layer.recipe != EXACT
        }
        if {EXACT, "policy"} <= seconds.keys() and quantized and quantized <= applied:
            found.append(Times(seconds[EXACT], seconds["policy"]))
    return tuple(found)
