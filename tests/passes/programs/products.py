"""The two products: Q K^T, and the weights with V, in the order of dimensions of each form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from tests.passes.programs.draft import Draft
from tests.passes.programs.scores import Scale

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Form:
    """The letters of q, k, v and of the scores; see the letters in ``draft``."""

    name: str
    query: str
    key: str
    value: str
    frame: str


FORMS: Final = {
    Form("heads first", "bhqd", "bhkd", "bhke", "bhqk"): 8.0,
    Form("heads first, keys first", "bhqd", "bhkd", "bhke", "bhkq"): 0.7,
    Form("heads last", "bqhd", "bkhd", "bkhe", "bhqk"): 2.0,
    Form("heads last, scores b q h k", "bqhd", "bkhd", "bkhe", "bqhk"): 0.5,
    Form("heads last, scores b q k h", "bqhd", "bkhd", "bkhe", "bqkh"): 0.5,
    Form("heads last, scores h b q k", "bqhd", "bkhd", "bkhe", "hbqk"): 0.3,
    Form("heads last, scores b h k q", "bqhd", "bkhd", "bkhe", "bhkq"): 0.3,
    Form("heads last, scores b k q h", "bqhd", "bkhd", "bkhe", "bkqh"): 0.3,
    Form("mixed order", "bhqd", "bkhd", "bhke", "bhqk"): 0.3,
    Form("folded", "nqd", "nkd", "nke", "nqk"): 4.0,
    Form("folded, keys first", "nqd", "nkd", "nke", "nkq"): 0.3,
    Form("one head", "bqd", "bkd", "bke", "bqk"): 1.0,
    Form("one matrix", "qd", "kd", "ke", "qk"): 0.7,
    Form("grouped", "bhgqd", "bhkd", "bhke", "bhgqk"): 1.5,
    Form("grouped, heads last", "bqhgd", "bkhd", "bkhe", "bhgqk"): 0.7,
}


def _transposed(name: str, rank: int) -> list[str]:
    dims = [*range(rank - 2), rank - 1, rank - 2]
    spelled = [
        f"{name}.transpose(-2, -1)",
        f"{name}.transpose(-1, -2)",
        f"{name}.mT",
        f"{name}.permute({', '.join(map(str, dims))})",
        f"{name}.swapaxes(-1, -2)",
        f"torch.transpose({name}, -1, -2)",
        f"{name}.transpose({rank - 2}, {rank - 1})",
        f"{name}.transpose(-1, -2).contiguous()",
    ]
    return spelled + [f"{name}.t()", f"{name}.T"] * (rank == 2)


def _matmul(one: str, other: str, rank: int) -> list[str]:
    spelled = [
        f"torch.matmul({one}, {other})",
        f"{one} @ {other}",
        f"{one}.matmul({other})",
        f"torch.matmul(input={one}, other={other})",
    ]
    if rank == 3:
        spelled += [f"torch.bmm({one}, {other})", f"{one}.bmm({other})"] * 2
    if rank == 2:
        spelled += [f"torch.mm({one}, {other})", f"{one}.mm({other})"]
    return spelled


def _einsum(draft: Draft, one: str, other: str, out: str, names: tuple[str, str]) -> str:
    """A call of einsum, its letters drawn anew and its operands in either order."""
    used = sorted(set(one + other))
    drawn = dict(zip(used, draft.rng.sample(_LETTERS, len(used)), strict=True))
    if draft.chance(0.5):
        drawn = {letter: letter for letter in used}
    first, second, result = ("".join(drawn[letter] for letter in at) for at in (one, other, out))
    left, right = names
    if draft.chance(0.25):
        first, second, left, right = second, first, right, left
    batch = one[:-2]
    if batch and other[:-2] == batch and out[:-2] == batch and draft.chance(0.25):
        first, second, result = (f"...{at[-2:]}" for at in (first, second, result))
    space = draft.pick(["", " "])
    equation = f"{first},{space}{second}{space}->{space}{result}"
    operands = draft.pick([f"{left}, {right}", f"[{left}, {right}]"])
    return f'torch.einsum("{equation}", {operands})'


# --- Q K^T ----------------------------------------------------------------------------------


def write_scores(draft: Draft, form: Form, scale: Scale) -> None:
    """Emit ``s``, the scores, in the frame of the form."""
    draft.frame = form.frame
    query, key = "q", "k"
    if draft.dtype != torch.float32 and not draft.autocast and draft.chance(0.2):
        draft.note("scores: inputs cast up")
        query, key = "q.float()", draft.pick(["k.float()", "k.to(torch.float32)"])
        draft.score_dtype = torch.float32
    if scale.place == "alpha":
        _write_baddbmm(draft, query, key, scale)
        return
    queries_first = form.frame.endswith("qk")
    aligned_key = form.key[:-2] == form.frame[:-2] and form.query[:-2] == form.frame[:-2]
    grouped = form.name == "grouped"
    if (aligned_key or grouped) and draft.chance(0.8):
        if grouped:
            key = f"{key}{draft.pick(['[:, :, None]', '.unsqueeze(2)'])}"
        rank = len(form.frame)
        one, other = (query, key) if queries_first else (key, query)
        line = draft.pick(_matmul(one, draft.pick(_transposed(other, rank)), rank))
        draft.note("product: matmul")
    else:
        line = _einsum(draft, form.query, form.key, form.frame, (query, key))
        draft.note("product: einsum")
    if (
        draft.dtype == torch.float32
        and not (draft.autocast or draft.gradients)
        and draft.chance(0.02)
    ):
        draft.doubt("autocast around one product")
        draft.score_dtype = torch.bfloat16
        draft.emit('with torch.autocast("cpu", dtype=torch.bfloat16):', f"    s = {line}")
        return
    draft.emit(f"s = {line}")


def _write_baddbmm(draft: Draft, query: str, key: str, scale: Scale) -> None:
    """``beta * bias + alpha * q @ k^T`` in one call."""
    key = draft.pick(_transposed(key, 3))
    alpha = f"alpha={scale.spelled}"
    dtype = "torch.float32" if draft.score_dtype != draft.dtype else "q.dtype"
    batch, rows, columns = (draft.text(letter) for letter in "nqk")
    if draft.chance(0.5):
        draft.note("product: baddbmm, beta=0")
        shape = draft.pick(["q.shape[0], q.shape[1], k.shape[1]", f"{batch}, {rows}, {columns}"])
        made = draft.pick(
            [f"torch.empty({shape}, dtype={dtype})", f"torch.zeros(1, dtype={dtype})"]
        )
        draft.emit(f"s = torch.baddbmm({made}, {query}, {key}, beta=0, {alpha})")
        return
    draft.note("product: baddbmm, bias")
    letters = draft.pick(["nqk", "nk", "qk"])
    sizes = [draft.size(at) if at in letters else 1 for at in "nqk"]
    bias = draft.floats("bias_in", sizes)
    beta = draft.pick(["", "beta=1.0, ", "beta=0.5, "])
    if dtype == "torch.float32":
        bias += ".float()"
    spelled = [
        f"torch.baddbmm({bias}, {query}, {key}, {beta}{alpha})",
        f"{bias}.baddbmm({query}, {key}, {beta}{alpha})",
        f"{bias}.baddbmm(batch1={query}, batch2={key}, {beta}{alpha})",
    ]
    draft.emit(f"s = {draft.pick(spelled)}")


# --- the weights with V ---------------------------------------------------------------------


def write_output(draft: Draft, form: Form) -> None:
    """Emit ``o`` from the weights ``a``, in the letters ``draft.output``."""
    rank = len(form.frame)
    batch = form.frame[:-2]
    grouped = form.name == "grouped"
    usual = form.frame.endswith(("qk", "kq")) and form.value[:-2] == batch
    if (usual or grouped) and draft.chance(0.8):
        value = "v[:, :, None]" if grouped else "v"
        weights = "a" if form.frame.endswith("qk") else draft.pick(_transposed("a", rank))
        if draft.chance(0.1):
            # As convolutional code writes it: values by queries.
            turned = draft.pick(_transposed("a", rank)) if weights == "a" else "a"
            line = draft.pick(_matmul(draft.pick(_transposed(value, rank)), turned, rank))
            draft.note("output: values times weights")
            draft.emit(f"o = {line}", f"o = {draft.pick(_transposed('o', rank))}")
        else:
            draft.emit(f"o = {draft.pick(_matmul(weights, value, rank))}")
        draft.output = batch + "qe"
        return
    heads = "".join(letter for letter in form.query if letter in "bhgn")
    last = form.query.replace("d", "e")
    first = ("b" if "b" in heads else "") + heads.replace("b", "") + "qe"
    draft.output = draft.pick([first, last])
    line = _einsum(draft, form.frame, form.value, draft.output, ("a", "v"))
    draft.note("output: einsum")
    draft.emit(f"o = {line}")


def merge_heads(draft: Draft) -> None:
    """Emit the usual end: heads next to each other, and a projection."""
    letters, sizes = draft.output, draft.sizes
    batch, length = draft.text("b"), draft.text("q")
    width = sizes.heads * sizes.value_head_dim
    if letters in ("bqe", "qe") or draft.chance(0.2):
        return
    draft.note("output: merged heads")
    rows = f"{batch}, {length}"
    if letters == "nqe":
        shape = f"{batch}, {sizes.heads}, {length}, {sizes.value_head_dim}"
        draft.emit(f"o = o.{draft.pick(['view', 'reshape'])}({shape})")
        letters = "bhqe"
    if letters == "bhgqe":
        merged = f"o.reshape({batch}, {sizes.heads}, {length}, -1)"
        draft.emit(f"o = {draft.pick(['o.flatten(1, 2)', merged])}")
        letters = "bhqe"
    if letters == "bhqe":
        swap = draft.pick(["o.transpose(1, 2)", "o.permute(0, 2, 1, 3)"])
        ends = [f"reshape({rows}, {width})", f"contiguous().view({rows}, {width})", "flatten(2)"]
        draft.emit(f"o = {swap}.{draft.pick(ends)}")
    elif letters in ("bqhe", "bqhge"):
        draft.emit(f"o = {draft.pick([f'o.reshape({rows}, {width})', 'o.flatten(2)'])}")
    else:
        return
    if draft.chance(0.2):
        weight = draft.floats("w_out", (5, width))
        draft.inputs[weight] *= 0.3
        draft.emit(f"o = F.linear(o, {weight})")
