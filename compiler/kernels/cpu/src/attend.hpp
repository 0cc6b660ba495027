// Query rows against packed keys and values: scores, an online softmax over blocks, products.
#pragma once

#include "gemm.hpp"
#include "mask.hpp"
#include "math.hpp"

namespace sage_cpu {
namespace {

// How the scores of one call are made. Plain scores stay integers times the key's scale, and become
// exponents by the query's scale. A softcap or a float mask needs the finished score, in natural
// units: there a bias of finfo.min is still finite.
struct Scoring {
    bool finished;
    float factor;   // of a dot product of query and key: |scale|, times log2(e) for plain scores
    float sign;     // of scale, which goes into the quantized query
    float softcap;  // 0: none
};

inline Scoring scoring_of(const sage_cpu_problem& p) {
    bool biased = p.mask.data != nullptr && p.mask_dtype != SAGE_CPU_BOOL;
    Scoring s;
    s.softcap = p.softcap;
    s.finished = p.softcap != 0.0f || biased;
    s.factor = __builtin_fabsf(p.scale) * (s.finished ? 1.0f : kLog2E);
    s.sign = p.scale < 0.0f ? -1.0f : 1.0f;
    return s;
}

// What a float mask adds where it need not be read.
alignas(64) constexpr float kNoBias[kTileKeys] = {};

// A row of the task: one query of one head of the group.
struct Row {
    int64_t head, query;
    Interval keys;          // that the band shows
    const char* mask;       // its row of the mask; null without one
    const uint8_t* states;  // its tiles in the mask map
    bool bad;               // not finite: yields NaN
};

// A task's scratch memory.
struct Scratch {
    Row* rows;               // (padded rows); padding sees what the last row sees
    Interval* seen_by_some;  // (groups): keys that the band shows to some row of a group
    Interval* seen_by_all;   // (groups): and to every row of it
    Isa::Element* query;     // (padded rows, head_dim): INT8 recipes
    float* query_floats;     // (padded rows, padded head_dim), times scale in the float recipe
    float* query_scale;      // (padded rows): of a plain score, see Scoring
    int32_t* correction;     // (padded rows): takes the offset of K out of the sums
    float* row_term;         // (padded rows): score of the block's key mean
    float* maximum;          // (padded rows): running, in log 2
    float* total;            // (padded rows): running denominator
    float* output;           // (padded rows, padded value_head_dim): running numerator
    float* scores;           // (kGroupRows, kBlockKeys)
    float* bias;             // (kGroupRows, kTileKeys): of a mask that is not floats in rows
    Isa::Element* weights;   // (planes, kGroupRows, kBlockKeys), or floats

    SAGE_INLINE static Scratch carve(Carver& carver, const sage_cpu_problem& p) {
        // Groups and reductions go beyond the last row.
        int64_t rows = kTaskRows + Isa::kReduced;
        int64_t head_dim = round_up(p.head_dim, kChannelMultiple);
        int64_t value_head_dim = round_up(p.value_head_dim, kChannelMultiple);
        Scratch s;
        s.rows = carver.take<Row>(rows);
        s.seen_by_some = carver.take<Interval>(kTaskRows / kGroupRows);
        s.seen_by_all = carver.take<Interval>(kTaskRows / kGroupRows);
        s.query = carver.take<Isa::Element>(rows * head_dim);
        s.query_floats = carver.take<float>(rows * head_dim);
        s.query_scale = carver.take<float>(rows);
        s.correction = carver.take<int32_t>(rows);
        s.row_term = carver.take<float>(rows);
        s.maximum = carver.take<float>(rows);
        s.total = carver.take<float>(rows);
        s.output = carver.take<float>(rows * value_head_dim);
        s.scores = carver.take<float>(kGroupRows * kBlockKeys);
        s.bias = carver.take<float>(kGroupRows * kTileKeys);
        s.weights = reinterpret_cast<Isa::Element*>(carver.take<float>(kGroupRows * kBlockKeys));
        return s;
    }
};

struct Attention {
    const AttendTask& task;
    const sage_cpu_problem& p;
    Scoring scoring;
    Scratch s;
    int64_t head_dim, query_width, value_width;

    // --- queries

    void read_queries() {
        int64_t padded = round_up(task.rows, kGroupRows);
        for (int64_t r = 0; r < padded; r++) {
            float* floats = s.query_floats + r * query_width;
            __builtin_memset(floats, 0, size_t(query_width) * sizeof(float));
            s.maximum[r] = -__builtin_inff();
            s.total[r] = 0.0f;
            s.row_term[r] = 0.0f;
            if (r >= task.rows) {
                s.rows[r] = s.rows[task.rows - 1];
            } else {
                int64_t row = task.first_row + r, group = p.heads / p.kv_heads;
                int64_t head = task.kv_head * group + row / p.query_length;
                int64_t query = row % p.query_length;
                Row& info = s.rows[r];
                info = Row{head, query, visible_keys(p, query), nullptr, nullptr, false};
                if (task.map != nullptr) {
                    info.mask = address(p.mask, p.mask_dtype, task.batch, head, query);
                    info.states = task.map->states(task.batch, head, query);
                }
                prefetch_query(row + kPrefetchedRows);
                load_row(address(p.query, p.dtype, task.batch, head, query), p.dtype,
                         p.query.stride[3], p.head_dim, floats);
            }
            quantize_query(r, floats);
        }
        __builtin_memset(s.output, 0, size_t(padded * value_width) * sizeof(float));
        for (int64_t first = 0; first < padded; first += kGroupRows) {
            Interval some{p.key_length, 0}, all{0, p.key_length};
            for (int64_t r = first; r < first + kGroupRows; r++) {
                Interval keys = s.rows[r].keys;
                all = {max(all.first, keys.first), min(all.last, keys.last)};
                if (keys.first < keys.last)
                    some = {min(some.first, keys.first), max(some.last, keys.last)};
            }
            s.seen_by_some[first / kGroupRows] = some;
            s.seen_by_all[first / kGroupRows] = all;
        }
    }

    static constexpr int64_t kPrefetchedRows = 8;

    void prefetch_query(int64_t row) const {
        if (row >= task.first_row + task.rows || p.query.stride[3] != 1) return;
        int64_t head = task.kv_head * (p.heads / p.kv_heads) + row / p.query_length;
        const char* data = address(p.query, p.dtype, task.batch, head, row % p.query_length);
        for (int64_t b = 0; b < p.head_dim * element_size(p.dtype); b += 64)
            __builtin_prefetch(data + b);
    }

    void quantize_query(int64_t r, float* floats) {
        Isa::Floats largest = Isa::set(0.0f), nonfinite = Isa::set(0.0f);
        for (int64_t c = 0; c < query_width; c += Isa::kLanes) {
            Isa::Floats x = Isa::load(floats + c);
            largest = Isa::max(largest, Isa::abs(x));
            nonfinite = Isa::fma(x, Isa::set(0.0f), nonfinite);
        }
        float maximum = Isa::reduce_max(largest);
        s.rows[r].bad = Isa::reduce_add(nonfinite) != 0.0f;
        if (p.recipe == SAGE_CPU_FLOAT) {
            Isa::Floats factor = Isa::set(scoring.factor * scoring.sign);
            for (int64_t c = 0; c < query_width; c += Isa::kLanes)
                Isa::store(floats + c, Isa::load(floats + c) * factor);
            s.query_scale[r] = 1.0f;
            if (s.rows[r].bad) __builtin_memset(floats, 0, size_t(query_width) * sizeof(float));
            return;
        }
        // Not too small, so that the score where an exponent is cut is finite; else all are zero.
        float scale = maximum / 127.0f * scoring.factor;
        bool usable = !s.rows[r].bad && maximum > kSmallestMaximum && scale > kSmallestMaximum;
        float inverse = usable ? 127.0f / maximum * scoring.sign : 0.0f;
        s.query_scale[r] = usable ? scale : 1.0f;
        Isa::Element* elements = s.query + r * head_dim;
        alignas(64) int32_t integers[kMaxHeadDim];
        Isa::Ints sum = Isa::set(0);
        for (int64_t c = 0; c < query_width; c += Isa::kLanes) {
            Isa::Ints q =
                usable ? Isa::round(Isa::load(floats + c) * Isa::set(inverse)) : Isa::set(0);
            sum = Isa::add(sum, q);
            Isa::store(integers + c, q);
        }
        for (int64_t c = 0; c < head_dim; c++) elements[c] = Isa::Element(integers[c]);
        s.correction[r] = -Isa::kKeyOffset * Isa::reduce_add(sum);
        if (s.rows[r].bad) __builtin_memset(floats, 0, size_t(query_width) * sizeof(float));
    }

    // K is packed less its mean; the mean's own score comes back here.
    void find_row_terms(const Block& block, int64_t padded_rows) {
        float factor = scoring.factor * scoring.sign;
        for (int64_t first = 0; first < padded_rows; first += Isa::kReduced) {
            Isa::Floats sums[Isa::kReduced];
#pragma GCC unroll 8
            for (int r = 0; r < Isa::kReduced; r++) sums[r] = Isa::set(0.0f);
            for (int64_t c = 0; c < query_width; c += Isa::kLanes) {
                Isa::Floats mean = Isa::load(block.key_mean + c);
                const float* query = s.query_floats + first * query_width + c;
#pragma GCC unroll 8
                for (int r = 0; r < Isa::kReduced; r++)
                    sums[r] = Isa::fma(Isa::load(query + r * query_width), mean, sums[r]);
            }
            Isa::reduce_add_each(sums, s.row_term + first);
            for (int r = 0; r < Isa::kReduced; r++) s.row_term[first + r] *= factor;
        }
    }

    // --- one group of rows against one block

    // The tiles of a block that some row of a group sees.
    struct Tiles {
        int64_t count;
        int64_t index[kTilesPerBlock];
        bool masked[kTilesPerBlock];  // some row does not see all of it, or adds a bias to it
    };

    Tiles find_tiles(int64_t first, int64_t count, int64_t start, int64_t stop, bool check) {
        Interval some = s.seen_by_some[first / kGroupRows], all = s.seen_by_all[first / kGroupRows];
        Tiles tiles;
        tiles.count = 0;
        for (int64_t key = start; key < stop; key += kTileKeys) {
            if (some.first >= key + kTileKeys || some.last <= key) continue;
            bool whole = !check && all.first <= key && all.last >= key + kTileKeys;
            bool none = task.map != nullptr;
            for (int64_t r = first; task.map != nullptr && r < first + count; r++) {
                uint8_t state = s.rows[r].states[key / kTileKeys];
                none &= state == kMaskNone;
                whole &= state == kMaskPlain;
            }
            if (none) continue;
            tiles.index[tiles.count] = (key - start) / kTileKeys;
            tiles.masked[tiles.count++] = !whole;
        }
        return tiles;
    }

    // What hides keys of a tile from a group's rows, and what a float mask adds to their scores.
    template <int Rows>
    struct TileMask {
        uint64_t visible[Rows];
        const float* bias[Rows];  // kTileKeys of them
    };

    // How score_tile makes scores: of all keys; of those that each row sees; finished, with a bias.
    enum class Scores { kAll, kVisible, kBiased, kVisibleBiased };

    // Scores of one tile into s.scores at `column`; the largest of each row's lanes into `largest`.
    template <int Rows, Scores Kind>
    void score_tile(const Block& block, int64_t first, int64_t tile, int64_t column,
                    const TileMask<Rows>& mask, Isa::Floats* largest) {
        constexpr bool kHide = Kind == Scores::kVisible || Kind == Scores::kVisibleBiased;
        constexpr bool kBias = Kind == Scores::kBiased || Kind == Scores::kVisibleBiased;
        for (int64_t panel = 0; panel < kTileKeys; panel += kPanelWidth) {
            int64_t key = tile * kTileKeys + panel;
            const char* data =
                block.key_data + key * head_dim * (p.recipe == SAGE_CPU_FLOAT ? 4 : 1);
            float* scores = s.scores + column + panel;
            auto keep = [&](int r, Isa::Floats* x) SAGE_LAMBDA {
                if constexpr (kBias) {
                    Isa::Floats scale = Isa::set(s.query_scale[first + r]);
                    Isa::Floats term = Isa::set(s.row_term[first + r]);
#pragma GCC unroll 4
                    for (int v = 0; v < Isa::kVectors; v++)
                        x[v] = Isa::fma(x[v], scale, term) +
                               Isa::load(mask.bias[r] + panel + v * Isa::kLanes);
                }
                if constexpr (kHide) {
#pragma GCC unroll 4
                    for (int v = 0; v < Isa::kVectors; v++)
                        x[v] = Isa::select(uint32_t(mask.visible[r] >> (panel + v * Isa::kLanes)),
                                           x[v], Isa::set(-__builtin_inff()));
                }
                if constexpr (kBias) drop_nan(s.rows[first + r], x);
                Isa::Floats most = x[0];
#pragma GCC unroll 4
                for (int v = 0; v < Isa::kVectors; v++) {
                    Isa::store(scores + r * kBlockKeys + v * Isa::kLanes, x[v]);
                    if (v > 0) most = Isa::max(most, x[v]);
                }
                largest[r] = Isa::max(largest[r], most);
            };
            if (p.recipe == SAGE_CPU_FLOAT) {
                Operands<float> operands{s.query_floats + first * query_width,
                                         query_width,
                                         0,
                                         &data,
                                         1,
                                         head_dim,
                                         kPanelWidth * 4};
                multiply_floats<Rows, Isa::kVectors>(
                    operands, [&](int r, const Isa::Floats* sums) SAGE_LAMBDA {
                        Isa::Floats x[Isa::kVectors];
#pragma GCC unroll 4
                        for (int v = 0; v < Isa::kVectors; v++) x[v] = sums[v];
                        keep(r, x);
                    });
                continue;
            }
            Operands<Isa::Element> operands{
                s.query + first * head_dim, head_dim, 0, &data, 1, head_dim / 4, kPanelWidth * 4};
            const float* key_scale = block.key_scale + key;
            multiply<Rows, Isa::kVectors, true, 1>(
                operands, [&](int r) SAGE_LAMBDA { return s.correction[first + r]; },
                [&](int r, const Isa::Ints* sums) SAGE_LAMBDA {
                    Isa::Floats x[Isa::kVectors];
#pragma GCC unroll 4
                    for (int v = 0; v < Isa::kVectors; v++)
                        x[v] = Isa::to_float(sums[v]) * Isa::load(key_scale + v * Isa::kLanes);
                    keep(r, x);
                });
        }
    }

    // The row remembers that it yields NaN, and arithmetic goes on without.
    SAGE_INLINE static void drop_nan(Row& row, Isa::Floats* x) {
        uint32_t found = 0;
#pragma GCC unroll 4
        for (int v = 0; v < Isa::kVectors; v += 2)
            found |= Isa::unordered(x[v], x[min(v + 1, Isa::kVectors - 1)]);
        if (__builtin_expect(found == 0, 1)) return;
        row.bad = true;
#pragma GCC unroll 4
        for (int v = 0; v < Isa::kVectors; v++)
            x[v] = Isa::select(Isa::unordered(x[v], x[v]), Isa::set(0.0f), x[v]);
    }

    // The keys of a tile that a row sees through band and bool mask, a bit each.
    uint64_t visible_bits(const Row& row, int64_t key) const {
        uint64_t visible = interval_bits(row.keys, key);
        if (row.states == nullptr) return visible;
        uint8_t state = row.states[key / kTileKeys];
        if (state == kMaskNone) return 0;
        if (state != kMaskMixed || p.mask_dtype != SAGE_CPU_BOOL) return visible;
        int64_t count = min(kTileKeys, p.key_length - key);
        return visible & mask_bits(row.mask, p.mask.stride[3], key, count);
    }

    // What a float mask adds to a tile of a row's scores, in its place or in the buffer.
    const float* bias_of(const Row& row, int64_t key, float* buffer) const {
        if (row.states == nullptr || p.mask_dtype == SAGE_CPU_BOOL ||
            row.states[key / kTileKeys] != kMaskMixed)
            return kNoBias;
        return mask_bias(row.mask, p, key, min(kTileKeys, p.key_length - key), buffer);
    }

    // The hardware foresees neither where the next row of a mask lies nor that it is wanted.
    void prefetch_mask(int64_t r, int64_t key) const {
        if (task.map == nullptr || p.mask.stride[3] != 1) return;
        int64_t bytes = element_size(p.mask_dtype);
        for (int64_t last = min(r + kGroupRows, task.rows); r < last; r++)
            if (s.rows[r].states[key / kTileKeys] == kMaskMixed)
                for (int64_t b = 0; b < kTileKeys * bytes; b += 64)
                    __builtin_prefetch(s.rows[r].mask + key * bytes + b);
    }

    // Finish a row's scores of one tile where plain ones do not do: softcap, bias, and a look for
    // NaN. Returns the largest of each lane.
    Isa::Floats finish_scores(Row& row, int64_t r, int64_t key, float* scores, bool check) {
        alignas(64) float buffer[kTileKeys];
        uint64_t visible = visible_bits(row, key);
        const float* bias = bias_of(row, key, buffer);
        Isa::Floats largest = Isa::set(-__builtin_inff()), hidden = largest;
        Isa::Floats scale = Isa::set(s.query_scale[r]), term = Isa::set(s.row_term[r]);
        uint32_t nan_lanes = 0;
        for (int64_t i = 0; i < kTileKeys; i += Isa::kLanes) {
            Isa::Floats x = Isa::load(scores + i);
            if (check) x = Isa::fma(x, Isa::set(0.0f), x);  // NaN from infinity
            if (scoring.finished) {
                x = Isa::fma(x, scale, term);
                if (scoring.softcap != 0.0f)
                    x = tanh(x * Isa::set(1.0f / scoring.softcap)) * Isa::set(scoring.softcap);
                x = x + Isa::load(bias + i);
            }
            if (visible != ~uint64_t(0)) x = Isa::select(uint32_t(visible >> i), x, hidden);
            nan_lanes |= Isa::unordered(x, x);
            largest = Isa::max(largest, x);
            Isa::store(scores + i, x);
        }
        return nan_lanes == 0 ? largest : without_nan(row, scores);
    }

    // The row remembers that it yields NaN, and arithmetic goes on without.
    Isa::Floats without_nan(Row& row, float* scores) {
        row.bad = true;
        Isa::Floats largest = Isa::set(-__builtin_inff());
        for (int64_t i = 0; i < kTileKeys; i += Isa::kLanes) {
            Isa::Floats x = Isa::load(scores + i);
            x = Isa::select(Isa::unordered(x, x), Isa::set(0.0f), x);
            largest = Isa::max(largest, x);
            Isa::store(scores + i, x);
        }
        return largest;
    }

    // P of one row relative to its maximum in this block; returns sums of P, to be added up.
    Isa::Floats exponentials(int64_t r, int64_t row_in_group, int64_t count, float maximum) {
        float unit = scoring.finished ? kLog2E : s.query_scale[r];
        const float* scores = s.scores + row_in_group * kBlockKeys;
        if (p.recipe == SAGE_CPU_FLOAT) {
            float* weights = reinterpret_cast<float*>(s.weights) + row_in_group * kBlockKeys;
            Isa::Floats sum = Isa::set(0.0f);
            Exponential<6> exponential(maximum, unit, 1.0f);
            for (int64_t i = 0; i < count; i += Isa::kLanes) {
                Isa::Floats weight = exponential.exact(Isa::load(scores + i));
                Isa::store(weights + i, weight);
                sum = sum + weight;
            }
            return sum;
        }
        Isa::Element* weights = s.weights + row_in_group * kBlockKeys;
        constexpr int kVectorsPerTile = kTileKeys / Isa::kLanes;
        Isa::Ints low[kVectorsPerTile], low_sums = Isa::set(0);
        // Sums are exact as floats: all of a row's are below 2^24.
        if (p.recipe == SAGE_CPU_INT8_INT8) {
            Exponential<3> exponential(maximum, unit, 255.0f);
            for (int64_t i = 0; i < count; i += kTileKeys) {
#pragma GCC unroll 16
                for (int v = 0; v < kVectorsPerTile; v++)
                    low[v] = exponential.rounded(Isa::load(scores + i + v * Isa::kLanes));
                low_sums = Isa::store_tile(weights + i, low, low_sums);
            }
            return Isa::to_float(low_sums);
        }
        Exponential<4> exponential(maximum, unit, 65535.0f);
        Isa::Ints high[kVectorsPerTile], high_sums = Isa::set(0), byte = Isa::set(255);
        for (int64_t i = 0; i < count; i += kTileKeys) {
#pragma GCC unroll 16
            for (int v = 0; v < kVectorsPerTile; v++) {
                low[v] = exponential.rounded(Isa::load(scores + i + v * Isa::kLanes));
                high[v] = Isa::shift_right<8>(low[v]);
                low[v] = Isa::bit_and(low[v], byte);
            }
            high_sums = Isa::store_tile(weights + i, high, high_sums);
            low_sums = Isa::store_tile(weights + kGroupRows * kBlockKeys + i, low, low_sums);
        }
        return Isa::to_float(Isa::add(Isa::shift_left<8>(high_sums), low_sums));
    }

    void hide_weights(int64_t row_in_group, int64_t count) {
        if (p.recipe == SAGE_CPU_FLOAT) {
            float* weights = reinterpret_cast<float*>(s.weights) + row_in_group * kBlockKeys;
            __builtin_memset(weights, 0, size_t(count) * sizeof(float));
            return;
        }
        for (int plane = 0; plane < (p.recipe == SAGE_CPU_INT8_INT16 ? 2 : 1); plane++)
            __builtin_memset(s.weights + (plane * kGroupRows + row_in_group) * kBlockKeys, 0,
                             size_t(count) * sizeof(Isa::Element));
    }

    // What a row's numerator is multiplied with, and what its new products are.
    static constexpr int64_t kUpdateRows = kChannelMultiple;  // whole vectors; >= kGroupRows
    struct Update {
        alignas(64) float decay[kUpdateRows];    // of the numerator so far
        alignas(64) float product[kUpdateRows];  // of P V in integers
        alignas(64) float row_sum[kUpdateRows];  // of V's offset; before that: sums of P
        alignas(64) float maximum[kUpdateRows];  // of all blocks up to this one
    };

    // Factors that bring the sums so far, and the block's, to the larger of the two maxima.
    static void join_maxima(Update& update, const float* in_block, const float* before) {
        Isa::Floats nothing = Isa::set(-__builtin_inff());
        for (int64_t r = 0; r < kUpdateRows; r += Isa::kLanes) {
            Isa::Floats a = Isa::load(before + r), b = Isa::load(in_block + r);
            Isa::Floats larger = Isa::max(a, b);
            Isa::store(update.maximum + r, larger);
            // Neither has seen a key: both differences would be NaN.
            larger = Isa::select(Isa::equal(larger, nothing), Isa::set(0.0f), larger);
            Isa::Floats product = exp2(b - larger);
            Isa::store(update.decay + r, exp2(a - larger));
            Isa::store(update.product + r, product);
            Isa::store(update.row_sum + r, product * Isa::load(update.row_sum + r));
        }
    }

    template <int Rows, int Vectors, int Planes>
    void add_products(const Block& block, int64_t first, const Tiles& tiles, int64_t column,
                      const Update& update) {
        int64_t columns = min(Vectors * Isa::kLanes, p.value_head_dim - column);
        int64_t bytes = p.recipe == SAGE_CPU_FLOAT ? 4 : 1;
        const char* panels[kTilesPerBlock];
        for (int64_t t = 0; t < tiles.count; t++)
            panels[t] = block.value_data +
                        (column * block.keys + tiles.index[t] * kTileKeys * columns) * bytes;
        float* output = s.output + first * value_width + column;
        if constexpr (Planes == 0) {
            Operands<float> operands{reinterpret_cast<const float*>(s.weights),
                                     kBlockKeys,
                                     0,
                                     panels,
                                     tiles.count,
                                     kTileKeys,
                                     columns * 4};
            multiply_floats<Rows, Vectors>(
                operands, [&](int r, const Isa::Floats* sums) SAGE_LAMBDA {
                    Isa::Floats decay = Isa::set(update.decay[r]);
                    Isa::Floats product = Isa::set(update.product[r]);
#pragma GCC unroll 4
                    for (int v = 0; v < Vectors; v++) {
                        float* place = output + r * value_width + v * Isa::kLanes;
                        Isa::store(place, Isa::fma(Isa::load(place), decay, sums[v] * product));
                    }
                });
        } else {
            Operands<Isa::Element> operands{s.weights,  kBlockKeys,  kGroupRows * kBlockKeys,
                                            panels,     tiles.count, kTileKeys / 4,
                                            columns * 4};
            const float* scale = block.value_scale + column;
            const float* offset = block.value_offset + column;
            multiply<Rows, Vectors, false, Planes>(
                operands, [](int) SAGE_LAMBDA { return 0; },
                [&](int r, const Isa::Ints* sums) SAGE_LAMBDA {
                    Isa::Floats decay = Isa::set(update.decay[r]);
                    Isa::Floats product = Isa::set(update.product[r]);
                    Isa::Floats row_sum = Isa::set(update.row_sum[r]);
#pragma GCC unroll 4
                    for (int v = 0; v < Vectors; v++) {
                        float* place = output + r * value_width + v * Isa::kLanes;
                        Isa::Floats x = Isa::load(place) * decay;
                        x = Isa::fma(row_sum, Isa::load(offset + v * Isa::kLanes), x);
                        x = Isa::fma(Isa::to_float(sums[v]) * product,
                                     Isa::load(scale + v * Isa::kLanes), x);
                        Isa::store(place, x);
                    }
                });
        }
    }

    template <int Rows, int Planes>
    void add_all_products(const Block& block, int64_t first, const Tiles& tiles,
                          const Update& update) {
        int64_t column = 0;
        for (; column + kPanelWidth <= value_width; column += kPanelWidth)
            add_products<Rows, Isa::kVectors, Planes>(block, first, tiles, column, update);
        if constexpr (Isa::kVectors > 1) {
            static_assert(kPanelWidth <= 4 * kChannelMultiple);
            constexpr int kPerMultiple = int(kChannelMultiple / Isa::kLanes);
            switch ((value_width - column) / kChannelMultiple) {
                case 1:
                    add_products<Rows, min(Isa::kVectors, kPerMultiple), Planes>(
                        block, first, tiles, column, update);
                    break;
                case 2:
                    add_products<Rows, min(Isa::kVectors, 2 * kPerMultiple), Planes>(
                        block, first, tiles, column, update);
                    break;
                case 3:
                    add_products<Rows, min(Isa::kVectors, 3 * kPerMultiple), Planes>(
                        block, first, tiles, column, update);
                    break;
            }
        }
    }

    template <int Rows>
    void attend_group(const Block& block, int64_t first, int64_t start, int64_t stop) {
        bool check = block.header->nonfinite_keys != 0;
        Tiles tiles = find_tiles(first, Rows, start, stop, check);
        if (tiles.count == 0) return;

        static_assert(Rows <= Isa::kReduced && Isa::kReduced <= kUpdateRows);
        Isa::Floats largest[Isa::kReduced];
        for (int r = 0; r < Isa::kReduced; r++) largest[r] = Isa::set(-__builtin_inff());
        bool one_by_one = check || scoring.softcap != 0.0f;
        TileMask<Rows> mask;
        for (int64_t t = 0; t < tiles.count; t++) {
            int64_t tile = tiles.index[t], column = t * kTileKeys, key = start + tile * kTileKeys;
            prefetch_mask(first + kGroupRows, key);
            if (one_by_one) {
                Isa::Floats unfinished[Rows];
                for (int r = 0; r < Rows; r++) unfinished[r] = largest[r];
                score_tile<Rows, Scores::kAll>(block, first, tile, column, mask, unfinished);
                for (int r = 0; r < Rows; r++)
                    largest[r] = Isa::max(largest[r],
                                          finish_scores(s.rows[first + r], first + r, key,
                                                        s.scores + r * kBlockKeys + column, check));
                continue;
            }
            uint64_t seen_by_all = ~uint64_t(0);
            for (int r = 0; tiles.masked[t] && r < Rows; r++)
                seen_by_all &= mask.visible[r] = visible_bits(s.rows[first + r], key);
            bool hides = ~seen_by_all != 0;
            if (scoring.finished) {
                for (int r = 0; r < Rows; r++)
                    mask.bias[r] = bias_of(s.rows[first + r], key, s.bias + r * kTileKeys);
                if (hides)
                    score_tile<Rows, Scores::kVisibleBiased>(block, first, tile, column, mask,
                                                             largest);
                else
                    score_tile<Rows, Scores::kBiased>(block, first, tile, column, mask, largest);
            } else if (hides) {
                score_tile<Rows, Scores::kVisible>(block, first, tile, column, mask, largest);
            } else {
                score_tile<Rows, Scores::kAll>(block, first, tile, column, mask, largest);
            }
        }

        constexpr float kInfinity = __builtin_inff();
        int64_t count = tiles.count * kTileKeys;
        Isa::Floats sums[Isa::kReduced];
        alignas(64) float in_block[kUpdateRows] = {}, before[kUpdateRows] = {};
        Isa::reduce_max_each(largest, in_block);
        for (int r = 0; r < Isa::kReduced; r++) {
            sums[r] = Isa::set(0.0f);
            if (r >= Rows) continue;
            before[r] = s.maximum[first + r];
            float largest_score = in_block[r];
            if (largest_score == -kInfinity) {  // this row sees nothing here
                hide_weights(r, count);
                continue;
            }
            in_block[r] = scoring.finished
                              ? __builtin_fmaxf(largest_score * kLog2E, -kLargestFloat)
                              : largest_score * s.query_scale[first + r] + s.row_term[first + r];
            if (in_block[r] - in_block[r] != 0.0f) {  // infinite or NaN: so is the row
                s.rows[first + r].bad = true;
                in_block[r] = 0.0f;
                hide_weights(r, count);
                continue;
            }
            sums[r] = exponentials(first + r, r, count, largest_score);
        }
        Update update{};
        Isa::reduce_add_each(sums, update.row_sum);
        join_maxima(update, in_block, before);
        for (int r = 0; r < Rows; r++) {
            s.total[first + r] = s.total[first + r] * update.decay[r] + update.row_sum[r];
            s.maximum[first + r] = update.maximum[r];
        }

        switch (p.recipe) {
            case SAGE_CPU_INT8_INT8:
                return add_all_products<Rows, 1>(block, first, tiles, update);
            case SAGE_CPU_INT8_INT16:
                return add_all_products<Rows, 2>(block, first, tiles, update);
            default:
                return add_all_products<Rows, 0>(block, first, tiles, update);
        }
    }

    // --- the end of a row

    void write_row(int64_t r) {
        const Row& row = s.rows[r];
        float* output = s.output + r * value_width;
        bool dead = s.maximum[r] == -__builtin_inff();  // whatever the query holds
        bool bad = row.bad && !dead;
        float share = dead ? 0.0f : 1.0f / s.total[r];  // of each product in the output
        float lse = -__builtin_inff();
        if (p.lse != nullptr || p.sinks != nullptr) {
            float factor_of_p = p.recipe == SAGE_CPU_INT8_INT8    ? 255.0f
                                : p.recipe == SAGE_CPU_INT8_INT16 ? 65535.0f
                                                                  : 1.0f;
            if (!dead) lse = s.maximum[r] + __builtin_log2f(s.total[r] / factor_of_p);
            // A sink in the running maximum would cost P its range; it joins here.
            if (p.sinks != nullptr) {
                float sink = p.sinks[row.head];
                bad |= !(sink < __builtin_inff());
                if (sink > -__builtin_inff())  // finite stays finite
                    sink = __builtin_fmaxf(__builtin_fminf(sink * kLog2E, kLargestFloat),
                                           -kLargestFloat);
                float larger = lse > sink ? lse : sink;
                if (larger > -__builtin_inff() && !bad) {
                    float keys = __builtin_exp2f(lse - larger);
                    float all = keys + __builtin_exp2f(sink - larger);
                    share *= keys / all;
                    lse = larger + __builtin_log2f(all);
                }
            }
            if (p.lse != nullptr)
                p.lse[(task.batch * p.heads + row.head) * p.query_length + row.query] =
                    bad ? __builtin_nanf("") : lse * kLn2;
        }
        bool empty = dead && lse == -__builtin_inff();  // not even a sink
        bool nan = bad || (empty && p.dead_rows == SAGE_CPU_DEAD_NAN);
        if (p.key_length == 0) nan = false;
        if (nan || dead) {
            float fill = nan ? __builtin_nanf("") : 0.0f;
            for (int64_t c = 0; c < value_width; c++) output[c] = fill;
        } else {
            for (int64_t c = 0; c < value_width; c++) output[c] *= share;
        }
        store_row(address(p.output, p.dtype, task.batch, row.head, row.query), p.dtype,
                  p.output.stride[3], p.value_head_dim, output);
    }

    void run() {
        read_queries();
        int64_t padded_rows = round_up(task.rows, kGroupRows);
        Interval needed{p.key_length, 0};
        for (int64_t g = 0; g < padded_rows / kGroupRows; g++) {
            needed.first = min(needed.first, s.seen_by_some[g].first);
            needed.last = max(needed.last, s.seen_by_some[g].last);
        }
        for (int64_t index = needed.first / kBlockKeys; index * kBlockKeys < needed.last; index++) {
            int64_t start = index * kBlockKeys;
            int64_t stop = min(start + kBlockKeys, round_up(p.key_length, kTileKeys));
            Block block = task.layout->block(const_cast<char*>(task.head), index);
            if (p.recipe != SAGE_CPU_FLOAT) find_row_terms(block, padded_rows);
            int64_t r = 0;
            for (; r + kGroupRows <= task.rows; r += kGroupRows)
                attend_group<kGroupRows>(block, r, start, stop);
            switch (padded_rows - task.rows) {
                case 0:
                    break;
                case 5:
                    attend_group<1>(block, r, start, stop);
                    break;
                case 4:
                    attend_group<2>(block, r, start, stop);
                    break;
                case 3:
                case 2:
                    attend_group<4>(block, r, start, stop);
                    break;
                default:
                    attend_group<kGroupRows>(block, r, start, stop);
                    break;
            }
        }
        for (int64_t r = 0; r < task.rows; r++) write_row(r);
    }
};

inline int64_t attend_scratch_bytes(const sage_cpu_problem& p) {
    Carver carver{nullptr};
    Scratch::carve(carver, p);
    return carver.used;
}

inline void attend(const AttendTask& task) {
    const sage_cpu_problem& p = *task.problem;
    Carver carver{task.scratch};
    Attention attention{task,
                        p,
                        scoring_of(p),
                        Scratch::carve(carver, p),
                        p.head_dim,
                        round_up(p.head_dim, kChannelMultiple),
                        round_up(p.value_head_dim, kChannelMultiple)};
    attention.run();
}

}  // namespace
}  // namespace sage_cpu
