"""What ``sagec kernels explain --cache`` asks: a ``PackedKV`` on a GPU that need not be here.

The store of a cache itself answers, on the meta device, where a launch is only noted down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from sage_compiler.commands.kernels_question import Question
from sage_compiler.kernels.cuda.arch import Arch
from sage_compiler.kernels.cuda.cut import Cut
from sage_compiler.kernels.cuda.kernel import Target, has_softcap
from sage_compiler.kernels.cuda.loader import Loader
from sage_compiler.kernels.cuda.packed import CudaStore
from sage_compiler.kernels.cuda.sizes import Reach, Sizes, arrange
from sage_compiler.kernels.cuda.spec import KernelSpec
from sage_compiler.kernels.cuda.variants import CacheVariant
from sage_compiler.kernels.packed import PackedShape
from sage_compiler.precision import AUTO
from sage_compiler.semantics import UNBOUNDED

_META: Final = torch.device("meta")


@dataclass(frozen=True, slots=True)
class OfCache:
    """What a cache does with a question's tokens.

    Attributes:
        recipe: the cache's.
        kernels: of appending and attending.
        appending: the kernels that append the queries' tokens after those before, and their blocks.
        attending: the same of the attention.
        scratch_bytes: the memory that the latter share.
        cache_bytes: what a cache of that many tokens takes.
    """

    recipe: str
    kernels: CacheVariant
    sizes: Sizes
    cut: Cut
    appending: tuple[tuple[KernelSpec, int], ...]
    attending: tuple[tuple[KernelSpec, int], ...]
    scratch_bytes: int
    cache_bytes: int


def of_cache(question: Question, arch: Arch) -> OfCache:
    """The answer of a cache on an architecture.

    Raises:
        InvalidOptionError: a recipe that no cache has there.
        InvalidAttentionError: a head_dim or a length that none has.
    """
    batch, heads, length, head_dim = question.query.shape
    _, kv_heads, tokens, _ = question.key.shape
    target = _Noting(arch.name, 0, 0, _NoDevice())

    @contextmanager
    def on(device: torch.device) -> Iterator[Target]:
        yield target

    shape = PackedShape(
        batch, kv_heads, head_dim, question.value.shape[3], tokens, question.query.dtype
    )
    precision = None if question.recipe == AUTO else question.recipe
    store = CudaStore(shape, _META, precision, on)
    new = (x[:, :, tokens - length :] for x in (question.key, question.value))
    store.append(tokens - length, *new)

    sizes = Sizes.of(batch, heads, kv_heads, length, tokens)
    kernels, splits = store.plan(
        target,
        sizes,
        Reach.of(question.semantics, length, tokens),
        window=question.semantics.window_left != UNBOUNDED,
        masked=question.attn_mask is not None,
        softcap=has_softcap(question.semantics),
    )
    blocks_of = sizes.blocks(kernels, splits, target.processors)
    _, queries, keys, _, products, *merging = blocks_of
    blocks = [queries, *([] if kernels.delta is None else [keys]), products, *merging]
    specs = kernels.specs()[-len(blocks) :]  # those of appending come first
    row_term = question.sinks is not None or kernels.attend.softcap
    parts = sizes.query_scratch(kernels.attend, row_term=row_term, splits=splits)
    return OfCache(
        store.precision,
        kernels,
        sizes,
        Cut(kernels.attend.query_tile, splits),
        tuple(target.noted),
        tuple(zip(specs, blocks, strict=True)),
        arrange(parts)[1],
        store.nbytes,
    )


class _NoDevice(Loader):
    """Loads nothing; there is no driver."""

    def __init__(self) -> None:
        pass

    def loaded(self, spec: KernelSpec, device: int, stream: int) -> Any:
        return None


@dataclass(frozen=True)
class _Noting(Target):
    """A target that notes what would be launched, which is not."""

    noted: list[tuple[KernelSpec, int]] = field(default_factory=list)

    def launch(
        self, spec: KernelSpec, blocks: int, packed: bytes, *, dependent: bool = False
    ) -> None:
        self.noted.append((spec, blocks))
