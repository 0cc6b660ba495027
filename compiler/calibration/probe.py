"""A model whose attentions can be watched and replaced, call by call.

Every graph of the model is captured, its attentions are found and proved by the same passes that
compile it, and each proved site becomes a call of a function of ours with the operator's arguments.
Nothing is compiled, so what an attention does can change between two runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config

from sage_compiler.capture import captured
from sage_compiler.kernels.kernel import Problem
from sage_compiler.ops import expecting_emulation
from sage_compiler.passes import pipeline
from sage_compiler.passes.pipeline import Decision
from sage_compiler.passes.rewrite import LAYER_KEY
from sage_compiler.passes.site import AttentionSite
from sage_compiler.precision import EXACT
from sage_compiler.semantics import UNBOUNDED, Semantics, parse_semantics

_OPERATOR: Final = torch.ops.sage.attention.default
_DEFAULTS: Final = (None, "none", None, EXACT, 0, "zero", None, None, UNBOUNDED, UNBOUNDED)
# Inputs of many shapes are many graphs; beyond Dynamo's limit a model runs unseen.
_MOST_GRAPHS: Final = 256


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one attention of the model, with its tensors.

    Attributes:
        layer, fingerprint: of its site.
        query, key, value: (B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv).
        attn_mask, sinks: as the operator takes them.
        semantics: band, scale, softcap, dead rows.
    """

    layer: str
    fingerprint: str
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    sinks: Tensor | None
    semantics: Semantics

    def run(self, recipe: str) -> Tensor:
        """Attention (B, H, Lq, Dv) in the precision of ``recipe``, emulated where no kernel is."""
        s = self.semantics
        with expecting_emulation():
            output: Tensor = _OPERATOR(
                self.query,
                self.key,
                self.value,
                self.attn_mask,
                str(s.mask_class),
                s.scale,
                recipe,
                dead_rows=str(s.dead_rows),
                softcap=s.softcap,
                sinks=self.sinks,
                window_left=s.window_left,
                window_right=s.window_right,
            )
        return output

    @property
    def problem(self) -> Problem:
        """What a kernel is asked whether it serves."""
        return Problem.of(self.query, self.key, self.value, self.semantics, self.attn_mask)


Attend = Callable[[Call], Tensor]


class Watched:
    """A model under watch.

    Attributes:
        attend: what computes every attention, from now on.
        compute: a call with a recipe, as a compiled policy would.
        fingerprints: layer -> those that its sites had, in order of first capture.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.attend: Attend = lambda call: call.run(EXACT)
        self.compute: Callable[[Call, str], Tensor] = Call.run
        self.fingerprints: dict[str, list[str]] = {}


@contextlib.contextmanager
def watched(model: Callable[..., Any]) -> Iterator[Watched]:
    """``model``, an nn.Module or a function, compiled already or not, under watch."""
    watch: Watched

    def replace(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = pipeline.run(gm, lambda site: Decision(EXACT, "watched"))
        sites = {
            finding.layer: finding
            for finding, decision in outcome.findings
            if isinstance(finding, AttentionSite) and decision.recipe is not None
        }
        # Calls of the operator that the model makes itself are nobody's site.
        nodes = [node for node in gm.graph.nodes if node.target is _OPERATOR]
        for number, node in enumerate(node for node in nodes if LAYER_KEY in node.meta):
            site = sites[node.meta[LAYER_KEY]]
            known = watch.fingerprints.setdefault(site.layer, [])
            if site.fingerprint not in known:
                known.append(site.fingerprint)
            name = f"sage_probe_{number}"
            gm.add_module(name, _Probe(watch, site.layer, site.fingerprint))
            node.op, node.target = "call_module", name
        gm.recompile()
        return gm.forward

    with (
        dynamo_config.patch(
            recompile_limit=_MOST_GRAPHS, accumulated_recompile_limit=4 * _MOST_GRAPHS
        ),
        captured(model, replace) as run,
    ):
        watch = Watched(run)
        try:
            yield watch
        finally:
            del watch.run, watch.attend  # Dynamo keeps the backend, and so what these hold


class _Probe(nn.Module):
    """Stands where an operator stood, and takes its arguments."""

    def __init__(self, watch: Watched, layer: str, fingerprint: str) -> None:
        super().__init__()
        self._watch = watch
        self._layer = layer
        self._fingerprint = fingerprint

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        # Trailing defaults are left out of the graph.
        given: tuple[Any, ...] = (*rest, *_DEFAULTS[len(rest) :])
        mask, mask_class, scale, _, _, dead_rows, softcap, sinks, left, right = given
        device_type = query.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)  # what the operator would cast to
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        call = Call(
            self._layer,
            self._fingerprint,
            query,
            key,
            value,
            mask,
            sinks,
            parse_semantics(mask_class, scale, dead_rows, softcap, left, right),
        )
        return self._watch.attend(call)
