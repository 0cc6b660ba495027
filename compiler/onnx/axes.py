"""Names of sizes that vary, as the user gives them among ``dynamic_shapes``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree


def without_names(dynamic_shapes: Any) -> Any:
    """The same for torch.export, which takes no names."""
    return pytree.tree_map(lambda dim: Dim.DYNAMIC if isinstance(dim, str) else dim, dynamic_shapes)


def named_axes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> Iterator[tuple[Tensor, int, str]]:
    """Each dim of an input tensor that has a name, and the name."""
    if isinstance(dynamic_shapes, Mapping):
        signature = inspect.signature(model.forward)
        given: dict[str, Any] = {}
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            # As torch.export has it: what **kwargs takes is among the others.
            variadic = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            given |= value if variadic else {name: value}
        yield from _walk(given, dynamic_shapes)
    else:
        yield from _walk([*args, *kwargs.values()], dynamic_shapes)


def _walk(value: Any, shapes: Any) -> Iterator[tuple[Tensor, int, str]]:
    if isinstance(value, Tensor):
        dims = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes or ())
        for dim, name in dims:
            if isinstance(name, str):
                yield value, dim, name
    elif isinstance(value, Mapping) and isinstance(shapes, Mapping):
        for key in shapes.keys() & value.keys():
            yield from _walk(value[key], shapes[key])
    elif isinstance(value, Sequence) and isinstance(shapes, Sequence):
        for each, its_shapes in zip(value, shapes, strict=False):
            yield from _walk(each, its_shapes)
