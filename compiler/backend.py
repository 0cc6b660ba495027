"""The torch.compile backend: options -> find -> decide -> rewrite -> Inductor."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any, Final

from torch import fx
from torch._logging._internal import trace_structured
from torch.utils.weak import WeakIdKeyDictionary

from sage_compiler import guard, steps
from sage_compiler import ops as ops  # registers sage::attention, which the rewrite inserts
from sage_compiler import ops_rotary as ops_rotary  # and sage::rotary_attention
from sage_compiler import report as reporting
from sage_compiler.config import Fallback, Options, parse_options
from sage_compiler.errors import InvalidOptionError, KernelUnavailableError
from sage_compiler.kernels import registry
from sage_compiler.kernels.kernel import OPEN, Gate, Kernel, Problem
from sage_compiler.passes import identity, pipeline
from sage_compiler.passes.normalize import tensor_of
from sage_compiler.passes.pipeline import Decision
from sage_compiler.passes.site import AttentionSite
from sage_compiler.policy import Policy
from sage_compiler.precision import AUTO, EXACT
from sage_compiler.record import AFTER, BEFORE, GraphPair
from sage_compiler.report import Report

log = logging.getLogger("sage_compiler")

_SDPA: Final = "sdpa"  # the form of a site that is one call of scaled_dot_product_attention

_last = Report()


def sage(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one captured graph: attention by sage::attention, the rest by Inductor.

    Registered as the torch.compile backend ``"sage"``.

    Raises (Dynamo hands them to the user as the ``inner_exception`` of BackendCompilerFailed, with
    the same words):
        InvalidOptionError: an unknown option, or a value it cannot have.
        KernelUnavailableError: an explicit recipe without a kernel here and fallback="error".
    """
    parsed = parse_options(options, mode)
    patches = _inductor_patches(parsed)
    _refuse_recording(parsed, patches)
    report = transform(gm, parsed)
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(gm, list(example_inputs), config_patches=patches)
    # Only now: Inductor may ask Dynamo to capture again, and then this graph never was.
    _publish(report)
    assert callable(compiled)  # an artifact only where ahead-of-time compilation asked for one
    return compiled


def transform(
    gm: fx.GraphModule,
    options: Options,
    decide: Callable[[AttentionSite, Options], Decision] | None = None,
) -> Report:
    """Rewrite the graph of ``gm`` in place, all or nothing, and report on it.

    Args:
        decide: what becomes of a site; None: what ``decide`` of this module says, for calls on
            this machine.

    Raises:
        PolicyError: a policy that does not fit, with all differences; the graph is what it was.
        KernelUnavailableError: no kernel serves an explicit recipe and fallback="error".
    """
    if decide is None:
        decide = functools.partial(_decide_and_guard, model=_number_of_model())
    chosen = decide
    outcome = pipeline.run(
        gm,
        lambda site: chosen(site, options),
        functools.partial(_accept, options=options),
    )
    gm.recompile()
    return reporting.describe(gm, outcome, options.policy)


def _accept(sites: Sequence[AttentionSite], options: Options) -> None:
    """Raises PolicyError when the policy, if there is one, does not fit these sites."""
    policy = options.policy
    if policy is not None and options.strict_policy:
        found = (policy.difference(site.layer, site.fingerprint) for site in sites)
        policy.require([text for text in found if text is not None])


_models: Final[MutableMapping[CodeType, int]] = WeakIdKeyDictionary()
_numbers: Final = itertools.count(1)  # never again that of a function that is gone


def _number_of_model() -> int:
    """Which of the functions compiled so far this is: recompilations are the same one."""
    code = identity.captured_code()
    if code is None:
        return 0
    written = identity.written_code(code)
    if written not in _models:
        _models[written] = next(_numbers)
    return _models[written]


def _decide_and_guard(site: AttentionSite, options: Options, model: int) -> Decision:
    decision = decide(site, options)
    if _rotates(site, decision):
        decision = replace(decision, fuses_rotary=True)
    if options.guard is None or decision.recipe is None or decision.recipe == EXACT:
        return decision
    recipes = decision.step_recipes or (decision.recipe,)
    return replace(decision, guard=options.guard.of_layer(site.layer, model, recipes))


def _rotates(site: AttentionSite, decision: Decision) -> bool:
    """Whether every kernel that may serve a site rotates query and key itself."""
    recipes = set(decision.step_recipes or (decision.recipe,)) - {EXACT, None}
    found = [registry.find(recipe, _problem(site)) for recipe in recipes if recipe is not None]
    return bool(found) and all(
        isinstance(each, Kernel) and each.run_rotary is not None for each in found
    )


def decide(site: AttentionSite, options: Options) -> Decision:
    """The recipe for one site, or why it is kept.

    Raises:
        KernelUnavailableError: no kernel serves the explicit recipe and fallback="error".
    """
    if options.policy is not None:
        return _decide_by_policy(site, options, options.policy)
    precision = options.precision
    if precision == EXACT:
        return Decision(EXACT, "precision='exact': the unquantized operator")
    problem = _problem(site)
    if precision == AUTO:
        return _decide_auto(site, options, problem)
    found = registry.find(precision, problem)
    if isinstance(found, Kernel):
        return Decision(precision, f"precision={precision!r}, kernel {found.name()}")
    return _without_kernel(site, options, precision, found.reason)


def _without_kernel(site: AttentionSite, options: Options, recipe: str, refusal: str) -> Decision:
    """What becomes of a recipe that was asked for and that no kernel serves here.

    Raises:
        KernelUnavailableError: fallback="error".
    """
    match options.fallback:
        case Fallback.EMULATE:
            return Decision(recipe, f"emulated: {refusal}")
        case Fallback.SDPA:
            return Decision(None, f"{refusal}; fallback='sdpa'")
        case Fallback.ERROR:
            other = "precision='auto'" if options.policy is None else "a policy for this device"
            raise KernelUnavailableError(
                f"{site.layer}: {refusal}; use fallback='emulate', fallback='sdpa' or {other}"
            )


def _decide_by_policy(site: AttentionSite, options: Options, policy: Policy) -> Decision:
    """What the policy says of one site; where it does not fit, the site is kept.

    Raises:
        KernelUnavailableError: no kernel serves a recipe of the policy and fallback="error".
    """
    difference = policy.difference(site.layer, site.fingerprint)
    if difference is not None:
        return Decision(None, f"strict_policy=False: {difference}")
    choice = policy.layers[site.layer]
    because = f"policy: {choice.reason}" if choice.reason else "policy"
    decisions = {
        recipe: _decide_recipe(site, options, recipe, because)
        for recipe in dict.fromkeys(choice.recipes)
    }
    first = decisions[choice.recipes[0]]
    if len(decisions) == 1:
        return first
    # Which one a call gets is known when it runs; what is kept is the exact operator then.
    served = [decision for decision in decisions.values() if decision.recipe is not None]
    if not served:
        return first
    table = tuple(decisions[recipe].recipe or EXACT for recipe in choice.recipes)
    return Decision(
        served[0].recipe,
        "; ".join(dict.fromkeys(decision.reason for decision in decisions.values())),
        min(
            (decision.min_seq_len for decision in served),
            key=lambda least: least != ops.SHIPPED_GATE,
        ),
        step_index=steps.index_tensor(len(table)),
        step_recipes=table,
    )


def _decide_recipe(site: AttentionSite, options: Options, recipe: str, because: str) -> Decision:
    """One recipe that a policy has for a site."""
    if recipe == EXACT:
        # Exact attention is what was measured: where the model writes it out, the operator is it.
        return Decision(None if site.form == _SDPA else EXACT, because)
    problem = _problem(site)
    found = registry.find(recipe, problem)
    if isinstance(found, registry.Unavailable):
        decision = _without_kernel(site, options, recipe, found.reason)
        return replace(decision, reason=f"{because}; {decision.reason}")
    gate = found.gate(problem)
    # What `auto` never takes by itself the policy does: it was measured.
    least = OPEN if isinstance(gate, str) else gate
    reason = f"{because}, kernel {found.name()}"
    return _by_gate(site, options, registry.Default(recipe, reason, found, least))


def _decide_auto(site: AttentionSite, options: Options, problem: Problem) -> Decision:
    default = registry.default(problem)
    if default.kernel is None:
        return Decision(None, f"precision='auto': {default.reason}")
    return _by_gate(site, options, default)


def _by_gate(site: AttentionSite, options: Options, default: registry.Default) -> Decision:
    """Take the recipe and its kernel where the site is long enough; else the site is kept."""
    assert default.kernel is not None
    least, gate = options.min_seq_len, default.gate
    if least is not None:
        gate = Gate(least, least)
    sides = (
        ("query", site.q_shape[2], gate.query_length),
        ("key", site.kv_shape[2], gate.key_length),
    )
    for side, length, shortest in sides:
        if isinstance(length, int) and length < shortest:
            return Decision(None, _too_short(side, length, shortest, least, default.kernel))
    sizes = (*site.q_shape, site.kv_shape[2])
    if all(isinstance(size, int) for size in sizes):
        products = math.prod(int(size) for size in sizes)
        if products < gate.products:
            return Decision(None, _too_small(products, gate.products, default.kernel))
        return Decision(default.recipe, default.reason)
    if gate == OPEN:
        return Decision(default.recipe, default.reason)
    open_gate = ops.SHIPPED_GATE if least is None else least
    return Decision(default.recipe, default.reason, open_gate)


def _too_short(side: str, length: int, shortest: int, least: int | None, kernel: Kernel) -> str:
    if least is not None:
        return f"{side} length {length} is below min_seq_len={least}"
    return (
        f"{side} length {length} is below {shortest}, where kernel {kernel.name()} begins to gain; "
        "min_seq_len=0 takes it at any length"
    )


def _too_small(products: int, fewest: int, kernel: Kernel) -> str:
    return (
        f"Q K^T has {products} products, fewer than {fewest}, where kernel {kernel.name()} begins "
        "to gain; min_seq_len=0 takes any number"
    )


def _problem(site: AttentionSite) -> Problem:
    output = tensor_of(site.node)
    assert output is not None
    heads, kv_heads = site.q_shape[1], site.kv_shape[1]
    return Problem(
        device_type=output.device.type,
        dtype=output.dtype,
        head_dim=int(site.q_shape[3]),
        value_head_dim=int(site.kv_shape[3]),
        heads=heads if isinstance(heads, int) else 0,
        kv_heads=kv_heads if isinstance(kv_heads, int) else 0,
        mask_class=site.semantics.mask_class,
        has_mask=site.mask.value is not None,
        device_index=output.device.index or 0,
    )


def _inductor_patches(options: Options) -> dict[str, Any]:
    """Configuration of this compilation: the mode's, the user's on top, and the fence.

    Raises:
        InvalidOptionError: an unknown mode or an unknown Inductor option.
    """
    from torch._inductor import config, list_mode_options

    from sage_compiler import fence

    modes = {"default": {}, **list_mode_options()}
    if options.mode is not None and options.mode not in modes:
        known = ", ".join(modes)
        raise InvalidOptionError(f"mode={options.mode!r}; known: {known}")
    chosen = dict(modes.get(options.mode, {})) if options.mode is not None else {}
    known_options = config.get_config_copy() if options.inductor else {}
    for given, value in options.inductor.items():
        name = given.replace("-", "_")
        if name not in known_options:
            raise InvalidOptionError(
                f"option inductor has {given!r}, which cannot be set for one compilation; "
                "torch._inductor.list_options() lists what can"
            )
        default = known_options[name]
        if None not in (default, value) and not isinstance(value, type(default)):
            raise InvalidOptionError(
                f"option inductor has {given}={value!r}; its type is {type(default).__name__}"
            )
        chosen[name] = value
    return fence.patches(chosen)


def _refuse_recording(options: Options, patches: Mapping[str, Any]) -> None:
    """As ``config`` refuses it for one compilation: what Inductor does in the whole process.

    Raises:
        InvalidOptionError: CUDA graphs or freezing, which would make permanent what is decided in
            each call.
    """
    from torch._inductor import config

    by_step = options.policy is not None and options.policy.timestep_ranges > 1
    if patches.get("freezing", config.freezing) and by_step:
        raise InvalidOptionError(
            "a policy with timestep ranges while torch._inductor.config.freezing is on, which "
            "would make the first step permanent: switch it off"
        )
    graphs = patches.get("triton.cudagraphs", config.triton.cudagraphs)
    if graphs and (by_step or options.guard is not None):
        raise InvalidOptionError(
            "a policy with timestep ranges, or guard, while torch._inductor.config.triton."
            "cudagraphs is on: CUDA graphs would repeat the first call's choice: switch it off"
        )


def last_report() -> Report:
    """All graphs compiled by this backend since the last ``torch._dynamo.reset()``, merged.

    Empty when there are none, never None.
    """
    return Report(_last.sites, _last.graphs, _last.policies)


def _publish(report: Report) -> None:
    """Add to ``last_report()``, to the log, and to TORCH_TRACE where that is on."""
    _last.extend(report)
    log.info("%s", report)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "sage_report", "encoding": "json"},
        payload_fn=lambda: json.dumps(report.to_dict()),
    )
    for pair in report.graphs:
        for which in (BEFORE, AFTER):
            _trace_graph(pair, which)


def _trace_graph(pair: GraphPair, which: str) -> None:
    """Add a graph to TORCH_TRACE as code; where that is off, no code is made."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"sage_graph_{which}", "encoding": "string"},
        payload_fn=lambda: pair.module(which).print_readable(
            print_output=False, include_stride=True, include_device=True
        ),
    )


def _reset() -> None:
    _last.sites.clear()
    _last.graphs.clear()
    _last.policies.clear()
    guard.reset()


# torch._dynamo.reset() calls this attribute of every backend it has used.
sage.reset = _reset  # type: ignore[attr-defined]
