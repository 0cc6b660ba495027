"""Keep Inductor's fuse_attention pass off the graphs of this backend.

That pass rewrites attention-like code that is rightly kept into something else: with torch 2.13
``(q @ k.mT * s).softmax(-2) @ v`` comes out wrong by 0.6 and more. It has no switch of its own, and
switching the pattern matcher off would take good patterns with it. All of its patterns contain
the exponential of a softmax, so that is hidden from the matcher while the joint passes run, by
configuration of one compilation: other backends are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

_EXP: Final = torch.ops.aten.exp.default

# What compiled code in Inductor's cache depends on: this pass, and the operator's promises.
_SOURCES: Final = (
    __file__,
    *(str(Path(__file__).with_name(name)) for name in ("ops.py", "gradient.py")),
)


def hidden_exp(x: Tensor) -> Tensor:
    """exp, under a name that no pattern knows."""
    result: Tensor = _EXP(x)
    return result


class _Retarget(CustomGraphPass):
    """Give every call of one function another target, around the passes that are configured."""

    def __init__(self, old: Any, new: Any, first: Iterable[Any], then: Iterable[Any]) -> None:
        self._old = old
        self._new = new
        self._first = tuple(first)
        self._then = tuple(then)

    def __call__(self, graph: fx.Graph) -> None:
        for configured in self._first:
            configured(graph)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is self._old:
                node.target = self._new
        for configured in self._then:
            configured(graph)

    def uuid(self) -> Any | None:
        """Part of Inductor's cache key; None, which disables caching, if another pass has none."""
        parts: list[Any] = [get_hash_for_files(_SOURCES), self._new.__name__]
        for configured in (*self._first, *self._then):
            found = configured.uuid() if isinstance(configured, CustomGraphPass) else None
            if found is None:
                return None
            parts.append(found)
        return tuple(map(str, parts))


def patches(inductor: dict[str, Any]) -> dict[str, Any]:
    """Inductor configuration patches with the fence added; passes configured by others stay."""

    def configured(name: str) -> list[Callable[[fx.Graph], None]]:
        found = inductor.get(name, getattr(inductor_config, name))
        if found is None:
            return []
        return list(found) if isinstance(found, (list, tuple)) else [found]

    before, after = "joint_custom_pre_pass", "joint_custom_post_pass"
    return {
        **inductor,
        before: _Retarget(_EXP, hidden_exp, configured(before), ()),
        after: _Retarget(hidden_exp, _EXP, (), configured(after)),
    }
