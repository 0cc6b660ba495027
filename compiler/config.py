"""Options of the backend: parsed and validated once, at the edge."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final

from sage_compiler.errors import InvalidOptionError
from sage_compiler.guard import Guard, parse_guard
from sage_compiler.policy import Policy
from sage_compiler.precision import AUTO, EXACT, check_precision


class Fallback(StrEnum):
    """What happens to an explicit recipe that has no real kernel on this device."""

    EMULATE = "emulate"  # the reference computes it: right numerics, slow
    SDPA = "sdpa"  # the site is kept
    ERROR = "error"  # compiling raises


@dataclass(frozen=True, slots=True)
class Options:
    """What ``torch.compile(model, backend="sage", options={...})`` accepts.

    Attributes:
        precision: "auto", "exact" or a recipe's name, for every site.
        policy: the recipe of every layer; with "auto" only.
        strict_policy: whether a layer that the policy does not fit is an error; else it is kept.
        guard: compares a part of the calls with exact attention; None: no calls.
        min_seq_len: with "auto", attention with fewer queries or keys than this is kept; None
            takes the device's default, 0 switches the gate off.
        fallback: "emulate", "sdpa" or "error" for an explicit recipe without a kernel here.
        inductor: configuration patches handed to Inductor.
        mode: a mode of torch.compile, such as "reduce-overhead"; None: the default.
    """

    precision: str = AUTO
    policy: Policy | None = None
    strict_policy: bool = True
    guard: Guard | None = None
    min_seq_len: int | None = None
    fallback: Fallback = Fallback.EMULATE
    inductor: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None


CUDA_GRAPH_MODES: Final = ("reduce-overhead", "max-autotune")  # of torch.compile
KNOWN: Final = tuple(sorted(item.name for item in fields(Options)))


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Options:
    """Check a user's options.

    Args:
        options: as given to torch.compile; None is the same as {}.
        mode: torch.compile's own ``mode`` argument.

    Raises:
        InvalidOptionError: an unknown key (the message lists the known ones), or a value that
            its key cannot have.
        PolicyError: the policy's file cannot be read.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(KNOWN), key=str)
    if unknown:
        names = ", ".join(repr(name) for name in unknown)
        raise InvalidOptionError(f"unknown option {names}; known: {', '.join(KNOWN)}")
    if mode is not None and given.get("mode") not in (None, mode):
        raise InvalidOptionError(f"mode={mode!r} and the option mode={given['mode']!r}; give one")
    precision = check_precision(given.get("precision", AUTO))
    policy = _policy(given.get("policy"), precision)
    parsed = Options(
        precision=precision,
        policy=policy,
        strict_policy=_strict_policy(given.get("strict_policy", True)),
        guard=_parse_guard(given.get("guard"), policy, precision),
        min_seq_len=_min_seq_len(given.get("min_seq_len"), precision),
        fallback=_fallback(given.get("fallback", Fallback.EMULATE)),
        inductor=_inductor(given.get("inductor", {})),
        mode=_mode(mode if mode is not None else given.get("mode")),
    )
    _check_together(parsed)
    return parsed


def _check_together(options: Options) -> None:
    """Refuse options each of which is fine, where one would silently undo the other.

    A CUDA graph repeats what the GPU did when it was recorded: what the operator decides on the
    host, call by call, would be decided once. Freezing takes buffers for constants.
    """
    patches = {name.replace("-", "_"): value for name, value in options.inductor.items()}
    recorded = options.mode in CUDA_GRAPH_MODES or patches.get("triton.cudagraphs")
    by_step = options.policy is not None and options.policy.timestep_ranges > 1
    what = "guard" if options.guard is not None else "a policy with timestep ranges"
    if recorded and (options.guard is not None or by_step):
        mode = f"mode={options.mode!r}" if options.mode in CUDA_GRAPH_MODES else "triton.cudagraphs"
        raise InvalidOptionError(
            f"{what} with {mode}; CUDA graphs, which that turns on, would repeat the first call's "
            "choice: use mode='default' or mode='max-autotune-no-cudagraphs'"
        )
    if by_step and patches.get("freezing"):
        raise InvalidOptionError(
            "a policy with timestep ranges with inductor freezing; freezing would make the first "
            "step permanent: leave it off"
        )


def _policy(value: object, precision: str) -> Policy | None:
    if value is None:
        return None
    if precision != AUTO:
        raise InvalidOptionError(
            f"a policy with precision={precision!r}; the policy chooses the precision: leave it "
            "'auto'"
        )
    if isinstance(value, Policy):
        return value
    if isinstance(value, (str, os.PathLike)):
        return _loaded(value)
    raise InvalidOptionError(f"policy={value!r}; it must be a sage.Policy or the path of one")


_policies: Final[dict[str, tuple[tuple[int, int] | None, Policy]]] = {}  # by path


def _loaded(path: str | os.PathLike[str]) -> Policy:
    """The policy of a file, read again when the file has changed, and kept when it has gone.

    A model may compile once more at any time while it serves, whatever became of the file.

    Raises:
        PolicyError: it cannot be read.
    """
    try:
        status = os.stat(path)
        state = (status.st_mtime_ns, status.st_size)
    except (OSError, ValueError):
        state = None
    name = os.path.abspath(path)
    kept = _policies.get(name)
    if kept is None or state not in (None, kept[0]):
        kept = _policies[name] = (state, Policy.load(path))
    return kept[1]


def _strict_policy(value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidOptionError(f"strict_policy={value!r}; it must be True or False")
    return value


def _parse_guard(value: object, policy: Policy | None, precision: str) -> Guard | None:
    if value is None or isinstance(value, Guard):
        return value
    if precision == EXACT:
        raise InvalidOptionError("guard with precision='exact'; there is nothing to guard")
    return parse_guard(value, {} if policy is None else policy.calibration.budget)


def _min_seq_len(value: object, precision: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidOptionError(f"min_seq_len={value!r}; it must be an integer of at least 0")
    if value and precision != AUTO:
        raise InvalidOptionError(
            f"min_seq_len={value} with precision={precision!r}; the gate belongs to 'auto': an "
            "explicit precision applies to every length"
        )
    return value


def _fallback(value: object) -> Fallback:
    try:
        return Fallback(value)  # type: ignore[arg-type]  # any object: the enum does the check
    except ValueError:
        known = ", ".join(Fallback)
        raise InvalidOptionError(f"fallback={value!r}; known: {known}") from None


def _inductor(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidOptionError(
            f"inductor={value!r}; it must be a dict of Inductor configuration names"
        )
    return dict(value)


def _mode(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidOptionError(f"mode={value!r}; it must be a mode of torch.compile, or None")
    return value
