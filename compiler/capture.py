"""Run a model with every captured graph handed to a function of ours, and nothing compiled."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import fx
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import config as dynamo_config
from torch._dynamo.convert_frame import input_codes
from torch._dynamo.exc import BackendCompilerFailed

from sage_compiler.errors import SageError
from sage_compiler.passes.identity import layer_of_module, name_code

# From a captured graph and its example inputs, what runs in its place.
Backend: TypeAlias = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]

_numbers: Final = itertools.count()


@contextlib.contextmanager
def captured(model: Callable[..., Any], backend: Backend) -> Iterator[Callable[..., Any]]:
    """A function that calls ``model``, compiled already or not, with its graphs run by ``backend``.

    Other compilations of the model stay; where it has graph breaks, they may have to compile once
    more (see ``_forget``). What ``backend`` raises of ours comes out as it was raised.
    """
    written = getattr(model, "_orig_mod", model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return written(*args, **kwargs)

    # Dynamo caches by code object, and this one is the same in every use.
    call.__code__ = call.__code__.replace(co_name=f"captured_{next(_numbers)}")
    name_code(call.__code__, layer_of_module(written))  # as if it were the model's own
    compiled = torch.compile(call, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, SageError):
                raise error.inner_exception from None
            raise

    try:
        yield run
    finally:
        _forget(backend)


def _forget(backend: Backend) -> None:
    """Drop what Dynamo has cached for a backend.

    After a graph break the model's own functions are compiled too. Left in place, the entries
    would count toward the limit of recompilations, and the model would silently run in eager.
    Entries can only be dropped all together: where others have compiled the same code, ours stay
    until they take half of the limit, and then the others compile once more.
    """
    for reference in list(input_codes.seen):
        code = reference()
        if code is None:
            continue
        entries = _debug_get_cache_entry_list(code)
        ours = [
            entry
            for entry in entries
            if getattr(entry.backend, "compiler_fn", entry.backend) is backend
        ]
        alone = len(ours) == len(entries)
        if ours and (alone or 2 * len(entries) >= dynamo_config.recompile_limit):
            reset_code(code)
