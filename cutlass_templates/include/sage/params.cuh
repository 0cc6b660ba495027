// The parameters of the kernels, each passed as one struct by value;
// sage_compiler.kernels.cuda.params packs them. Pointers and 64-bit integers come first, then
// floats, so that there is no padding.
//
// Shapes: B batch, H query heads, Hkv key/value heads, G = H / Hkv, Lq and Lk lengths, D head_dim.
// M query blocks of kQueryBlock tokens and N key blocks of kKeyBlock tokens cover the lengths; what
// the quantizers write is whole blocks, with zeros beyond the end.
#pragma once

#if defined(__CUDACC_RTC__)
#include <cuda/std/cstdint>  // NVRTC has no standard library of its own
#else
#include <cstdint>
#endif

#include <sage/arch/tensor_map.cuh>

namespace sage {

// Tokens of a block, see "Granularity" of docs/numerics.md: 32 tokens of Q make kQueryGroups = 8
// groups, which are a token's index modulo 8, and kKeyBlock tokens of K make 4.
constexpr int kQueryBlock = 128;
constexpr int kQueryWarp = 32;
constexpr int kQueryGroups = 8;
constexpr int kKeyBlock = 64;
constexpr int kKeyGroups = 4;

// The channels that quantized operands have for a head_dim: rows are a power of two in bytes.
constexpr int padded_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// A tensor (B, heads, L, channels) of the input type as the caller has it: strides in elements.
// What the kernels make of it has more channels, D, with zeros: see padded_dim in spec.py.
struct Strided {
    void const* data;
    int64_t batch_stride, head_stride, token_stride, channel_stride;
    int64_t channels;
};

// What a mask shows of the tokens of each head, as bits of a byte: kSeen by some query, and whether
// it kCounts in statistics, see "What counts in statistics" of docs/numerics.md. Strides in bytes;
// a null pointer: all tokens of a range.
constexpr uint8_t kSeen = 1;
constexpr uint8_t kCounts = 2;
struct Flags {
    uint8_t const* data;
    int64_t batch_stride, head_stride, token_stride;
};

// An explicit mask of scores: strides in elements, zero where it broadcasts.
enum class MaskKind : int64_t { kBool, kHalf, kBfloat16, kFloat };
struct Mask {
    void const* data;
    int64_t batch_stride, head_stride, query_stride, key_stride;
    MaskKind kind;
};

// The cosines or the sines of a rotary embedding. A pair has an entry for each of its two channels,
// the first and the second; strides in elements, zero where both have the same, or it broadcasts.
struct RotaryTable {
    void const* data;
    int64_t batch_stride, head_stride, token_stride, pair_stride, side_stride;
};
struct Rotary {
    RotaryTable cosine, sine;
    int64_t channels;  // how many are rotated, the first ones; even
    MaskKind kind;     // of both tables, a float type
};

// The parameters of a kernel that rotates what it quantizes (of StatisticsParams: K).
template <class Params>
struct WithRotary : Params {
    Rotary rotary;
};

// What a mask is in a tile of kQueryBlock queries and kKeyBlock keys.
constexpr uint8_t kHidesAll = 0;
constexpr uint8_t kShowsAll = 1;  // and adds nothing
constexpr uint8_t kMixed = 2;

// One block per (K or V, chunk of tokens, head): sums of K and largest magnitudes of V.
struct StatisticsParams {
    Strided key, value;
    float* key_sums;             // (B, Hkv, chunks, D)
    uint32_t* value_amax;        // (B, Hkv, chunks, D): bits of |x|, so that NaN is the largest
    Flags flags;                 // of keys
    int64_t heads;               // Hkv
    int64_t first_key, end_key;  // keys [first_key, end_key) are seen by some query
    int64_t chunks, chunk_tokens;
    int64_t key_tasks;  // B * Hkv * chunks; blocks from there on do V
};

// One block per (query block, head).
struct QueryParams {
    Strided query;
    float const* key_sums;  // as above; null where row_term is
    void* codes;            // (B, H, M * kQueryBlock, D): INT8, or two INT4 in a byte
    float* scales;          // (B, H, M * kQueryBlock / 4), times score_factor
    float* means;           // (B, H, M, D), times score_factor; null without Q smoothing
    float* row_term;        // (B, H, Lq): scale * q . mean K, natural units; may be null
    float const* counts;    // as of KeyParams
    uint32_t* taken;        // as of AttendParams, which becomes 0; may be null
    Flags flags;            // of queries
    int64_t heads, group;   // H, G
    int64_t query_length, query_blocks;
    int64_t first_live, end_live;  // queries [first_live, end_live) see a key
    int64_t first_key, end_key, chunks;
    float score_factor;  // |scale| * log2(e); without the log2(e) where there is a softcap
    float scale;         // negative: Q is negated
};

// One block per (key block, head).
struct KeyParams {
    Strided key;
    float const* key_sums;
    float const* means;   // (B, Hkv, G * M, D), or null without Q smoothing
    char* codes;          // of the first tile, (kKeyBlock, D); a tile is tile_bytes after the last
    char* scales;         // of the first tile, (kKeyGroups)
    float* delta;         // (B, Hkv, G * M, N * kKeyBlock): means . K'; null without Q smoothing
    float const* counts;  // (B, Hkv): how many keys count; null: all of the range
    Flags flags;          // of keys
    int64_t tile_bytes;   // tiles are in order (B, Hkv, N)
    int64_t heads;        // Hkv
    int64_t key_blocks, mean_rows;
    int64_t first_key, end_key, chunks;
};

// One block per (key block, head).
struct ValueParams {
    Strided value;
    uint32_t const* value_amax;
    char* codes;    // of the first tile, V transposed, (D, kKeyBlock)
    float* scales;  // (B, Hkv, D)
    Flags flags;    // of keys
    int64_t tile_bytes;
    int64_t heads;  // Hkv
    int64_t key_blocks;
    int64_t first_key, end_key, chunks;
};

// The order of all of the above in one launch, one block per task: see quantize.cuh.
struct ScheduleParams {
    uint32_t* counters;   // (1 + B * Hkv, kCounters), all zero: the tickets, and those of heads
    float* key_totals;    // (B, Hkv, D): what the key_sums of all chunks are together
    float* value_totals;  // (B, Hkv, D): the largest value_amax of all chunks
    int64_t heads;        // B * Hkv
    int64_t ahead;        // tasks of statistics before the first conversion, beside its own
};
constexpr int kCounters = 8;  // of a head: a sector of the cache

// All of them; those of tensors that are rotated are WithRotary. The sums and magnitudes that Q, K
// and V take are the totals, one chunk of each head.
template <class OfStatistics = StatisticsParams, class OfQuery = QueryParams,
          class OfKey = KeyParams>
struct QuantizeParams {
    OfStatistics statistics;
    OfQuery query;
    OfKey key;
    ValueParams value;
    ScheduleParams schedule;
};

// One block per (query block, head); with packed heads one per (tile of rows, key/value head);
// where keys are split, one per part of these. A persistent grid has fewer blocks, which take these
// as tasks.
struct AttendParams {
    void const* query_codes;
    float const* query_scales;
    void const* key_value_tiles;  // (B, Hkv, N) of KeyValueTile
    float const* value_scales;    // (B, Hkv, D); null where tiles have their own
    float const* delta;           // (B, H, M, N * kKeyBlock), or null
    float const* row_term;        // (B, H, Lq); null where neither LSE, softcap nor sinks need it
    float const* sinks;   // (H): one more logit of each head, in the denominator; may be null
    void* output;         // (B, H, Lq, channels) of the output type, channels contiguous
    float* lse;           // (B, H, Lq) by its stride, natural logarithm; may be null
    Mask mask;            // of a kernel that has one
    Flags tiles;          // what it is in each: a token is a query block, and has N bytes
    Flags live;           // queries that see a key through it
    float* part_outputs;  // (B, H, Lq, parts, D of V): sums of P V; of a kernel that splits keys
    float* part_sums;     // (B, H, Lq, parts, 2): maximum in units of log 2, sum of P; likewise
    uint32_t* taken;      // tasks that blocks of a persistent grid took besides their first; 0
    int64_t output_batch_stride, output_head_stride, output_token_stride;
    int64_t lse_head_stride;  // Lq, or more
    int64_t heads, group;     // H, G
    int64_t query_length, key_length;
    int64_t query_blocks, key_blocks;
    int64_t row_blocks;     // tiles that G * Lq rows make, of a kernel that packs heads
    int64_t parts;          // of the keys, of a kernel that splits them
    int64_t lower, upper;   // query i sees the keys i + lower <= j <= i + upper
    int64_t channels;       // of V and the output
    int64_t head_tiles;     // tiles from one head to the next: N, or those of a cache
    int64_t tasks;          // what a grid of one block for each would have; of a persistent one
    int64_t heads_at_once;  // which such a grid works on, so that their keys and values stay cached
    float softcap;
    float dead_value;  // the output of a row that sees no key: 0 or NaN
};

// Of an attention kernel for Hopper that can copy tiles of its mask to shared memory.
struct MaskedAttendParams : AttendParams {
    // Rows of a box: kQueryBlock, or 1 of a mask that broadcasts over queries; 0: there is no map,
    // and the mask is read where it lies.
    int64_t mask_rows;
    // Of (B or 1, H or 1, Lq or 1, Lk); a box has the keys of one head that 128 bytes hold, but not
    // more than kKeyBlock, and the swizzle of that width.
    TensorMap mask_map;
};

// The kernels of a cache (sage.PackedKV): key/value tokens in packed tiles that grows. K is
// smoothed by the mean of its first kMeanTokens tokens, so that what is packed stays right whatever
// comes; until they are there all is packed anew with each token. Tokens that will be packed again
// are kept as they came, in staged tiles (B, Hkv, places, kKeyBlock, D). With fewer than
// kMeanTokens tokens the place of a tile is its index; else only the last tile, if it is not full,
// is kept, where the host says: not where this launch reads, since what a launch stores it does not
// load.
constexpr int kMeanTokens = 256;

struct Staged {
    void* data;            // of the input type
    int64_t place_before;  // of the last tile before the new tokens, if there are kMeanTokens
    int64_t place_after;   // of the last tile with them, likewise
    int64_t places;        // of one head
};

// One block per head.
struct KeyMeanParams {
    Strided key;  // the new tokens
    Staged staged;
    float* mean;          // (B, Hkv, D)
    int64_t heads;        // Hkv
    int64_t length, end;  // tokens before the new ones, and with them
};

// One block per (K or V, tile that changes, head).
struct AppendParams {
    Strided key, value;  // the new tokens
    Staged staged_key, staged_value;
    float const* key_mean;      // (B, Hkv, D)
    char* tiles;                // (B, Hkv, head_tiles) of KeyValueTile with scales of V
    int64_t heads, head_tiles;  // Hkv; tiles that a head has room for
    int64_t length, end;        // tokens before the new ones, and with them
    int64_t first_tile, changed_tiles;
    int64_t key_tasks;  // B * Hkv * changed_tiles; blocks from there on do V
};

// One block per (key block, head).
struct DeltaParams {
    float const* means;  // (B, Hkv, G * M, D), times score_factor
    char const* codes;   // of the first tile, INT4
    char const* scales;  // of the first tile
    float* delta;        // (B, Hkv, G * M, N * kKeyBlock): means . K'
    int64_t tile_bytes;  // tiles are in order (B, Hkv, head_tiles)
    int64_t head_tiles, key_blocks, mean_rows;
};

// One block per Merge::kRows rows: what the parts of the keys made of each, joined.
struct MergeParams {
    float const* part_outputs;  // as of AttendParams; a part whose sum of P is 0 has none
    float const* part_sums;
    float const* value_scales;  // (B, Hkv, D of V); null where sums have them already
    float const* row_term;      // (B, H, Lq); null where neither LSE nor sinks need it, and where
                                // scores have it already, under a softcap
    float const* sinks;
    void* output;
    float* lse;
    int64_t output_batch_stride, output_head_stride, output_token_stride;
    int64_t heads, group;
    int64_t query_length;
    int64_t rows;  // B * H * Lq
    int64_t parts;
    int64_t channels;
    int64_t dead_is_nan;       // whether a row that sees no key is NaN; else it is 0
    float log2_weight_factor;  // of P, see numeric.cuh
    float limit;               // of |V| as it is summed up
};

// The sequences of a packed batch, which lie one after another along the lengths of a batch of 1:
// what a kernel of varlen.cuh takes besides the struct of its own, where it ignores what depends on
// lengths. Offsets are cumulative lengths, (count + 1) of 4 or 8 bytes each.
struct Sequences {
    void const *query_offsets, *key_offsets;
    int64_t query_offset_bytes, key_offset_bytes;
    int64_t count;
    int64_t queries, keys;    // of the whole batch
    int64_t group;            // G
    int64_t most_key_blocks;  // of one sequence
    int64_t left, right;      // keys that a query sees on both sides of the diagonal
    int64_t bottom_right;     // the last query and the last key are on it; else the first ones
};

// The kernels below are for hosts without torch: what a mask shows, and sinks as floats. A mask has
// MB batches, 1 or B, and MH heads, 1 or H; what its key/value heads are, MHkv, is 1 or Hkv.

// One block per (query block, head of the mask).
struct MaskRowsParams {
    Mask mask;
    uint8_t* tiles;       // (MB, MH, M, N): kHidesAll, kShowsAll or kMixed
    uint8_t* live;        // (MB, MH, Lq): whether a query sees a key
    uint8_t* discerning;  // (MB, MH, Lq): whether it sees one whose bias is not negligible
    int64_t heads;        // MH
    int64_t query_length, key_length;
    int64_t query_blocks, key_blocks;
    int64_t lower, upper;  // query i sees the keys i + lower <= j <= i + upper
};

// One block per (key block, key/value head of the mask).
struct MaskKeysParams {
    Mask mask;
    uint8_t const* discerning;
    uint8_t* keys;         // (MB, MHkv, Lk): kSeen and kCounts
    int64_t heads, group;  // MHkv, and heads of the mask for each: 1 or G
    int64_t query_length, key_length;
    int64_t key_blocks;
    int64_t lower, upper;
};

// One block per key/value head of the mask.
struct MaskCountsParams {
    uint8_t const* keys;  // as above
    float* counts;        // (B, Hkv): how many keys count
    int64_t heads;        // MHkv
    int64_t key_length;
    int64_t batch_repeats, head_repeats;  // B / MB, Hkv / MHkv
};

// One thread per element of the output: element i is sinks[i / repeats % heads].
struct SinksParams {
    void const* sinks;  // (H) of a float type; null: none, which is -infinity each
    float* out;
    MaskKind kind;
    int64_t count, heads, repeats;
};

}  // namespace sage
