"""Query, key and value: how they are stored, projected, cached, rotated, normalized, repeated."""

from __future__ import annotations

from tests.passes.programs.draft import Draft

_CHANNELS = 12  # of what is projected to q, k and v


def write_inputs(draft: Draft, query: str, key: str, value: str) -> None:
    """Emit q, k and v with these letters, e.g. "bhqd", "bhkd", "bhke"."""
    draft.query_letters, draft.key_letters, draft.value_letters = query, key, value
    if "h" not in query and "n" not in query:
        _single_head(draft)
        return
    if not _fused(draft):
        for name in ("q", "k", "v"):
            _separate(draft, name)
    _rotate(draft)
    _normalize(draft)
    _repeat_heads(draft)
    for name in ("q", "k", "v"):
        _regroup(draft, name)


def _letters(draft: Draft, name: str) -> str:
    return {"q": draft.query_letters, "k": draft.key_letters, "v": draft.value_letters}[name]


def _heads_first(draft: Draft, name: str) -> bool:
    """Whether the tensor is built as (B, heads, L, D); else as (B, L, heads, D)."""
    letters = _letters(draft, name)
    return letters.startswith("n") or letters[1] == "h"


def _heads(draft: Draft, name: str) -> int:
    return draft.sizes.heads if name == "q" else draft.sizes.kv_heads


def _length(name: str) -> str:
    return "q" if name == "q" else "k"


def _width(draft: Draft, name: str) -> int:
    return draft.sizes.value_head_dim if name == "v" else draft.sizes.head_dim


def _temper(draft: Draft, name: str) -> None:
    """Give an input hostile values now and then: outliers, big or equal entries."""
    tensor = draft.inputs[name]
    kind = draft.weighted({"normal": 20, "outliers": 3, "big": 2, "equal": 1, "zero": 1})
    draft.note(f"values: {kind}")
    match kind:
        case "outliers":
            tensor[..., :: max(1, tensor.shape[-1] // 2)] *= 8
        case "big":
            tensor *= 5
        case "equal":
            tensor.copy_(tensor[..., :1].clone().expand_as(tensor))
        case "zero":
            tensor.zero_()


def _projected(draft: Draft, shape: tuple[int, ...], letters: str, width: int) -> str:
    """An expression of shape (*shape, width): a linear map of a new input."""
    draft.note("layout: projection")
    source = draft.floats("x", (*shape, _CHANNELS), letters)
    weight = draft.floats("w", (width, _CHANNELS))
    draft.inputs[weight] *= 0.3
    return draft.pick([f"F.linear({source}, {weight})", f"({source} @ {weight}.t())"])


# --- from storage to (B, heads, L, D) or (B, L, heads, D) ------------------------------------


def _single_head(draft: Draft) -> None:
    """(B, L, D) or (L, D): no dimension for heads."""
    draft.note("layout: single head")
    for name in ("q", "k", "v"):
        letters = _letters(draft, name)
        if draft.chance(0.25):
            shape = draft.shape(letters[:-1])
            source = _projected(draft, shape, letters[:-1], draft.size(letters[-1]))
        else:
            source = draft.floats(f"{name}_in", draft.shape(letters), letters)
            if name != "v":
                _temper(draft, source)
        draft.emit(f"{name} = {source}")


def _fused(draft: Draft) -> bool:
    """All three from one tensor, where their sizes allow it; whether it was done."""
    sizes = draft.sizes
    first = _heads_first(draft, "q")
    mixed = any(_heads_first(draft, name) != first for name in ("k", "v"))
    if mixed or sizes.query_length != sizes.key_length or not draft.chance(0.3):
        return False
    widths = [_heads(draft, name) * _width(draft, name) for name in ("q", "k", "v")]
    shape = (sizes.batch, sizes.query_length)
    if draft.chance(0.4):
        source = _projected(draft, shape, "bq", sum(widths))
    else:
        source = draft.floats("qkv_in", (*shape, sum(widths)), "bq")
        _temper(draft, source)
    draft.origins["k"] = draft.origins["q"]
    draft.emit(f"qkv = {source}")
    rows = f"{draft.text('b')}, {draft.text('q')}"
    alike = sizes.group == 1 and sizes.head_dim == sizes.value_head_dim
    how = draft.weighted({"5-D": 2.0 * alike, "chunk": 1.0 * alike, "split": 1.0})
    draft.note(f"layout: fused, {how}")
    swap = draft.pick([".transpose(1, 2)", ".permute(0, 2, 1, 3)"]) if first else ""
    match how:
        case "5-D":
            order = "2, 0, 3, 1, 4" if first else "2, 0, 1, 3, 4"
            draft.emit(
                f"qkv = qkv.reshape({rows}, 3, {sizes.heads}, {sizes.head_dim})",
                f"qkv = qkv.permute({order})",
                draft.pick(["q, k, v = qkv.unbind(0)", "q, k, v = qkv[0], qkv[1], qkv[2]"]),
            )
        case "chunk":
            view = f".view({rows}, {sizes.heads}, {sizes.head_dim}){swap}"
            draft.emit(f"q, k, v = [part{view} for part in qkv.chunk(3, dim=-1)]")
        case _:
            draft.emit(f"q, k, v = qkv.split({widths}, dim=-1)")
            for name in ("q", "k", "v"):
                view = f".view({rows}, {_heads(draft, name)}, {_width(draft, name)})"
                draft.emit(f"{name} = {name}{view}{swap}")
    return True


def _separate(draft: Draft, name: str) -> None:
    """One of q, k, v from inputs of its own."""
    first = _heads_first(draft, name)
    options = {"heads first": 4.0, "heads last": 3.0, "merged": 3.0, "projected": 2.0}
    if name == "k" and first:
        options["transposed"] = 1.0
    if name != "q" and first:
        options["cached"] = 1.0
        options["written"] = 0.0 if draft.gradients else 0.7
    how = draft.weighted(options)
    draft.note(f"layout: {how}")
    expression, is_first = _stored(draft, name, how)
    if is_first != first:
        swaps = [".transpose(1, 2)", ".permute(0, 2, 1, 3)", ".swapaxes(1, 2)"]
        expression += draft.pick(swaps)
        if draft.chance(0.2):
            expression += ".contiguous()"
    draft.emit(f"{name} = {expression}")


def _stored(draft: Draft, name: str, how: str) -> tuple[str, bool]:
    """An expression for a tensor stored this way, and whether its heads come first."""
    length, heads, width = _length(name), _heads(draft, name), _width(draft, name)
    batch, count = draft.sizes.batch, draft.size(length)
    stem, sized = f"{name}_in", "b" + length
    if how == "projected":
        expression = _projected(draft, (batch, count), sized, heads * width)
        rows = f"{draft.text('b')}, {draft.text(length)}, {heads}, {width}"
        return f"{expression}.view({rows})", False
    if how == "cached":
        past = draft.rng.randint(0, count - 1)
        old = draft.floats(stem, (batch, heads, past, width), "b")
        new = draft.floats(f"{name}_new", (batch, heads, count - past, width))
        draft.origins.setdefault(length, f"({old}.shape[2] + {new}.shape[2])")
        return f"torch.cat([{old}, {new}], dim={draft.pick([2, -2])})", True
    if how == "written":
        past = draft.rng.randint(0, count - 1)
        cache = draft.floats(stem, (batch, heads, count, width), f"b1{length}")
        new = draft.floats(f"{name}_new", (batch, heads, count - past, width))
        spelled = [f"{cache}[:, :, {past}:] = {new}", f"{cache}[:, :, {past}:].copy_({new})"]
        spelled.append(f"{cache}.narrow(2, {past}, {count - past}).copy_({new})")
        draft.emit(draft.pick(spelled))
        return cache, True
    shapes = {
        "heads first": ((batch, heads, count, width), f"b1{length}"),
        "heads last": ((batch, count, heads, width), sized),
        "merged": ((batch, count, heads * width), sized),
        "transposed": ((batch, heads, width, count), f"b11{length}"),
    }
    source = draft.floats(stem, *shapes[how])
    if name != "v":
        _temper(draft, source)
    rows = f"{draft.text('b')}, {draft.text(length)}, {heads}, {width}"
    if how == "merged":
        return f"{source}.{draft.pick(['view', 'reshape'])}({rows})", False
    if how == "transposed":
        swaps = [".transpose(-1, -2)", ".mT", ".permute(0, 1, 3, 2)"]
        return source + draft.pick(swaps), True
    return source, how == "heads first"


# --- what happens to q and k before they meet ------------------------------------------------


def _rotate(draft: Draft) -> None:
    if not draft.chance(0.1):
        return
    draft.note("transform: rotary")
    for name in ("q", "k"):
        shape = (draft.size(_length(name)), draft.sizes.head_dim)
        cos, sin = draft.floats("cos", shape), draft.floats("sin", shape)
        placed = "" if _heads_first(draft, name) else "[:, None]"
        draft.emit(
            f"left, right = {name}.chunk(2, dim=-1)",
            "turned = torch.cat((-right, left), dim=-1)",
            f"{name} = {name} * {cos}{placed} + turned * {sin}{placed}",
        )


def _normalize(draft: Draft) -> None:
    if not draft.chance(0.1):
        return
    kind = draft.pick(["normalize", "rms", "layer"])
    draft.note(f"transform: {kind} norm")
    for name in ("q", "k"):
        line = {
            "normalize": f"F.normalize({name}, dim=-1)",
            "rms": f"{name} * torch.rsqrt({name}.pow(2).mean(-1, keepdim=True) + 1e-5)",
            "layer": f"F.layer_norm({name}, ({draft.sizes.head_dim},))",
        }[kind]
        draft.emit(f"{name} = {line}")


def _repeat_heads(draft: Draft) -> None:
    """Repeat the heads of k and v where the form has no grouped heads of its own."""
    sizes = draft.sizes
    if "g" in draft.query_letters or sizes.group == 1:
        return
    options = {"repeat_interleave": 3.0, "expand": 4.0}
    if sizes.kv_heads == 1:
        options |= {"expand one": 2.0, "repeat": 1.0}
        if "n" not in draft.query_letters:
            options["broadcast"] = 4.0
    how = draft.weighted(options)
    draft.note(f"heads: {how}")
    for name in ("k", "v"):
        expression = _repeated(draft, name, how)
        if expression != name:
            draft.emit(f"{name} = {expression}")


def _repeated(draft: Draft, name: str, how: str) -> str:
    first = _heads_first(draft, name)
    sizes, axis = draft.sizes, 1 if first else 2
    heads, group, kv_heads = sizes.heads, sizes.group, sizes.kv_heads
    only_heads = ["1" if how == "repeat" else "-1"] * 4
    only_heads[axis] = str(heads)
    match how:
        case "repeat_interleave":
            at = draft.pick([axis, axis - 4])
            return draft.pick(
                [
                    f"{name}.repeat_interleave({group}, dim={at})",
                    f"torch.repeat_interleave({name}, {group}, {at})",
                    f"torch.repeat_interleave({name}, repeats={group}, dim={at})",
                ]
            )
        case "expand" if first:
            new = draft.pick(["[:, :, None]", "[:, :, None, :, :]", ".unsqueeze(2)"])
            rows = f"{name}.shape[2], {_width(draft, name)}"
            batch = f"{name}.shape[0]"
            return (
                f"{name}{new}.expand({batch}, {kv_heads}, {group}, {rows})"
                f".reshape({batch}, {heads}, {rows})"
            )
        case "expand":
            return f"{name}[:, :, :, None].expand(-1, -1, -1, {group}, -1).flatten(2, 3)"
        case "expand one":
            return f"{name}.expand({', '.join(only_heads)})"
        case "repeat":
            return f"{name}.repeat({', '.join(only_heads)})"
        case _:
            return name


def _regroup(draft: Draft, name: str) -> None:
    """From (B, heads, L, D) or (B, L, heads, D) to the letters the form wants."""
    letters, sizes = _letters(draft, name), draft.sizes
    first, rows = _heads_first(draft, name), f"{draft.text(_length(name))}, {_width(draft, name)}"
    spelled = []
    if letters.startswith("n"):
        spelled = [f"{name}.reshape(-1, {rows})", f"{name}.flatten(0, 1)"]
    elif "g" in letters:
        spelled = [f"{name}.unflatten({1 if first else 2}, ({sizes.kv_heads}, {sizes.group}))"]
        if first:
            shape = f"{draft.text('b')}, {sizes.kv_heads}, {sizes.group}, {rows}"
            spelled.append(f"{name}.reshape({shape})")
    if spelled:
        draft.emit(f"{name} = {draft.pick(spelled)}")
