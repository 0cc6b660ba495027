"""From Q K^T to the weights: scale, softcap, biases, masks, sinks, softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.passes.programs import masks
from tests.passes.programs.draft import Draft, aligned


@dataclass(frozen=True, slots=True)
class Scale:
    """A factor, where it is applied, and whether the source divides by its inverse."""

    place: str  # "none", "query", "key", "both", "scores" or "alpha"
    value: float
    divides: bool
    spelled: str


# --- scale ----------------------------------------------------------------------------------


def draw_scale(draft: Draft, allow_alpha: bool = False) -> Scale:
    """Choose a scale; inputs that it needs are made now."""
    places = {"none": 1.0, "scores": 6.0, "query": 3.0, "key": 0.7, "both": 1.0}
    if allow_alpha:
        places["alpha"] = 5.0
    place = draft.weighted(places)
    draft.note(f"scale: {place}")
    head_dim = draft.sizes.head_dim
    usual = head_dim**-0.5
    value = draft.weighted({usual: 8, 0.3: 1, 1.0: 0.5, 1.7: 0.3, -0.4: 0.3})
    if place == "both":
        return Scale(place, head_dim**-0.25, False, f"{head_dim} ** -0.25")
    if place == "alpha":
        return Scale(place, value, False, repr(value))
    divides = draft.chance(0.5)
    if value != usual:
        return Scale(place, value, divides, repr(1 / value if divides else value))
    if place == "scores" and draft.chance(0.15):
        return Scale(place, value, False, _tensor_scale(draft))
    if divides:
        spelled = [
            f"math.sqrt({head_dim})",
            f"{head_dim} ** 0.5",
            "math.sqrt(q.shape[-1])",
            "q.size(-1) ** 0.5",
            f"torch.sqrt(torch.tensor({head_dim}.0))",
            f"torch.tensor({head_dim} ** 0.5)",
            f"torch.full((), {head_dim} ** 0.5)",
            f"(torch.ones(()) * math.sqrt({head_dim}))",
        ]
    else:
        spelled = [
            repr(value),
            f"{head_dim} ** -0.5",
            f"(1 / math.sqrt({head_dim}))",
            "(1.0 / math.sqrt(q.shape[-1]))",
            f"torch.tensor({head_dim} ** -0.5)",
        ]
    return Scale(place, value, divides, draft.pick(spelled))


def _tensor_scale(draft: Draft) -> str:
    """A factor that is an input: one for all, or one for each head."""
    heads = "".join(letter for letter in draft.frame if letter in "hgn")
    if not heads or draft.chance(0.4):
        draft.note("scale: 0-D input")
        name = draft.add_input("temperature", torch.tensor(0.4).to(draft.dtype))
        return draft.pick([name, f"{name}.abs()"])
    draft.note("scale: per head")
    name = draft.floats("head_scale", draft.shape(heads))
    draft.inputs[name] *= 0.3
    return draft.pick(
        [aligned(name, heads, draft.frame), aligned(f"{name}.exp()", heads, draft.frame)]
    )


def scale_inputs(draft: Draft, scale: Scale) -> None:
    """Emit a scale that is applied to q or k."""
    names = {"query": "q", "key": "k", "both": "qk"}.get(scale.place, "")
    for name in names:
        sign = "/" if scale.divides else "*"
        spelled = [f"{name} = {name} {sign} {scale.spelled}"]
        if not scale.divides:
            spelled.append(f"{name} = {scale.spelled} * {name}")
        draft.emit(draft.pick(spelled))


def scale_scores(draft: Draft, scale: Scale) -> None:
    """Emit a scale that is applied to the scores."""
    if scale.place != "scores":
        return
    by = scale.spelled
    spelled = (
        [
            f"s = s / {by}",
            f"s /= {by}",
            f"s.div_({by})",
            f"s = torch.div(s, {by})",
            f"s = s.div({by})",
        ]
        if scale.divides
        else [
            f"s = s * {by}",
            f"s = {by} * s",
            f"s *= {by}",
            f"s.mul_({by})",
            f"s = torch.mul(s, {by})",
        ]
    )
    draft.emit(draft.pick(spelled))


# --- softcap, biases and masks --------------------------------------------------------------


def soften(draft: Draft) -> None:
    """Emit ``c * tanh(s / c)`` now and then."""
    if not draft.chance(0.1):
        return
    draft.note("softcap")
    if "product: baddbmm, bias" in draft.features:
        draft.doubt("softcap after a bias")
    cap = draft.pick([0.7, 5.0, 20.0, 50.0])
    spelled = [
        [f"s = torch.tanh(s / {cap}) * {cap}"],
        [f"s = {cap} * (s / {cap}).tanh()"],
        [f"s = s / {cap}", "s = torch.tanh(s)", f"s = s * {cap}"],
        [f"s = {cap} * torch.tanh(s * {1 / cap!r})"],
    ]
    if not draft.gradients:
        spelled.append([f"s.div_({cap}).tanh_().mul_({cap})"])
        spelled.append([f"s /= {cap}", f"s = s.tanh_() * {cap}"])
    draft.emit(*draft.pick(spelled))


def add_terms(draft: Draft) -> None:
    """Emit masks and biases in any order, with views between them."""
    terms = ["mask"] * draft.weighted({0: 4, 1: 6, 2: 1.5})
    terms += ["bias"] * draft.weighted({0: 6, 1: 3, 2: 1})
    draft.rng.shuffle(terms)
    draft.note(f"terms: {' '.join(sorted(terms)) or 'none'}")
    for term in terms:
        if term == "mask":
            masks.apply_mask(draft, masks.write_mask(draft))
        else:
            _add_bias(draft)
        _view(draft)
    if terms.count("mask") > 1 or "bias" in terms:
        draft.hidden = None  # what one mask hides is then not all that is hidden


def _add_bias(draft: Draft) -> None:
    kinds = {"input": 5.0, "alibi": 1.5, "table": 1.5, "zeros": 0.5, "two": 1.0}
    windows = draft.frame == "bhqk" and draft.sizes.batch > 1
    if windows:
        kinds["windows"] = 2.0
    if draft.frame == "nqk":
        kinds["unfolded"] = 1.5
    kind = draft.weighted(kinds)
    draft.note(f"bias: {kind}")
    if kind == "windows":
        _add_window_bias(draft)
        return
    if kind == "unfolded":
        rows = f"{draft.text('q')}, {draft.text('k')}"
        name = draft.floats("bias_in", (draft.sizes.heads, *draft.shape("qk")))
        draft.emit(f"s = s.view({draft.text('b')}, {draft.sizes.heads}, {rows}) + {name}")
        draft.emit(draft.pick([f"s = s.view(-1, {rows})", "s = s.flatten(0, 1)"]))
        return
    expression = _bias(draft, kind)
    spelled = [
        f"s = s + {expression}",
        f"s = {expression} + s",
        f"s += {expression}",
        f"s.add_({expression})",
        f"s = torch.add(s, {expression})",
        f"s = torch.add(s, {expression}, alpha=0.5)",
        f"s = s - {expression}",
    ]
    draft.emit(draft.pick(spelled))


def _bias(draft: Draft, kind: str) -> str:
    """An expression that broadcasts against the scores."""
    heads = "".join(letter for letter in draft.frame if letter in "hgn")
    rows, columns = draft.text("q"), draft.text("k")
    match kind:
        case "alibi" if heads:
            slopes = draft.floats("slopes", draft.shape(heads))
            placed = aligned(slopes, heads, draft.frame)
            distance = f"(torch.arange({columns}) - torch.arange({rows})[:, None]).to(s.dtype)"
            return f"{placed} * {aligned(distance, 'qk', draft.frame)}"
        case "table" if heads in ("h", "n"):
            most = draft.sizes.query_length + draft.sizes.key_length
            table = draft.floats("table", (most, *draft.shape(heads)))
            index = f"torch.arange({rows})[:, None] - torch.arange({columns}) + {columns}"
            draft.emit(f"relative = {table}[{index}]")
            return aligned("relative", "qk" + heads, draft.frame, leading=True)
        case "zeros":
            shape = ", ".join(
                draft.text(letter) if letter in "qk" else "1" for letter in draft.frame
            )
            return f"torch.zeros({shape}, dtype=s.dtype)"
        case "two":
            one, other = _bias(draft, "input"), _bias(draft, "input")
            return f"({one} + {other})"
        case _:
            letters = draft.pick(masks.letter_sets(draft.frame))
            promoted = ""
            if draft.dtype != torch.float32 and draft.chance(0.15):
                draft.note("bias: of a wider dtype")
                promoted = ".float()"
            if draft.chance(0.5):
                sizes = [draft.size(at) if at in letters else 1 for at in draft.frame]
                return draft.floats("bias_in", sizes) + promoted
            name = draft.floats("bias_in", draft.shape(letters))
            return aligned(name, letters, draft.frame) + promoted


def _add_window_bias(draft: Draft) -> None:
    """Swin: the batch is images times windows, and each window has its mask."""
    batch, heads = draft.sizes.batch, draft.sizes.heads
    rows = f"{draft.text('q')}, {draft.text('k')}"
    name = draft.floats("window_bias", (batch, *draft.shape("qk")))
    view, back = f"s.view(-1, {batch}, {heads}, {rows})", f"s.view(-1, {heads}, {rows})"
    placed = draft.pick(["[None, :, None]", "[:, None]", ".unsqueeze(1).unsqueeze(0)"])
    draft.emit(f"s = {view} + {name}{placed}", f"s = {back}")


def _view(draft: Draft) -> None:
    """Emit something that leaves the scores as they are."""
    if not draft.chance(0.06):
        return
    draft.note("view between terms")
    shape = ", ".join(draft.text(letter) for letter in draft.frame)
    spelled = [
        "s = s.contiguous()",
        "s = s.clone()",
        f"s = s.reshape({shape})",
        "s = s.unsqueeze(0).squeeze(0)",
        "s = s.transpose(-1, -2).contiguous().transpose(-1, -2)",
        "s = s[:]",
        "s = s * 1.0",
        "s = s + 0",
    ]
    draft.emit(draft.pick(spelled))


# --- softmax --------------------------------------------------------------------------------


def write_softmax(draft: Draft) -> None:
    """Emit ``a``, the weights, in the frame of the scores."""
    axis = draft.frame.index("k")
    dim = draft.pick([axis, axis - len(draft.frame)])
    _append_sinks(draft, axis)
    if draft.chance(0.06):
        draft.note("softmax: max subtracted")
        most = [
            f"s.amax({dim}, keepdim=True)",
            f"s.max(dim={dim}, keepdim=True).values",
            f"s.max({dim}, keepdim=True)[0]",
            f"torch.max(s, dim={dim}, keepdim=True)[0].detach()",
        ]
        draft.emit(f"s = s - {draft.pick(most)}")
    how = draft.weighted({"plain": 10, "dtype": 4, "cast": 2, "by hand": 0.3, "log": 0.3})
    draft.note(f"softmax: {how}")
    match how:
        case "plain":
            spelled = [
                f"F.softmax(s, dim={dim})",
                f"torch.softmax(s, dim={dim})",
                f"torch.softmax(s, {dim})",
                f"s.softmax(dim={dim})",
                f"s.softmax({dim})",
                f"torch.nn.functional.softmax(s, {dim})",
            ]
            draft.emit(f"a = {draft.pick(spelled)}")
        case "dtype":
            spelled = [
                f"F.softmax(s, dim={dim}, dtype=torch.float32)",
                f"torch.softmax(s, {dim}, dtype=torch.float32)",
                f"s.softmax({dim}, torch.float32)",
            ]
            draft.emit(f"a = {draft.pick(spelled)}")
        case "cast":
            cast = draft.pick(["s.float()", "s.to(torch.float32)"])
            draft.emit(f"a = torch.softmax({cast}, dim={dim})")
        case "by hand":
            draft.doubt("softmax by hand")
            draft.emit(
                f"a = torch.exp(s - s.amax({dim}, keepdim=True))",
                f"a = a / a.sum({dim}, keepdim=True)",
            )
        case _:
            draft.doubt("exp of log_softmax")
            draft.emit(f"a = F.log_softmax(s, dim={dim}).exp()")
    _cut_sinks(draft, axis)


def _append_sinks(draft: Draft, axis: int) -> None:
    heads = "".join(letter for letter in draft.frame if letter in "hgn")
    if not heads or not draft.chance(0.07):
        return
    draft.sinks = draft.weighted({"last": 3, "first": 1})
    draft.note(f"sinks: {draft.sinks}")
    count = draft.sizes.heads
    name = draft.floats("sinks", (count,) if heads == "n" else draft.shape(heads))
    if heads == "n":
        name = f"{name}.repeat({draft.text('b')})"
    placed = aligned(name, heads, draft.frame, leading=True)
    shape = ", ".join("1" if at == "k" else draft.text(at) for at in draft.frame)
    column = f"{placed}.expand({shape})"
    parts = f"s, {column}.to(s.dtype)" if draft.sinks == "last" else f"{column}.to(s.dtype), s"
    draft.emit(f"s = torch.cat([{parts}], dim={draft.pick([axis, axis - len(draft.frame)])})")


def _cut_sinks(draft: Draft, axis: int) -> None:
    if not draft.sinks:
        return
    part = ":-1" if draft.sinks == "last" else "1:"
    behind = len(draft.frame) - 1 - axis
    if behind == 0 and draft.chance(0.7):
        draft.emit(f"a = a[..., {part}]")
    else:
        index = [":"] * axis + [part]
        draft.emit(f"a = a[{', '.join(index)}]")


def finish_weights(draft: Draft) -> None:
    """Emit what follows the softmax and leaves it what it is."""
    if draft.hidden is not None and draft.chance(0.5):
        draft.note("weights: hidden keys zeroed again")
        if draft.features & {"masked by: additive", "masked by: subtracted", "masked by: blend"}:
            draft.doubt("weights zeroed where a bias hid keys")
        draft.emit(f"a = a.masked_fill({draft.hidden}, 0.0)")
    if draft.chance(0.08):
        draft.note("weights: nan_to_num")
        spelled = ["torch.nan_to_num(a)", "a.nan_to_num(0.0)", "torch.nan_to_num(a, nan=0.0)"]
        spelled.append("torch.where(torch.isnan(a), 0.0, a)")
        draft.emit(f"a = {draft.pick(spelled)}")
    if draft.chance(0.3):
        draft.note("weights: dropout that drops nothing")
        spelled = ["F.dropout(a, p=0.0)", "F.dropout(a, 0.3, training=False)"]
        spelled += ["torch.dropout(a, 0.1, False)", "F.dropout(a, p=0.0, training=True)"]
        draft.emit(f"a = {draft.pick(spelled)}")
    _cast_weights(draft)


def _cast_weights(draft: Draft) -> None:
    """The second product wants one dtype, except under autocast."""
    if draft.autocast:
        return
    if draft.dtype != torch.float32 and draft.chance(0.15):
        draft.note("weights: values cast up")
        draft.restored = True
        draft.emit("a = a.float()", "v = v.float()")
    elif draft.dtype != torch.float32 or draft.score_dtype != torch.float32 or draft.chance(0.2):
        draft.emit(f"a = {draft.pick(['a.to(v.dtype)', 'a.type_as(v)', 'a.to(v)'])}")
