// Attention in float32 arithmetic on keys and values as they lie: nothing is packed, so that short
// calls and single queries cost what their products cost. Keys are taken in tiles with a running
// maximum (FlashAttention-2, arXiv 2307.08691).
//
// Where a head has many rows, a tile of keys is transposed first, and products need no horizontal
// sums. A row's result does not depend on how rows are cut into tasks: blocks of rows lie at
// multiples of kFloatBlockRows, and every row adds the keys up in their order.
//
// The includer has defined `Isa` (compiler/kernels/cpu/src/simd_*.hpp).
#pragma once

#include <math.h>
#include <string.h>

#include "elements.hpp"
#include "float_task.hpp"
#include "src/convert.hpp"
#include "src/math.hpp"

namespace sage_ort {
namespace {

using sage_cpu::Carver;
using sage_cpu::Isa;
using sage_cpu::max;
using sage_cpu::min;
using sage_cpu::round_up;
using Floats = Isa::Floats;
using Exponential = sage_cpu::Exponential<6>;

constexpr int64_t kLanes = Isa::kLanes;
constexpr int64_t kTile = 128;  // keys
constexpr int kKeysAtOnce = Isa::kReduced;
constexpr int kScoreRows = kLanes == 16 ? 2 : 1;  // times kKeysAtOnce sums in registers
constexpr int kVectors = kLanes == 16 ? 4 : 2;    // times kFloatBlockRows sums in registers

// How elements of keys and values are read.
struct Float32 {
    using Raw = float;
    static SAGE_INLINE Floats load(const Raw* p) { return Isa::load(p); }
};
struct BFloat16 {
    using Raw = uint16_t;
    static SAGE_INLINE Floats load(const Raw* p) { return Isa::load_bfloat16(p); }
};
struct Float16 {
    using Raw = uint16_t;
    static SAGE_INLINE Floats load(const Raw* p) { return Isa::load_float16(p); }
};

// Keeps a vector in its register, which the compiler would rather load again for every use.
SAGE_INLINE void keep(Floats& x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#else
    (void)x;
#endif
}

// Fewer elements than a vector has; the rest are zeros.
template <class Element>
SAGE_INLINE Floats load_some(const typename Element::Raw* p, int64_t count) {
    typename Element::Raw elements[kLanes] = {};
    memcpy(elements, p, size_t(count) * sizeof *p);
    return Element::load(elements);
}

// Products of Rows rows of Q, padded with zeros to whole vectors, and `keys` keys. Writes whole
// groups of kKeysAtOnce; what lies beyond the keys means nothing.
template <class Element, int Rows>
SAGE_INLINE void multiply_keys(const float* query, int64_t query_stride,
                               const typename Element::Raw* key, int64_t keys, int64_t head_dim,
                               float* scores) {
    int64_t whole = head_dim - head_dim % kLanes;
    for (int64_t first = 0; first < keys; first += kKeysAtOnce) {
        const typename Element::Raw* k[kKeysAtOnce];
#pragma GCC unroll 8
        for (int i = 0; i < kKeysAtOnce; i++) k[i] = key + min(first + i, keys - 1) * head_dim;
        Floats sums[Rows][kKeysAtOnce];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
            for (int i = 0; i < kKeysAtOnce; i++) sums[r][i] = Isa::set(0.0f);
        for (int64_t d = 0; d < whole; d += kLanes)
#pragma GCC unroll 8
            for (int i = 0; i < kKeysAtOnce; i++) {
                Floats x = Element::load(k[i] + d);
                keep(x);
#pragma GCC unroll 8
                for (int r = 0; r < Rows; r++)
                    sums[r][i] = Isa::fma(Isa::load(query + r * query_stride + d), x, sums[r][i]);
            }
        if (whole < head_dim)
#pragma GCC unroll 8
            for (int i = 0; i < kKeysAtOnce; i++) {
                Floats x = load_some<Element>(k[i] + whole, head_dim - whole);
#pragma GCC unroll 8
                for (int r = 0; r < Rows; r++)
                    sums[r][i] =
                        Isa::fma(Isa::load(query + r * query_stride + whole), x, sums[r][i]);
            }
        for (int r = 0; r < Rows; r++) Isa::reduce_add_each(sums[r], scores + r * kTile + first);
    }
}

// Lanes of two vectors in turn: of their first halves, or of their second halves.
template <int Half>
SAGE_INLINE Floats interleave(Floats a, Floats b) {
    typedef int32_t Order __attribute__((vector_size(sizeof(Floats))));
    Order order;
    for (int i = 0; i < kLanes; i++)
        order[i] = int32_t(Half * kLanes / 2 + i / 2 + (i % 2 == 0 ? 0 : kLanes));
    return __builtin_shuffle(a, b, order);
}

// Turns kLanes vectors of kLanes lanes around, by perfect shuffles.
SAGE_INLINE void transpose(Floats* x) {
#pragma GCC unroll 4
    for (int64_t stage = 1; stage < kLanes; stage *= 2) {
        Floats y[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes / 2; i++) {
            y[2 * i] = interleave<0>(x[i], x[i + kLanes / 2]);
            y[2 * i + 1] = interleave<1>(x[i], x[i + kLanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) x[i] = y[i];
    }
}

// The keys of a tile as floats, [head_dim][kTile]; those beyond are copies of the last.
template <class Element>
void transpose_keys(const typename Element::Raw* key, int64_t keys, int64_t head_dim,
                    float* transposed) {
    for (int64_t first = 0; first < keys; first += kLanes)
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            int64_t channels = min(kLanes, head_dim - d);
            Floats x[kLanes];
#pragma GCC unroll 16
            for (int64_t i = 0; i < kLanes; i++) {
                const typename Element::Raw* row = key + min(first + i, keys - 1) * head_dim + d;
                x[i] = channels == kLanes ? Element::load(row) : load_some<Element>(row, channels);
            }
            transpose(x);
            float* place = transposed + d * kTile + first;
            for (int64_t i = 0; i < channels; i++) Isa::store(place + i * kTile, x[i]);
        }
}

// As multiply_keys with transposed keys, for kFloatBlockRows rows and Vectors vectors of keys.
template <int Vectors>
SAGE_INLINE void multiply_transposed(const float* query, int64_t query_stride, const float* key,
                                     int64_t head_dim, float* scores) {
    constexpr int kRows = kFloatBlockRows;
    Floats sums[kRows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; c++) sums[r][c] = Isa::set(0.0f);
    for (int64_t d = 0; d < head_dim; d++) {
        Floats k[Vectors];
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; c++) k[c] = Isa::load(key + d * kTile + c * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
            Floats q = Isa::set(query[r * query_stride + d]);
#pragma GCC unroll 8
            for (int c = 0; c < Vectors; c++) sums[r][c] = Isa::fma(q, k[c], sums[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; c++) Isa::store(scores + r * kTile + c * kLanes, sums[r][c]);
}

void score_transposed(const float* query, int64_t stride, const float* key, int64_t keys,
                      int64_t head_dim, float* scores) {
    int64_t j = 0;
    for (; j + (kVectors - 1) * kLanes < keys; j += kVectors * kLanes)
        multiply_transposed<kVectors>(query, stride, key + j, head_dim, scores + j);
    for (; j + kLanes < keys; j += 2 * kLanes)
        multiply_transposed<2>(query, stride, key + j, head_dim, scores + j);
    for (; j < keys; j += kLanes)
        multiply_transposed<1>(query, stride, key + j, head_dim, scores + j);
}

// The keys of a tile that some row of a block sees, in their order.
struct SeenKeys {
    int64_t count;
    const int16_t* keys;  // null: the first `count`
};

// What the output of a block's rows is multiplied with before more is added; null: it is zero, and
// its memory means nothing.
using Decays = const float*;

// Adds P V to `Vectors` vectors of the output of `Rows` rows; Some: only `some` lanes of the one
// vector are there.
template <class Element, int Rows, int Vectors, bool Some = false>
SAGE_INLINE void add_columns(const float* weights, const typename Element::Raw* value,
                             int64_t value_dim, const SeenKeys& seen, Decays decays, float* output,
                             int64_t output_stride, int64_t some = 0) {
    Floats sums[Rows][Vectors];
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; c++)
            sums[r][c] = decays == nullptr ? Isa::set(0.0f)
                                           : Isa::load(output + r * output_stride + c * kLanes) *
                                                 Isa::set(decays[r]);
    auto add = [&](int64_t key) SAGE_LAMBDA {
        Floats v[Vectors];
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; c++)
            v[c] = Some ? load_some<Element>(value + key * value_dim, some)
                        : Element::load(value + key * value_dim + c * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            Floats weight = Isa::set(weights[r * kTile + key]);
#pragma GCC unroll 8
            for (int c = 0; c < Vectors; c++) sums[r][c] = Isa::fma(weight, v[c], sums[r][c]);
        }
    };
    if (seen.keys == nullptr)
        for (int64_t key = 0; key < seen.count; key++) add(key);
    else
        for (int64_t i = 0; i < seen.count; i++) add(seen.keys[i]);
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < Vectors; c++)
            Isa::store(output + r * output_stride + c * kLanes, sums[r][c]);
}

template <class Element, int Rows>
void add_values(const float* weights, const typename Element::Raw* value, int64_t value_dim,
                const SeenKeys& seen, Decays decays, float* output, int64_t stride) {
    int64_t d = 0;
    for (; d + kVectors * kLanes <= value_dim; d += kVectors * kLanes)
        add_columns<Element, Rows, kVectors>(weights, value + d, value_dim, seen, decays,
                                             output + d, stride);
    for (; d + 2 * kLanes <= value_dim; d += 2 * kLanes)
        add_columns<Element, Rows, 2>(weights, value + d, value_dim, seen, decays, output + d,
                                      stride);
    for (; d + kLanes <= value_dim; d += kLanes)
        add_columns<Element, Rows, 1>(weights, value + d, value_dim, seen, decays, output + d,
                                      stride);
    if (d < value_dim)
        add_columns<Element, Rows, 1, true>(weights, value + d, value_dim, seen, decays, output + d,
                                            stride, value_dim - d);
}

template <class Element, int Rows>
void score_keys(const float* query, int64_t stride, const typename Element::Raw* key, int64_t keys,
                int64_t head_dim, float* scores) {
    constexpr int kAtOnce = min(Rows, kScoreRows);
    for (int r = 0; r < Rows; r += kAtOnce)
        multiply_keys<Element, kAtOnce>(query + r * stride, stride, key, keys, head_dim,
                                        scores + r * kTile);
}

// What is known of a row so far.
struct RowState {
    float maximum;  // natural units; -infinity: nothing seen, and no sink
    float total;    // of exponentials relative to the maximum
    int64_t head, query;
    int64_t first, last;  // keys that the band shows
    bool poisoned;        // by a score that is no number, or +infinity

    bool is_blind(int64_t tile, int64_t count) const {
        return first >= last || first >= tile + count || last <= tile;
    }
    bool sees_all(int64_t tile, int64_t count) const {
        return first <= tile && last >= tile + count;
    }
};

class RowAttention {
 public:
    explicit RowAttention(const FloatTask& task)
        : task_(task),
          call_(*task.call),
          transposes_(is_transposed(call_)),
          block_(task.rows == 1 && !transposes_ ? 1 : kFloatBlockRows),
          rows_(round_up(task.rows, block_)) {
        Carver carver{task.scratch};
        carve(carver);
        used_ = carver.used;
    }

    static int64_t scratch_bytes(const Call& call) {
        Node node{};
        FloatTask task{&call, &node, nullptr, 0, 0, 0, kFloatTaskRows, nullptr};
        return RowAttention(task).used_;
    }

    void run() {
        start();
        int64_t size = element_size(call_.dtype);
        int64_t keys_before = (task_.batch * call_.kv_heads + task_.kv_head) * call_.key_length;
        const char* keys =
            static_cast<const char*>(call_.key) + keys_before * call_.head_dim * size;
        const char* values =
            static_cast<const char*>(call_.value) + keys_before * call_.value_head_dim * size;
        int64_t first = call_.key_length, last = 0;
        for (int64_t row = 0; row < task_.rows; row++) {
            if (states_[row].first >= states_[row].last) continue;
            first = min(first, states_[row].first);
            last = max(last, states_[row].last);
        }
        for (int64_t tile = first - first % kTile; tile < last; tile += kTile) {
            int64_t count = min(kTile, call_.key_length - tile);
            const char* key = keys + tile * call_.head_dim * size;
            const char* value = values + tile * call_.value_head_dim * size;
            if (call_.dtype == kFloat32)
                attend_tile<Float32>(tile, count, key, value);
            else if (call_.dtype == kBFloat16)
                attend_tile<BFloat16>(tile, count, key, value);
            else
                attend_tile<Float16>(tile, count, key, value);
        }
        finish();
    }

 private:
    // Whether whole blocks of queries, and of outputs, can be read and written where they lie.
    bool queries_in_place() const {
        return call_.dtype == kFloat32 && rows_ == task_.rows &&
               (transposes_ || call_.head_dim % kLanes == 0);
    }
    bool outputs_in_place() const {
        return call_.dtype == kFloat32 && rows_ == task_.rows && call_.value_head_dim % kLanes == 0;
    }

    // The task's first row among all rows of queries, outputs and LSEs, where they lie in order.
    int64_t place() const {
        int64_t group = call_.heads / call_.kv_heads;
        int64_t heads_before = task_.batch * call_.heads + task_.kv_head * group;
        return heads_before * call_.query_length + task_.first_row;
    }

    void carve(Carver& carver) {
        states_ = carver.take<RowState>(rows_);
        scores_ = carver.take<float>(block_ * kTile);
        bias_ = carver.take<float>(kTile);
        seen_ = carver.take<uint32_t>(kTile / kLanes);
        seen_keys_ = carver.take<int16_t>(kTile);
        started_ = carver.take<bool>(rows_ / block_);
        // For any task of the call: in place or not.
        query_stride_ = round_up(call_.head_dim, kLanes);
        output_stride_ = round_up(call_.value_head_dim, kLanes);
        query_ = carver.take<float>(rows_ * query_stride_);
        output_ = carver.take<float>(rows_ * output_stride_);
        if (transposes_) {
            key_tile_ = carver.take<float>(kTile * call_.head_dim);
            value_tile_ = carver.take<float>(kTile * call_.value_head_dim);
        }
    }

    void start() {
        place_ = place();
        if (outputs_in_place())
            output_ = static_cast<float*>(call_.output) + place_ * call_.value_head_dim;
        memset(started_, 0, size_t(rows_ / block_));
        start_queries();
        int64_t head =
            task_.kv_head * (call_.heads / call_.kv_heads) + task_.first_row / call_.query_length;
        int64_t query = task_.first_row % call_.query_length;
        const Band& band = call_.band;
        for (int64_t row = 0; row < rows_; row++) {
            RowState& state = states_[row];
            state = {-INFINITY, 0.0f, head, query, 0, 0, false};
            if (row >= task_.rows) continue;
            int64_t diagonal = query + band.diagonal;
            state.first = band.left < 0 ? 0 : max(0, diagonal - band.left);
            state.last = band.right < 0 ? call_.key_length
                                        : min(call_.key_length, diagonal + band.right + 1);
            if (task_.sinks != nullptr) start_with_sink(state);
            if (++query == call_.query_length) {
                query = 0;
                head++;
            }
        }
    }

    void start_with_sink(RowState& state) const {
        float sink = task_.sinks[state.head];
        state.poisoned = !(sink < INFINITY);
        if (sink == -INFINITY) return;
        state.maximum = sink;
        state.total = 1.0f;
    }

    void start_queries() {
        int64_t head_dim = call_.head_dim;
        const char* queries =
            static_cast<const char*>(call_.query) + place_ * head_dim * element_size(call_.dtype);
        if (queries_in_place()) {
            query_ = const_cast<float*>(reinterpret_cast<const float*>(queries));
            query_stride_ = head_dim;
            return;
        }
        int32_t dtype = cpu_dtype(call_.dtype);
        if (query_stride_ == head_dim) {
            sage_cpu::load_row(queries, dtype, 1, task_.rows * head_dim, query_);
        } else {
            memset(query_, 0, size_t(rows_ * query_stride_) * sizeof(float));
            for (int64_t row = 0; row < task_.rows; row++)
                sage_cpu::load_row(queries + row * head_dim * element_size(call_.dtype), dtype, 1,
                                   head_dim, query_ + row * query_stride_);
        }
        int64_t more = (rows_ - task_.rows) * query_stride_;
        memset(query_ + task_.rows * query_stride_, 0, size_t(more) * sizeof(float));
    }

    template <class Element>
    void attend_tile(int64_t tile, int64_t count, const void* keys, const void* values) {
        using Raw = typename Element::Raw;
        const Raw *key = static_cast<const Raw*>(keys), *value = static_cast<const Raw*>(values);
        if (!transposes_) {
            if (block_ == 1)
                attend_directly<Element, 1>(tile, count, key, value);
            else
                attend_directly<Element, kFloatBlockRows>(tile, count, key, value);
            return;
        }
        transpose_keys<Element>(key, count, call_.head_dim, key_tile_);
        const float* value_tile = value_tile_;
        if constexpr (sizeof(Raw) == sizeof(float))
            value_tile = value;
        else
            sage_cpu::load_row(static_cast<const char*>(values), cpu_dtype(call_.dtype), 1,
                               count * call_.value_head_dim, value_tile_);
        auto score = [&](const float* query) SAGE_LAMBDA {
            score_transposed(query, query_stride_, key_tile_, count, call_.head_dim, scores_);
        };
        for (int64_t row = 0; row < rows_; row += kFloatBlockRows)
            attend_block<Float32, kFloatBlockRows>(row, tile, count, score, value_tile);
    }

    template <class Element, int Rows>
    void attend_directly(int64_t tile, int64_t count, const typename Element::Raw* key,
                         const typename Element::Raw* value) {
        auto score = [&](const float* query) SAGE_LAMBDA {
            score_keys<Element, Rows>(query, query_stride_, key, count, call_.head_dim, scores_);
        };
        for (int64_t row = 0; row < rows_; row += Rows)
            attend_block<Element, Rows>(row, tile, count, score, value);
    }

    // score(query) writes the products of a block's rows.
    template <class Element, int Rows, class Score>
    void attend_block(int64_t row, int64_t tile, int64_t count, Score score,
                      const typename Element::Raw* value) {
        RowState* states = states_ + row;
        bool blind = true, all = call_.mask.data == nullptr;
        for (int r = 0; r < Rows; r++) {
            blind &= states[r].is_blind(tile, count);
            // A row that only fills the block sees nothing, and may get any weights.
            if (row + r < task_.rows) all &= states[r].sees_all(tile, count);
        }
        if (blind) return;
        score(query_ + row * query_stride_);
        float scale = task_.node->scale;
        if (task_.node->softcap != 0.0f) {
            scale_and_cap<Rows>(count);
            scale = 1.0f;
        }
        if (!all) {
            memset(seen_, 0, sizeof(uint32_t) * kTile / kLanes);
            for (int r = 0; r < Rows; r++) hide(states[r], tile, count, scale, scores_ + r * kTile);
            scale = 1.0f;
        }
        alignas(64) float decays[kLanes];
        if (!weigh<Rows>(states, count, scale, decays)) return;
        bool& started = started_[row / Rows];
        add_values<Element, Rows>(scores_, value, call_.value_head_dim, list_seen(count, all),
                                  started ? decays : nullptr, output_ + row * output_stride_,
                                  output_stride_);
        started = true;
    }

    template <int Rows>
    void scale_and_cap(int64_t count) const {
        float softcap = task_.node->softcap;
        Floats scale = Isa::set(task_.node->scale), cap = Isa::set(softcap);
        Floats inverse = Isa::set(1.0f / softcap);
        for (int r = 0; r < Rows; r++)
            for (int64_t i = 0; i < count; i += kLanes) {
                float* scores = scores_ + r * kTile + i;
                Isa::store(scores, cap * sage_cpu::tanh(Isa::load(scores) * scale * inverse));
            }
    }

    // Scales a row's scores and adds the mask; what band and mask hide is -infinity, whatever it
    // was. Marks what they show.
    void hide(const RowState& state, int64_t tile, int64_t count, float scale, float* scores) {
        int64_t first = state.first - tile, last = min(count, state.last - tile);
        // A row that only fills its block has no mask.
        bool masked = call_.mask.data != nullptr && !state.is_blind(tile, count);
        if (masked) load_bias(state, tile, count);
        Floats factor = Isa::set(scale), hidden = Isa::set(-INFINITY);
        for (int64_t i = 0; i < count; i += kLanes) {
            uint32_t shown = lanes_below(last - i) & ~lanes_below(first - i);
            Floats x = Isa::load(scores + i) * factor;
            if (masked) {
                Floats bias = Isa::load(bias_ + i);
                shown &= ~Isa::equal(bias, hidden);
                x = x + bias;
            }
            Isa::store(scores + i, Isa::select(shown, x, hidden));
            seen_[i / kLanes] |= shown;
        }
    }

    // A bit for each of the first `count` lanes.
    static SAGE_INLINE uint32_t lanes_below(int64_t count) {
        return uint32_t((uint64_t(1) << min(max(count, 0), kLanes)) - 1);
    }

    // What a row's mask adds to its scores in a tile.
    void load_bias(const RowState& state, int64_t tile, int64_t count) {
        const Mask& mask = call_.mask;
        int64_t offset = task_.batch * mask.stride[0] + state.head * mask.stride[1] +
                         state.query * mask.stride[2] + tile * mask.stride[3];
        const char* base = static_cast<const char*>(mask.data) + offset * element_size(mask.dtype);
        if (mask.dtype != kBool)
            sage_cpu::load_row(base, cpu_dtype(mask.dtype), mask.stride[3], count, bias_);
        else if (mask.stride[3] == 1)
            for (int64_t i = 0; i < count; i++) bias_[i] = base[i] != 0 ? 0.0f : -INFINITY;
        else
            for (int64_t i = 0; i < count; i++) bias_[i] = base[0] != 0 ? 0.0f : -INFINITY;
    }

    // Turns scores into weights, relative to maxima that this tile may raise; decays: what that
    // makes of the weights so far. Returns whether a row has any weight here.
    template <int Rows>
    bool weigh(RowState* states, int64_t count, float scale, float* decays) {
        Floats lanes[Isa::kReduced];
        float results[Isa::kReduced];
        for (int r = 0; r < Isa::kReduced; r++) lanes[r] = Isa::set(-INFINITY);
        uint32_t unordered[Rows] = {};
        Floats factor = Isa::set(scale), hidden = Isa::set(-INFINITY);
        for (int64_t i = 0; i < count; i += kLanes)
            for (int r = 0; r < Rows; r++) {
                float* scores = scores_ + r * kTile + i;
                Floats x = Isa::load(scores) * factor;
                if (i + kLanes > count) x = Isa::select(lanes_below(count - i), x, hidden);
                Isa::store(scores, x);
                unordered[r] |= Isa::unordered(x);
                lanes[r] = Isa::max(lanes[r], x);
            }
        Isa::reduce_max_each(lanes, results);

        bool any = false;
        alignas(64) float before[kLanes] = {}, after[kLanes] = {};
        for (int r = 0; r < Rows; r++) {
            RowState& state = states[r];
            state.poisoned |= unordered[r] != 0 || results[r] == INFINITY;
            any |= state.poisoned || results[r] != -INFINITY;
            before[r] = state.maximum;
            if (results[r] > state.maximum) state.maximum = results[r];
            after[r] = state.maximum == -INFINITY ? 0.0f : state.maximum;
        }
        if (!any) return false;
        Exponential exponential(0.0f, sage_cpu::kLog2E, 1.0f);
        exponential.maximum = Isa::load(after);
        Isa::store(decays, exponential.exact(Isa::load(before)));

        for (int r = 0; r < Rows; r++) {
            exponential.maximum = Isa::set(after[r]);
            lanes[r] = Isa::set(0.0f);
            for (int64_t i = 0; i < count; i += kLanes) {
                Floats weight = exponential.exact(Isa::load(scores_ + r * kTile + i));
                Isa::store(scores_ + r * kTile + i, weight);
                lanes[r] = lanes[r] + weight;
            }
        }
        for (int r = Rows; r < Isa::kReduced; r++) lanes[r] = Isa::set(0.0f);
        Isa::reduce_add_each(lanes, results);
        for (int r = 0; r < Rows; r++) states[r].total = states[r].total * decays[r] + results[r];
        return true;
    }

    SeenKeys list_seen(int64_t count, bool all) const {
        if (all) return {count, nullptr};
        int64_t seen = 0;
        for (int64_t i = 0; i < count; i += kLanes)
            for (uint32_t bits = seen_[i / kLanes]; bits != 0; bits &= bits - 1)
                seen_keys_[seen++] = int16_t(i + __builtin_ctz(bits));
        return {seen, seen == count ? nullptr : seen_keys_};
    }

    void finish() {
        int32_t dtype = cpu_dtype(call_.dtype);
        int64_t row_bytes = call_.value_head_dim * element_size(call_.dtype);
        char* outputs = static_cast<char*>(call_.output) + place_ * row_bytes;
        bool dead_is_nan = task_.node->dead_rows == DeadRows::kNan && call_.key_length != 0;
        bool in_place = outputs_in_place();
        for (int64_t row = 0; row < task_.rows; row++) {
            const RowState& state = states_[row];
            bool dead = state.total == 0.0f, started = started_[row / block_];
            bool is_nan = state.poisoned || (dead && dead_is_nan);
            Floats factor = Isa::set(is_nan ? NAN : dead ? 0.0f : 1.0f / state.total);
            float* output = output_ + row * output_stride_;
            for (int64_t d = 0; d < output_stride_; d += kLanes) {
                Floats sum = started ? Isa::load(output + d) : Isa::set(0.0f);
                Isa::store(output + d, dead && !is_nan ? Isa::set(0.0f) : sum * factor);
            }
            if (!in_place)
                sage_cpu::store_row(outputs + row * row_bytes, dtype, 1, call_.value_head_dim,
                                    output);
            if (call_.lse == nullptr) continue;
            float lse = dead ? -INFINITY : state.maximum + logf(state.total);
            call_.lse[place_ + row] = state.poisoned ? NAN : lse;
        }
    }

    const FloatTask& task_;
    const Call& call_;
    bool transposes_;
    int64_t block_, rows_, used_, place_ = 0;
    int64_t query_stride_, output_stride_;
    RowState* states_;
    float *query_, *output_, *scores_, *bias_, *key_tile_, *value_tile_;
    uint32_t* seen_;      // a bit for each key of the tile that some row of the block sees
    int16_t* seen_keys_;  // their numbers
    bool* started_;       // of each block: its output has been written
};

void attend(const FloatTask& task) { RowAttention(task).run(); }
int64_t scratch_bytes(const Call& call) { return RowAttention::scratch_bytes(call); }

constexpr FloatKernels make_float_kernels() { return {attend, scratch_bytes}; }

}  // namespace
}  // namespace sage_ort
