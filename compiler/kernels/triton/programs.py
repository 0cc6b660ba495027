"""Triton programs of the recipe ``int8_fp16``: statistics, operands, attention.

Step for step as ``reference.attention``, with its tiles of 128 queries and 64 keys and its groups
of tokens that share a scale (docs/numerics.md). Importing this module imports Triton, which takes
what ``TRITON_INTERPRET`` says at that moment.

Operands are dense, their tokens filled up to whole tiles and their channels to a power of two:
codes of Q and K in INT8, V in FP16, a scale in float32 for each token. What is filled up is zero.

Maxima may leave NaN out on a GPU, and sums may not: x * 0, added up, is NaN where any x is not
finite. Positions are 32 bits, offsets 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

QUERIES: tl.constexpr = tl.constexpr(128)  # of a tile; precision.TILE_MMA
KEYS: tl.constexpr = tl.constexpr(64)
WARP_ROWS: tl.constexpr = tl.constexpr(32)
LANE_ROWS: tl.constexpr = tl.constexpr(8)

# Of masks.py.
SEEN: tl.constexpr = tl.constexpr(1)
COUNTS: tl.constexpr = tl.constexpr(2)
HIDES_ALL: tl.constexpr = tl.constexpr(0)
SHOWS_ALL: tl.constexpr = tl.constexpr(1)
MIXED: tl.constexpr = tl.constexpr(2)

# Of an explicit mask.
NO_MASK: tl.constexpr = tl.constexpr(0)
BOOL_MASK: tl.constexpr = tl.constexpr(1)
FLOAT_MASK: tl.constexpr = tl.constexpr(2)

INT8_LIMIT: tl.constexpr = tl.constexpr(127.0)
FP16_MAX: tl.constexpr = tl.constexpr(65504.0)
FLOAT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(2.0**-126)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Added and subtracted, it rounds what is below 2**22 to an integer, half to even.
ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _token_flags(flags, batch, head, token, inside, stride_b, stride_h, stride_t):
    """Bits of tokens, 0 outside."""
    at = flags + batch * stride_b + head * stride_h + token * stride_t
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _rows(x, batch, head, token, shown, channels, stride_b, stride_h, stride_t, stride_c, DIM):
    """Tokens of a tensor in its dtype, (tokens, DIM); zeros where not shown and beyond channels."""
    channel = tl.arange(0, DIM)
    at = x + batch * stride_b + head * stride_h
    at += token[:, None] * stride_t + channel.to(tl.int64)[None, :] * stride_c
    return tl.load(at, mask=shown[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def _codes(x, scale):
    """Rows rounded to INT8 by a scale each; what does not count is clipped."""
    rounded = tl.minimum(tl.maximum(tl.div_rn(x, scale[:, None]), -INT8_LIMIT), INT8_LIMIT)
    return (rounded + ROUNDER - ROUNDER).to(tl.int8)


@triton.jit
def _to_log2(x):
    """x * log2(e), where finite stays finite."""
    y = x * LOG2_E
    y = tl.where((y > FLOAT_MAX) & (x <= FLOAT_MAX), FLOAT_MAX, y)
    return tl.where((y < -FLOAT_MAX) & (x >= -FLOAT_MAX), -FLOAT_MAX, y)


@triton.jit
def _tanh(x):
    """To a few units in the last place, near zero too."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = tl.where(x < 0.0, -1.0, 1.0) * (1.0 - decay) / (1.0 + decay)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.03, near, far)


@triton.jit(do_not_specialize=["first_key", "end_key", "chunks"])
def statistics(
    key,
    value,
    flags,
    sums,
    largest,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    key_stride_c,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    value_stride_c,
    flags_stride_b,
    flags_stride_h,
    flags_stride_t,
    kv_heads,
    head_dim,
    value_dim,
    first_key,
    end_key,
    chunks,
    HAS_FLAGS: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """Of a chunk of tokens that count, per channel: sums of K and largest magnitudes of V.

    ``sums`` is (B * Hkv, chunks, DIM), ``largest`` (B * Hkv, chunks, VALUE_DIM), float32.
    """
    head = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    total = tl.zeros([DIM], tl.float32)
    most = tl.zeros([VALUE_DIM], tl.float32)
    for start in range(0, CHUNK, KEYS):
        token = chunk * CHUNK + start + tl.arange(0, KEYS)
        seen = (token >= first_key) & (token < end_key)
        counts = seen
        token = token.to(tl.int64)
        if HAS_FLAGS:
            bits = _token_flags(
                flags, batch, kv_head, token, seen, flags_stride_b, flags_stride_h, flags_stride_t
            )
            seen, counts = (bits & SEEN) != 0, (bits & COUNTS) != 0
        k = _rows(
            key, batch, kv_head, token, counts, head_dim,
            key_stride_b, key_stride_h, key_stride_t, key_stride_c, DIM,
        ).to(tl.float32)  # fmt: skip
        total += tl.sum(k, 0)
        v = _rows(
            value, batch, kv_head, token, seen, value_dim,
            value_stride_b, value_stride_h, value_stride_t, value_stride_c, VALUE_DIM,
        ).to(tl.float32)  # fmt: skip
        counted = tl.where(counts[:, None], tl.abs(v), 0.0)
        most = tl.maximum(most, tl.max(counted, 0)) + tl.sum(v * 0.0, 0)
    part = head.to(tl.int64) * chunks + chunk
    tl.store(sums + part * DIM + tl.arange(0, DIM), total)
    tl.store(largest + part * VALUE_DIM + tl.arange(0, VALUE_DIM), most)


@triton.jit(do_not_specialize=["blocks", "first_live", "end_live"])
def quantize_query(
    query,
    key_mean,
    flags,
    codes,
    scales,
    row_term,
    stride_b,
    stride_h,
    stride_t,
    stride_c,
    flags_stride_b,
    flags_stride_h,
    flags_stride_t,
    heads,
    group,
    head_dim,
    blocks,
    first_live,
    end_live,
    factor,
    HAS_FLAGS: tl.constexpr,
    ROW_TERM: tl.constexpr,
    DIM: tl.constexpr,
):
    """32 queries of a head: codes, scales times ``factor``, and factor * (q . mean K).

    ``factor`` is the scale of the scores, in the units that the attention has them in: of log 2, or
    under a softcap natural ones. ``key_mean`` is (B * Hkv, DIM).
    """
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch, query_head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    token = block * WARP_ROWS + tl.arange(0, WARP_ROWS)
    live = (token >= first_live) & (token < end_live)
    wide = token.to(tl.int64)
    if HAS_FLAGS:
        bits = _token_flags(
            flags, batch, query_head, wide, live, flags_stride_b, flags_stride_h, flags_stride_t
        )
        live = bits != 0
    q = _rows(
        query, batch, query_head, wide, live, head_dim, stride_b, stride_h, stride_t, stride_c, DIM
    ).to(tl.float32)

    # The tokens of a group are equal mod 8: (token / 8, lane).
    largest = tl.reshape(tl.max(tl.abs(q), 1), [WARP_ROWS // LANE_ROWS, LANE_ROWS])
    not_finite = tl.reshape(tl.sum(q * 0.0, 1), [WARP_ROWS // LANE_ROWS, LANE_ROWS])
    of_groups = tl.maximum(tl.div_rn(tl.max(largest, 0), INT8_LIMIT), SMALLEST_SCALE)
    of_groups += tl.sum(not_finite, 0)
    of_tokens = tl.reshape(
        tl.broadcast_to(of_groups[None, :], [WARP_ROWS // LANE_ROWS, LANE_ROWS]), [WARP_ROWS]
    )
    at = head.to(tl.int64) * blocks * WARP_ROWS + wide
    tl.store(codes + at[:, None] * DIM + tl.arange(0, DIM)[None, :], _codes(q, of_tokens))
    tl.store(scales + at, of_tokens * factor)
    if ROW_TERM:
        kv_head = (head // heads) * (heads // group) + (head % heads) // group
        mean = tl.load(key_mean + kv_head.to(tl.int64) * DIM + tl.arange(0, DIM))
        tl.store(row_term + at, tl.sum(q * mean[None, :], 1) * factor)


@triton.jit(do_not_specialize=["blocks", "first_key", "end_key"])
def quantize_keys_values(
    key,
    value,
    key_mean,
    value_scale,
    flags,
    codes,
    scales,
    halves,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    key_stride_c,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    value_stride_c,
    flags_stride_b,
    flags_stride_h,
    flags_stride_t,
    kv_heads,
    head_dim,
    value_dim,
    blocks,
    first_key,
    end_key,
    HAS_FLAGS: tl.constexpr,
    SCALED_VALUE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """64 tokens of a head: codes and scales of K - mean K, and V over its scale in FP16.

    Args:
        SCALED_VALUE: not for V in float16, which is taken as it is.
    """
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    token = block * KEYS + tl.arange(0, KEYS)
    seen = (token >= first_key) & (token < end_key)
    counts = seen
    token = token.to(tl.int64)
    if HAS_FLAGS:
        bits = _token_flags(
            flags, batch, kv_head, token, seen, flags_stride_b, flags_stride_h, flags_stride_t
        )
        seen, counts = (bits & SEEN) != 0, (bits & COUNTS) != 0
    channel = tl.arange(0, DIM)
    wide_head = head.to(tl.int64)
    mean = tl.load(key_mean + wide_head * DIM + channel)
    k = _rows(
        key, batch, kv_head, token, seen, head_dim,
        key_stride_b, key_stride_h, key_stride_t, key_stride_c, DIM,
    ).to(tl.float32)  # fmt: skip
    k = tl.where(seen[:, None], k - mean[None, :], 0.0)

    # The tokens of a group have equal (index mod 8) / 2: (token / 8, lane, parity).
    largest = tl.reshape(tl.where(counts, tl.max(tl.abs(k), 1), 0.0), [KEYS // 8, 4, 2])
    not_finite = tl.reshape(tl.sum(k * 0.0, 1), [KEYS // 8, 4, 2])
    of_groups = tl.max(tl.max(largest, 2), 0)
    of_groups = tl.maximum(tl.div_rn(of_groups, INT8_LIMIT), SMALLEST_SCALE)
    of_groups += tl.sum(tl.sum(not_finite, 2), 0)
    of_tokens = tl.reshape(tl.broadcast_to(of_groups[None, :, None], [KEYS // 8, 4, 2]), [KEYS])
    at = wide_head * blocks * KEYS + token
    tl.store(codes + at[:, None] * DIM + channel[None, :], _codes(k, of_tokens))
    tl.store(scales + at, of_tokens)

    channel = tl.arange(0, VALUE_DIM)
    v = _rows(
        value, batch, kv_head, token, seen, value_dim,
        value_stride_b, value_stride_h, value_stride_t, value_stride_c, VALUE_DIM,
    )  # fmt: skip
    if SCALED_VALUE:
        of_channels = tl.load(value_scale + wide_head * VALUE_DIM + channel)
        v = tl.div_rn(v.to(tl.float32), of_channels[None, :])
        v = tl.where(v > FP16_MAX, FP16_MAX, tl.where(v < -FP16_MAX, -FP16_MAX, v))  # NaN stays
    tl.store(halves + at[:, None] * VALUE_DIM + channel[None, :], v.to(tl.float16))


@triton.jit(
    do_not_specialize=[
        "query_length",
        "key_length",
        "query_blocks",
        "key_blocks",
        "lower",
        "upper",
    ]
)
def attend(
    query,
    query_scales,
    row_term,
    key,
    key_scales,
    value,
    value_scale,
    mask,
    tiles,
    sinks,
    output,
    lse,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    tiles_stride_b,
    tiles_stride_h,
    tiles_stride_q,
    output_stride_b,
    output_stride_h,
    output_stride_t,
    heads,
    group,
    value_dim,
    query_length,
    key_length,
    query_blocks,
    key_blocks,
    lower,
    upper,
    softcap,
    dead_value,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    ROW_TERM: tl.constexpr,
    LSE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """128 queries of a head. Query i sees the keys i + lower to i + upper, and what MASK shows."""
    head = tl.program_id(0) // query_blocks
    block = tl.program_id(0) % query_blocks
    batch, query_head = head // heads, head % heads
    kv_head = (batch * (heads // group) + (query_head // group)).to(tl.int64)
    batch, query_head = batch.to(tl.int64), query_head.to(tl.int64)
    row = block * QUERIES + tl.arange(0, QUERIES)
    channel, value_channel = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    at = head.to(tl.int64) * query_blocks * QUERIES + row
    q = tl.load(query + at[:, None] * DIM + channel[None, :])
    query_scale = tl.load(query_scales + at)
    if ROW_TERM:
        term = tl.load(row_term + at)

    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    accumulator = tl.zeros([QUERIES, VALUE_DIM], tl.float32)
    first = tl.maximum(block * QUERIES + lower, 0) // KEYS
    last_row = tl.minimum(block * QUERIES + QUERIES, query_length) - 1
    end = tl.cdiv(tl.maximum(tl.minimum(last_row + upper + 1, key_length), 0), KEYS)
    for tile in range(first, end):
        shown = SHOWS_ALL
        if MASK != NO_MASK:
            at_tile = tiles + batch * tiles_stride_b + query_head * tiles_stride_h
            shown = tl.load(at_tile + block.to(tl.int64) * tiles_stride_q + tile).to(tl.int32)
        if shown != HIDES_ALL:
            column = tile * KEYS + tl.arange(0, KEYS)
            at_keys = kv_head * key_blocks * KEYS + column
            k = tl.load(key + at_keys[:, None] * DIM + channel[None, :])
            scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
            scores = scores * query_scale[:, None] * tl.load(key_scales + at_keys)[None, :]
            if SOFTCAP:
                scores = _tanh((scores + term[:, None]) / softcap) * (softcap * LOG2_E)
            inside = (column[None, :] >= row[:, None] + lower) & (column < key_length)[None, :]
            inside &= column[None, :] <= row[:, None] + upper
            if MASK != NO_MASK:  # noqa: SIM102 - decided when it is compiled, the other when it runs
                if shown == MIXED:
                    bias_at = mask + batch * mask_stride_b + query_head * mask_stride_h
                    bias_at += row.to(tl.int64)[:, None] * mask_stride_q
                    bias_at += column.to(tl.int64)[None, :] * mask_stride_k
                    bias = tl.load(bias_at, mask=inside & (row < query_length)[:, None], other=0)
                    if MASK == BOOL_MASK:
                        scores = tl.where(bias != 0, scores, float("-inf"))
                    else:
                        scores += _to_log2(bias.to(tl.float32))
            scores = tl.where(inside, scores, float("-inf"))

            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
            origin = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = tl.exp2(scores - origin[:, None])
            decay = tl.exp2(maximum - origin)
            v = tl.load(value + at_keys[:, None] * VALUE_DIM + value_channel[None, :])
            accumulator = tl.dot(weights.to(tl.float16), v, accumulator * decay[:, None])
            total = total * decay + tl.sum(weights, 1)
            maximum = new_maximum

    sees = total != 0.0  # the greatest of the weights is 1, or all are NaN
    scale = tl.load(value_scale + kv_head * VALUE_DIM + value_channel)
    result = accumulator / tl.where(sees, total, 1.0)[:, None] * scale[None, :]
    result = tl.where(sees[:, None], result, 0.0)
    log_sum = tl.where(sees, maximum + tl.log2(total), float("-inf"))
    if ROW_TERM and not SOFTCAP:
        log_sum += term
    if SINKS:
        sink = _to_log2(tl.load(sinks + query_head).to(tl.float32))
        sink = tl.where(sink == float("inf"), float("nan"), sink)
        most = tl.maximum(log_sum, sink)
        with_sink = most + tl.log2(tl.exp2(log_sum - most) + tl.exp2(sink - most))
        with_sink = tl.where(most == float("-inf"), most, with_sink)
        with_sink = tl.where(log_sum != log_sum, log_sum, with_sink)
        with_sink = tl.where(sink != sink, sink, with_sink)
        result *= tl.exp2(log_sum - with_sink)[:, None]  # the keys' share
        log_sum = with_sink
    result = tl.where((log_sum == float("-inf"))[:, None], dead_value, result)

    row_exists = row < query_length
    row = row.to(tl.int64)
    at_output = output + batch * output_stride_b + query_head * output_stride_h
    tl.store(
        at_output + row[:, None] * output_stride_t + value_channel[None, :],
        result.to(output.dtype.element_ty),
        mask=row_exists[:, None] & (value_channel < value_dim)[None, :],
    )
    if LSE:
        tl.store(lse + head.to(tl.int64) * query_length + row, log_sum * LN_2, mask=row_exists)
