"""Masks: which keys are hidden, as bool expressions, and how they are applied to the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.passes.programs.draft import Draft, aligned

_MINUS_INFINITY = ('float("-inf")', "-torch.inf", "-math.inf")


@dataclass(frozen=True, slots=True)
class Mask:
    """A bool expression over some letters of the frame, and what True means."""

    expression: str
    letters: str
    hidden: bool


def letter_sets(frame: str) -> list[str]:
    """Over which dimensions of a frame a bias or mask may vary, in the frame's order."""
    batch = "".join(letter for letter in frame if letter in "bn")
    heads = "".join(letter for letter in frame if letter in "hgn")
    sets = {frame, heads + "qk", batch + "qk", "qk", batch + "k", heads + "k", "k"}
    return sorted("".join(letter for letter in frame if letter in chosen) for chosen in sets)


def write_mask(draft: Draft) -> Mask:
    """Emit what a new mask needs, and return it over letters of the frame."""
    mask = _one(draft)
    if draft.chance(0.2):
        mask = _combined(draft, mask, _one(draft))
    name = f"m{len(draft.lines)}"
    draft.emit(f"{name} = {mask.expression}")
    if draft.chance(0.1):
        draft.emit(draft.pick([f"{name} = ~{name}", f"{name} = torch.logical_not({name})"]))
        mask = Mask(mask.expression, mask.letters, not mask.hidden)
    if draft.frame.startswith("n") and mask.letters.startswith("b"):
        draft.emit(f"{name} = {name}.repeat_interleave({draft.sizes.heads}, dim=0)")
        return Mask(name, "n" + mask.letters[1:], mask.hidden)
    return Mask(name, mask.letters, mask.hidden)


def _one(draft: Draft) -> Mask:
    kinds = {"causal": 5.0, "window": 2.0, "blocks": 1.0, "random": 2.0, "trivial": 0.5}
    kinds["padding"] = 3.0
    if "b" in draft.frame or "n" in draft.frame:
        kinds |= {"lengths": 1.0, "segments": 1.0, "ints": 2.0}
    kind = draft.weighted(kinds)
    draft.note(f"mask: {kind}")
    rows, columns = draft.text("q"), draft.text("k")
    match kind:
        case "causal":
            return _causal(draft, rows, columns)
        case "window":
            return _window(draft, rows, columns)
        case "blocks":
            size = draft.rng.randint(2, 9)
            query, key = f"torch.arange({rows}) // {size}", f"torch.arange({columns}) // {size}"
            return Mask(f"(({query})[:, None] == ({key})[None, :])", "qk", False)
        case "trivial":
            return Mask(f"torch.ones({rows}, {columns}, dtype=torch.bool)", "qk", False)
        case "lengths":
            batch, most = draft.sizes.batch, draft.sizes.key_length
            lengths = torch.randint(1, most + 1, (batch,), generator=draft.generator)
            name = draft.add_input("lengths", lengths)
            return Mask(f"(torch.arange({columns})[None, :] < {name}[:, None])", "bk", False)
        case "segments":
            query, key = (_ids(draft, letter) for letter in "qk")
            return Mask(f"({query}[:, :, None] == {key}[:, None, :])", "bqk", False)
        case "ints":
            return _ints(draft)
        case "padding":
            return _given(draft, "bk" if "b" in draft.frame or "n" in draft.frame else "k")
        case _:
            return _given(draft, draft.pick(letter_sets(draft.frame)))


def _causal(draft: Draft, rows: str, columns: str) -> Mask:
    sizes = draft.sizes
    ones = f"torch.ones({rows}, {columns}"
    bottom = f"{columns} - {rows}"
    spelled = [
        Mask(f"{ones}, dtype=torch.bool).tril()", "qk", False),
        Mask(f"torch.tril({ones}, dtype=torch.bool), diagonal={bottom})", "qk", False),
        Mask(f"(torch.tril({ones})) == 0)", "qk", True),
        Mask(f"torch.triu({ones}, dtype=torch.bool), diagonal=1)", "qk", True),
        Mask(f"{ones}).triu(1).bool()", "qk", True),
        Mask(f"(torch.arange({rows})[:, None] >= torch.arange({columns}))", "qk", False),
        Mask(
            f"(torch.arange({columns})[None, :] > torch.arange({rows})[:, None] + ({bottom}))",
            "qk",
            True,
        ),
        Mask(f"torch.ones({columns}, {rows}, dtype=torch.bool).triu().T", "qk", False),
    ]
    if sizes.query_length <= sizes.key_length and draft.chance(0.25):
        buffer = draft.add_input("buffer", torch.ones(48, 48, dtype=torch.bool).tril())
        return Mask(f"{buffer}[{bottom} : {columns}, :{columns}]", "qk", False)
    return draft.pick(spelled)


def _window(draft: Draft, rows: str, columns: str) -> Mask:
    width = draft.rng.randint(0, 9)
    query, key = f"torch.arange({rows})[:, None]", f"torch.arange({columns})[None, :]"
    return draft.pick(
        [
            Mask(f"(({query} - {key}).abs() <= {width})", "qk", False),
            Mask(f"(({key} <= {query}) & ({query} - {key} <= {width}))", "qk", False),
            Mask(f"(({query} - {key} > {width}) | ({key} > {query}))", "qk", True),
            Mask(
                f"torch.ones({rows}, {columns}, dtype=torch.bool).triu(-{width}).tril({width})",
                "qk",
                False,
            ),
        ]
    )


def _ids(draft: Draft, letter: str) -> str:
    shape = (draft.sizes.batch, draft.size(letter))
    ids = torch.randint(0, 3, shape, generator=draft.generator).sort(-1).values
    return draft.add_input("segment", ids)


def _ints(draft: Draft) -> Mask:
    """A tokenizer's attention mask: 1 for tokens, 0 for padding."""
    shape = (draft.sizes.batch, draft.sizes.key_length)
    ints = (torch.rand(shape, generator=draft.generator) < 0.8).long()
    if not draft.chance(0.1):
        ints[:, 0] = 1
    name = draft.add_input("tokens", ints)
    hidden = draft.chance(0.5)
    spelled = (
        [f"({name} == 0)", f"({name} < 1)", f"(1 - {name}).bool()"]
        if hidden
        else [f"{name}.bool()", f"({name} != 0)", f"({name} > 0)", f"{name}.to(torch.bool)"]
    )
    return Mask(draft.pick(spelled), "bk", hidden)


def _given(draft: Draft, letters: str) -> Mask:
    """A bool input; a live key in every row, unless a dead one is wanted."""
    hidden = draft.chance(0.5)
    shape = draft.shape(letters)
    visible = torch.rand(shape, generator=draft.generator) < draft.pick([0.5, 0.8, 0.95])
    if draft.chance(0.15):
        draft.note("mask: dead rows")
        visible.select(letters.index("q") if "q" in letters else 0, 0).fill_(False)
    else:
        visible.select(letters.index("k"), 0).fill_(True)
    name = draft.add_input("mask", ~visible if hidden else visible)
    return Mask(name, letters, hidden)


def _combined(draft: Draft, one: Mask, other: Mask) -> Mask:
    letters = "".join(
        letter for letter in draft.frame.replace("n", "bn") if letter in one.letters + other.letters
    )
    # A mask by batch and one by folded batch and heads have no common shape.
    if "b" in letters and "n" in letters:
        return one
    draft.note("mask: combination")
    hidden = draft.chance(0.5)
    sides = []
    for mask in (one, other):
        side = aligned(mask.expression, mask.letters, letters, leading=True)
        sides.append(side if mask.hidden == hidden else f"(~{side})")
    sign = "|" if hidden else "&"
    name = "logical_or" if hidden else "logical_and"
    spelled = [f"({sides[0]} {sign} {sides[1]})", f"torch.{name}({sides[0]}, {sides[1]})"]
    return Mask(draft.pick(spelled), letters, hidden)


# --- applied --------------------------------------------------------------------------------


def apply_mask(draft: Draft, mask: Mask) -> None:
    """Emit one way of hiding keys in the scores ``s``."""
    where = aligned(mask.expression, mask.letters, draft.frame, leading=draft.chance(0.5))
    inverse = draft.pick([f"(~{where})", f"({where} == 0)", f"{where}.logical_not()"])
    hidden, visible = (where, inverse) if mask.hidden else (inverse, where)
    if draft.chance(0.3):
        draft.emit(f"hidden = {hidden}")
        draft.hidden = hidden = "hidden"
    how = draft.weighted(
        {"masked_fill": 4, "in place": 2, "where": 2, "additive": 4, "subtracted": 1, "blend": 0.5}
    )
    fill = _fill(draft)
    draft.note(f"masked by: {how}")
    half = draft.score_dtype == torch.float16
    match how:
        case "masked_fill":
            spelled = [
                f"s.masked_fill({hidden}, {fill})",
                f"torch.masked_fill(s, {hidden}, {fill})",
            ]
            draft.emit(f"s = {draft.pick(spelled)}")
        case "in place":
            draft.emit(f"s.masked_fill_({hidden}, {fill})")
        case "where":
            spelled = [f"torch.where({visible}, s, {fill})", f"torch.where({hidden}, {fill}, s)"]
            if "torch.finfo" not in fill:
                spelled.append(f"torch.where({visible}, s, torch.tensor({fill}, dtype=s.dtype))")
                spelled.append(f"s.where({visible}, torch.full((), {fill}, dtype=s.dtype))")
            draft.emit(f"s = {draft.pick(spelled)}")
        case "additive":
            zeros = f"torch.zeros({hidden}.shape, dtype=s.dtype)"
            spelled = [
                f"{zeros}.masked_fill({hidden}, {fill})",
                f"{zeros}.masked_fill_({hidden}, {fill})",
                f"torch.where({visible}, torch.zeros((), dtype=s.dtype), {fill})",
                f"(1.0 - {visible}.to(s.dtype)) * torch.finfo(s.dtype).min",
            ]
            draft.emit(f"bias = {draft.pick(spelled)}")
            draft.emit(draft.pick(["s = s + bias", "s = bias + s", "s += bias", "s.add_(bias)"]))
        case "subtracted":
            much = "1e4" if half else draft.pick(["1e4", "1e9"])
            draft.emit(f"s = s - {much} * {hidden}.to(s.dtype)")
        case _:
            draft.doubt("scores are multiplied by the mask")
            much = "1e4" if half else draft.pick(["1e4", "1e9"])
            draft.emit(f"shown = {visible}.to(s.dtype)", f"s = s * shown - {much} * (1 - shown)")


def _fill(draft: Draft) -> str:
    kind = draft.weighted({"-inf": 5, "min": 3, "-1e4": 1, "-1e9": 2})
    if kind == "-1e9" and draft.score_dtype == torch.float16:
        kind = "-1e4"  # float16 cannot hold -1e9
    draft.note(f"fill: {kind}")
    match kind:
        case "-inf":
            return draft.pick(_MINUS_INFINITY)
        case "min":
            return "torch.finfo(s.dtype).min"
        case _:
            return kind
