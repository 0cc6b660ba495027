"""Random programs of attention, one for each seed."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.passes.programs import masks, products, scores
from tests.passes.programs.draft import Draft, Program, Sizes, aligned
from tests.passes.programs.hostile import Extra, Moment, add_extras, draw_extras
from tests.passes.programs.layout import write_inputs

HOSTILE_SHARE = 0.22
_DTYPES = {torch.float32: 8, torch.bfloat16: 1.3, torch.float16: 1.0}


def program(seed: int) -> Program:
    """The program of this seed: always the same one."""
    drawn = _draw(seed)
    if not drawn.dynamic:
        return drawn
    longer = _draw(seed, longer=True)
    return replace(drawn, again=longer.inputs) if longer.source == drawn.source else drawn


def _draw(seed: int, longer: bool = False) -> Program:
    draft = Draft(seed, longer)
    draft.dtype = draft.weighted(_DTYPES)
    draft.note(f"dtype: {str(draft.dtype).removeprefix('torch.')}")
    draft.gradients = draft.dtype == torch.float32 and draft.chance(0.12)
    draft.autocast = draft.dtype == torch.float32 and not draft.gradients and draft.chance(0.05)
    draft.symbolic = draft.chance(0.5)
    dynamic = draft.symbolic and draft.chance(0.12)
    for flag in ("gradients", "autocast", "symbolic"):
        if getattr(draft, flag):
            draft.note(flag)
    count = draft.weighted({1: 20, 2: 1})
    for number in range(count):
        _write_attention(draft, number)
    extra = any(line.startswith(("extra = ", "o, extra = ")) for line in draft.lines)
    results = [f"o{at}" for at in range(count)] + ["extra"] * extra
    draft.emit(f"return {', '.join(results)}")
    return Program(
        seed=seed,
        source=_source(draft),
        inputs=tuple(draft.inputs.values()),
        dtype=draft.dtype,
        attentions=count,
        doubts=frozenset(draft.doubts),
        features=frozenset(draft.features),
        gradients=draft.gradients,
        dynamic=dynamic,
    )


def _source(draft: Draft) -> str:
    head = f"def program({', '.join(draft.inputs)}):"
    body = draft.lines
    if draft.autocast:
        inside = [f"    {line}" for line in body]
        body = ['with torch.autocast("cpu", dtype=torch.bfloat16):', *inside]
    return "\n".join([head, *(f"    {line}" for line in body), ""])


def _sizes(draft: Draft, form: products.Form | None) -> Sizes:
    query = draft.weighted({draft.rng.randint(1, 40): 9, 1: 1, 16: 1})
    key = query if draft.chance(0.6) else draft.rng.randint(1, 40)
    head_dim = draft.pick([8, 8, 10, 12, 16, 16, 24, 32, 40])
    value = head_dim if draft.chance(0.75) else draft.rng.randint(8, 40)
    batch, heads, kv_heads = draft.rng.randint(1, 3), draft.rng.randint(1, 4), 0
    if form is not None and not set("hn") & set(form.query):
        heads = 1
        batch = batch if "b" in form.query else 1
    if draft.longer and min(query, key) > 1:  # Dynamo takes a length of one for a constant
        query, key = query + (5 if query > key else 3), key + (5 if key > query else 3)
    grouped = form is not None and "g" in form.query
    if grouped or draft.chance(0.25):
        heads = draft.pick([2, 4]) if heads > 1 or grouped else 1
        kv_heads = draft.pick([1, 2]) if heads == 4 else 1
    return Sizes(batch, heads, kv_heads or heads, query, key, head_dim, value)


def _write_attention(draft: Draft, number: int) -> None:
    """Emit one attention, its result assigned to o{number}."""
    draft.begin_attention()
    extras = draw_extras(draft, HOSTILE_SHARE)
    how = draft.weighted({"chain": 40, "sdpa": 5, "module": 1})
    form = draft.weighted(products.FORMS) if how == "chain" else None
    draft.sizes = _sizes(draft, form)
    draft.note(f"form: {form.name if form else how}")
    if how == "module":
        _write_module(draft)
    elif form is None:
        _write_sdpa(draft, extras)
    else:
        _write_chain(draft, form, extras)
    if draft.restored:
        draft.emit("o = o.to(q.dtype)")
    products.merge_heads(draft)
    if how != "module":
        add_extras(draft, extras, Moment.OUTPUT)
    draft.emit(f"o{number} = o")


def _write_chain(draft: Draft, form: products.Form, extras: list[Extra]) -> None:
    write_inputs(draft, form.query, form.key, form.value)
    draft.frame = form.frame
    scale = scores.draw_scale(draft, allow_alpha=form.frame == "nqk")
    add_extras(draft, extras, Moment.INPUTS)
    scores.scale_inputs(draft, scale)
    products.write_scores(draft, form, scale)
    add_extras(draft, extras, Moment.PRODUCT)
    if draft.chance(0.04):
        draft.doubt("scale after a term")
        scores.add_terms(draft)
        scores.scale_scores(draft, scale)
    else:
        scores.scale_scores(draft, scale)
        scores.soften(draft)
        scores.add_terms(draft)
    add_extras(draft, extras, Moment.TERMS)
    scores.write_softmax(draft)
    add_extras(draft, extras, Moment.WEIGHTS)
    scores.finish_weights(draft)
    products.write_output(draft, form)


def _write_sdpa(draft: Draft, extras: list[Extra]) -> None:
    """scaled_dot_product_attention itself, with heads repeated, grouped or broadcast."""
    form = next(iter(products.FORMS))
    grouped = draft.sizes.group > 1 and draft.chance(0.5)
    heads, kv_heads = draft.sizes.heads, draft.sizes.kv_heads
    write_inputs(draft, form.query, form.key, form.value)
    draft.frame = form.frame
    add_extras(draft, extras, Moment.INPUTS)
    arguments = ["q", "k", "v"]
    match draft.weighted({"none": 3, "causal": 2, "mask": 4, "bias": 2}):
        case "causal":
            arguments.append("is_causal=True")
        case "mask":
            mask = masks.write_mask(draft)
            where = aligned(mask.expression, mask.letters, draft.frame, leading=True)
            arguments.append(f"attn_mask={'~' if mask.hidden else ''}{where}")
        case "bias":
            letters = draft.pick(masks.letter_sets(draft.frame))
            shape = [draft.size(at) if at in letters else 1 for at in draft.frame]
            arguments.append(f"attn_mask={draft.floats('bias_in', shape)}")
    if draft.chance(0.4):
        arguments.append(f"scale={draft.pick([1.0, 0.3, draft.sizes.head_dim**-0.5])!r}")
    if grouped and heads != kv_heads:
        arguments.append("enable_gqa=True")
    draft.emit(f"o = F.scaled_dot_product_attention({', '.join(arguments)})")
    draft.output = "bhqe"


def _write_module(draft: Draft) -> None:
    """The function behind nn.MultiheadAttention, which Dynamo leaves as one node."""
    sizes = draft.sizes
    width = sizes.heads * sizes.head_dim
    rows, columns = (sizes.query_length, sizes.batch, width), (sizes.key_length, sizes.batch, width)
    query, key = draft.floats("x", rows), draft.floats("x", columns)
    in_weight, out_weight = draft.floats("w", (3 * width, width)), draft.floats("w", (width, width))
    in_bias, out_bias = draft.floats("w_bias", (3 * width,)), draft.floats("w_bias", (width,))
    draft.inputs[in_weight] *= 0.2
    draft.inputs[out_weight] *= 0.2
    options = ["training=False"]
    if draft.chance(0.4):
        padding = draft.bools("padding", (sizes.batch, sizes.key_length), 0.3)
        draft.inputs[padding][:, 0] = False
        options.append(f"key_padding_mask={padding}")
    if draft.chance(0.4):
        options.append(f"attn_mask={draft.floats('bias_in', draft.shape('qk'))}")
    if draft.chance(0.7):
        options.append("need_weights=False")
    else:
        draft.doubt("the module returns its weights")
    given = (
        f"{query}, {key}, {key}, {width}, {sizes.heads}, {in_weight}, {in_bias}, "
        f"None, None, False, 0.1, {out_weight}, {out_bias}, {', '.join(options)}"
    )
    draft.emit(f"o, extra = F.multi_head_attention_forward({given})")
    draft.output = "qe"
