"""What is different in another report: of the same model, compiled otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from sage_compiler.record import Site, plain, shape_text
from sage_compiler.text import count

# Predicted times are left out: two calibrations never measure the same.
COMPARED: Final = (
    "decision",
    "recipe",
    "mask",
    "fingerprint",
    "q_shape",
    "kv_shape",
    "reason",
    "cosine",
    "rel_l1",
)


@dataclass(frozen=True, slots=True)
class Change:
    """One field of one layer that is not what it was.

    Attributes:
        layer: the layer; occurrence: which of its sites in the report, from 0.
        field: a name of ``COMPARED``.
        before, after: its values, as the sites have them.
    """

    layer: str
    occurrence: int
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {_text(self.before)} -> {_text(self.after)}"


@dataclass(frozen=True, slots=True)
class ReportDiff:
    """What another report has otherwise; false when nothing.

    Attributes:
        added: sites that only the other report has; removed: those that it lacks.
        changed: the fields that differ, by site in the order of the first report.
    """

    added: tuple[Site, ...]
    removed: tuple[Site, ...]
    changed: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        if not self:
            return "no difference"
        by_site: dict[tuple[str, int], list[Change]] = {}
        for change in self.changed:
            by_site.setdefault((change.layer, change.occurrence), []).append(change)
        lines = [
            f"{count(len(by_site), 'site')} changed, {len(self.added)} added, "
            f"{len(self.removed)} removed"
        ]
        lines += [f"+ {_line(site)}" for site in self.added]
        lines += [f"- {_line(site)}" for site in self.removed]
        for (layer, occurrence), changes in by_site.items():
            lines.append(layer if not occurrence else f"{layer}, occurrence {occurrence}")
            lines += [f"  {change}" for change in changes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain data, ready for JSON: what is no number is None there."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def compare_sites(before: Iterable[Site], after: Iterable[Site]) -> ReportDiff:
    """The difference of two lists of sites, matched by layer and how often it occurred before."""
    ours, theirs = _by_occurrence(before), _by_occurrence(after)
    return ReportDiff(
        added=tuple(site for key, site in theirs.items() if key not in ours),
        removed=tuple(site for key, site in ours.items() if key not in theirs),
        changed=tuple(
            Change(*key, field, old, new)
            for key, site in ours.items()
            if key in theirs
            for field in COMPARED
            if not _same(old := getattr(site, field), new := getattr(theirs[key], field))
        ),
    )


def _by_occurrence(sites: Iterable[Site]) -> dict[tuple[str, int], Site]:
    seen: Counter[str] = Counter()
    found = {}
    for site in sites:
        found[site.layer, seen[site.layer]] = site
        seen[site.layer] += 1
    return found


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) or (one != one and other != other)  # NaN is as bad as NaN


def _line(site: Site) -> str:
    return f"{site.layer}: {site.decision} {site.recipe}".rstrip()


def _text(value: Any) -> str:
    """A value in one line of text; what is not there is a dash."""
    if isinstance(value, tuple):
        value = shape_text(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value or "-")
