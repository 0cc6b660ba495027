"""What a band lets each other reach, in numbers: closed forms, without a look at any token."""

from __future__ import annotations

from typing import NamedTuple

from sage_compiler.kernels.cuda.sizes import FAR
from sage_compiler.semantics import Band


class Reach(NamedTuple):
    """Of queries and keys of certain lengths.

    Attributes:
        lower, upper: query i sees the keys i + lower to i + upper; at most ``FAR`` from zero.
        first_key, end_key: the keys that some query sees.
        first_live, end_live: the queries that see some key.
    """

    lower: int
    upper: int
    first_key: int
    end_key: int
    first_live: int
    end_live: int

    @classmethod
    def of(cls, band: Band | None, query_length: int, key_length: int) -> Reach:
        """Through a band; None shows everything."""
        band = band or Band(None, None, 0)
        lower = -FAR if band.left is None else max(-FAR, band.offset - band.left)
        upper = FAR if band.right is None else min(FAR, band.offset + band.right)
        first_key = min(key_length, max(0, lower))
        first_live = min(query_length, max(0, -upper))
        return cls(
            lower,
            upper,
            first_key,
            max(first_key, min(key_length, query_length + upper)),
            first_live,
            max(first_live, min(query_length, key_length - lower)),
        )
