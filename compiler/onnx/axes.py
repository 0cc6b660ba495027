"""Names of sizes that vary, as the user gives them among ``dynamic_shapes``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from sage_compiler.errors import InvalidOptionError

LEAST_EXAMPLE: Final = 2  # torch.export takes 0 and 1 for constants


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


def check(named: Iterable[tuple[Tensor, int, str]]) -> None:
    """Raises InvalidOptionError for a dim that is not there, or whose example cannot vary."""
    for tensor, dim, name in named:
        shape = tuple(tensor.shape)
        if not -tensor.dim() <= dim < tensor.dim():
            raise InvalidOptionError(
                f"dynamic_shapes: {name!r} is dim {dim} of an input of shape {shape}"
            )
        if shape[dim] < LEAST_EXAMPLE:
            raise InvalidOptionError(
                f"dynamic_shapes: {name!r}, dim {dim} of an input of shape {shape}, is "
                f"{shape[dim]} in the example, which torch.export takes for a constant; give an "
                f"example with {LEAST_EXAMPLE} or more"
            )


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
