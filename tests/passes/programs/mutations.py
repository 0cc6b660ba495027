"""Edits of a captured attention, each of one thing: most make it something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.passes.programs.arguments import ARGUMENTS
from tests.passes.programs.in_place import IN_PLACE, UNSEEN, WHY_UNSEEN
from tests.passes.programs.insertions import FUNCTIONS, ROUNDING, SECOND, USERS
from tests.passes.programs.subject import Edit


@dataclass(frozen=True, slots=True)
class Mutation:
    """One edit.

    Attributes:
        edit: says whether it applies to the subject.
        silent: why the result may stay what it was; "": it must change.
        rounds: it only rounds, which a rewrite need not do.
    """

    edit: Edit
    silent: str = ""
    rounds: bool = False


MUTATIONS: Final[dict[str, Mutation]] = {
    **{
        name: Mutation(edit)
        for table in (FUNCTIONS, USERS, IN_PLACE, ARGUMENTS, SECOND)
        for name, edit in table.items()
    },
    **{name: Mutation(edit, silent=WHY_UNSEEN) for name, edit in UNSEEN.items()},
    **{name: Mutation(edit, rounds=True) for name, edit in ROUNDING.items()},
}
