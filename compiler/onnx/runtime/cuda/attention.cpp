#include "attention.hpp"

#include <math.h>

#include <initializer_list>

#include "mask_map.hpp"

namespace sage_cuda {
namespace {

// Of kernel.py, which has the reasons; a test holds these against it.
constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kFar = 1 << 30;  // beyond any length, and twice of it within 32 bits
constexpr float kLeastSoftcap = 1e-30f;
constexpr double kGreatestSoftcap = 1e30;
constexpr int64_t kMostChunks = 32, kLeastChunk = 256;
constexpr int64_t kAheadBytes = 16 << 10;
constexpr int64_t kAlignment = 256;
constexpr int64_t kCachedBytes = 16 << 20;
constexpr int64_t kScalesOfBlock = sage::kQueryBlock / 4;  // of queries

// What serves a recipe, the nearest first: nothing that is less accurate.
struct Chain {
    Recipe recipes[kRecipes];
    int count;
};

Chain chain_of(Recipe recipe) {
    switch (recipe) {
        case Recipe::kInt4Fp8:
            return {{Recipe::kInt4Fp8, Recipe::kInt4Fp16, Recipe::kInt8Fp8, Recipe::kInt8Fp16}, 4};
        case Recipe::kInt4Fp16:
            return {{Recipe::kInt4Fp16, Recipe::kInt8Fp16}, 2};
        case Recipe::kInt8Fp8:
            return {{Recipe::kInt8Fp8, Recipe::kInt8Fp16}, 2};
        case Recipe::kInt8Fp16:
            break;
    }
    return {{Recipe::kInt8Fp16}, 1};
}

Recipe wanted(const Device& device, bool automatic, Recipe recipe) {
    return automatic ? device.arch().recipes[0] : recipe;
}

int64_t blocks_of(int64_t length, int64_t block) { return (length + block - 1) / block; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t aligned(int64_t bytes) { return blocks_of(bytes, kAlignment) * kAlignment; }

bool has_softcap(const Attention& a) {
    return a.softcap > 0.0f && double(a.softcap) < kGreatestSoftcap;
}

// A dense tensor (B, heads, length, channels).
sage::Strided strided(const void* data, int64_t heads, int64_t length, int64_t channels) {
    return {data, heads * length * channels, length * channels, channels, 1, channels};
}

template <class T>
T* as(char* part) {
    return reinterpret_cast<T*>(part);
}

bool refuse(const Device& device, const Attention& a, Recipe recipe, Error& error) {
    return error.set(
        "no %s kernel for %s, %s, head_dim %lld, of V %lld%s%s%s, in the kernel pack %s; build "
        "kernels with `sagec kernels build --standalone --arch %s`, or run with "
        "CPUExecutionProvider only",
        name_of(recipe), device.arch().name, name_of(a.dtype), static_cast<long long>(a.head_dim),
        static_cast<long long>(a.value_head_dim),
        a.mask.data != nullptr ? ", with an attn_mask" : "",
        a.left != kUnbounded ? ", with a window" : "", has_softcap(a) ? ", with a softcap" : "",
        device.pack().folder(), device.arch().name);
}

}  // namespace

bool check_recipe(const Device& device, Dtype dtype, bool automatic, Recipe recipe, Error& error) {
    const Recipe first = wanted(device, automatic, recipe);
    const Chain chain = chain_of(first);
    for (int i = 0; i < chain.count; i++)
        if (device.pack().find_any(device.arch(), dtype, chain.recipes[i]) != nullptr) return true;
    return error.set(
        "no %s kernel for %s and %s in the kernel pack %s; build kernels with `sagec kernels build "
        "--standalone --arch %s`, or run with CPUExecutionProvider only",
        name_of(first), device.arch().name, name_of(dtype), device.pack().folder(),
        device.arch().name);
}

bool Work::plan(const Device& device, const Attention& a, Error& error) {
    *this = {};
    if (most(a.query_length, a.key_length) >= kFar)
        return error.set(
            "%lld queries and %lld keys; the CUDA kernels take fewer than %lld of each: split the "
            "sequence",
            static_cast<long long>(a.query_length), static_cast<long long>(a.key_length),
            static_cast<long long>(kFar));
    const Arch& arch = device.arch();
    const bool has_sinks = a.sinks != nullptr;
    if (a.batch == 0 || a.heads == 0 || a.query_length == 0 || a.key_length == 0) {
        if (a.lse != nullptr && arch.sinks == kAbsent)
            return error.set(
                "the kernel pack %s has no kernel for the LSE of no keys; build it again with "
                "`sagec kernels build --standalone`",
                device.pack().folder());
        const int64_t rows = a.batch * a.heads * a.query_length;
        if (a.lse != nullptr && rows > INT32_MAX)  // the kernel counts them in 32 bits
            return error.set("%lld queries that see nothing; at most %d: split the batch",
                             static_cast<long long>(rows), INT32_MAX);
        return true;
    }
    const Recipe first = wanted(device, a.automatic, a.recipe);
    const Chain chain = chain_of(first);
    for (int i = 0; i < chain.count && plan_ == nullptr; i++)
        plan_ = device.pack().find(
            arch, {a.dtype, chain.recipes[i], a.head_dim, a.value_head_dim, a.left != kUnbounded,
                   a.mask.data != nullptr, has_softcap(a)});
    if (plan_ == nullptr) return refuse(device, a, first, error);
    converts_sinks_ = has_sinks && a.sinks_kind != sage::MaskKind::kFloat;
    const bool lacks_mask =
        a.mask.data != nullptr &&
        (arch.mask_rows == kAbsent || arch.mask_keys == kAbsent || arch.mask_counts == kAbsent);
    if (lacks_mask || (converts_sinks_ && arch.sinks == kAbsent))
        return error.set(
            "the kernel pack %s has no kernels for %s; build it again with `sagec kernels build "
            "--standalone`",
            device.pack().folder(), lacks_mask ? "an attn_mask" : "16-bit sinks");
    see(a);
    return lay_out(a, error);
}

// What the band shows, and how the work is cut.
void Work::see(const Attention& a) {
    group_ = a.heads / a.kv_heads;
    lower_ = a.left == kUnbounded ? -kFar : most(-kFar, a.diagonal - a.left);
    upper_ = a.right == kUnbounded ? kFar : least(kFar, a.diagonal + a.right);
    first_key_ = least(a.key_length, most(0, lower_));
    end_key_ = most(first_key_, least(a.key_length, a.query_length + upper_));
    first_live_ = least(a.query_length, most(0, -upper_));
    end_live_ = most(first_live_, least(a.query_length, a.key_length - lower_));
    query_blocks_ = blocks_of(a.query_length, sage::kQueryBlock);
    key_blocks_ = blocks_of(a.key_length, sage::kKeyBlock);
    chunk_tokens_ = most(kLeastChunk, blocks_of(a.key_length, kMostChunks));
    chunks_ = blocks_of(a.key_length, chunk_tokens_);
    mask_batches_ = a.mask.batch_stride == 0 ? 1 : a.batch;
    mask_heads_ = a.mask.head_stride == 0 ? 1 : a.heads;
    mask_kv_heads_ = a.mask.head_stride == 0 ? 1 : a.kv_heads;
}

int64_t Work::quantizing_blocks(const Attention& a) const {
    const int64_t of_statistics = chunks_ * plan_->slices * (plan_->scales_value != 0 ? 2 : 1);
    const int64_t queries = a.heads * query_blocks_ * plan_->query_tasks;
    return a.batch * (queries + a.kv_heads * (of_statistics + 2 * key_blocks_));
}

// Of Sizes.ahead.
int64_t Work::tasks_ahead(const Attention& a, int64_t multiprocessors) const {
    const bool of_key = plan_->smooths_query == 0 || sizes_[kRowTerm] == 0;
    const int64_t units = a.batch * a.kv_heads * (of_key + (plan_->scales_value != 0));
    const int64_t element = a.dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t channels = most(plan_->padded, plan_->padded_value) / plan_->slices;
    const int64_t of_task = chunk_tokens_ * channels * element;
    return least(units * chunks_ * plan_->slices,
                 blocks_of(multiprocessors * kAheadBytes, of_task));
}

bool Work::lay_out(const Attention& a, Error& error) {
    const int64_t rows = a.batch * a.heads * query_blocks_, heads = a.batch * a.kv_heads;
    for (const int64_t blocks : {rows, quantizing_blocks(a)})
        if (blocks > INT32_MAX)
            return error.set("%lld blocks; a launch has at most %d: split the batch",
                             static_cast<long long>(blocks), INT32_MAX);
    const bool smooths = plan_->smooths_query != 0;
    const bool needs_row_term = a.lse != nullptr || a.sinks != nullptr || plan_->softcap != 0;
    sizes_[kKeySums] = heads * chunks_ * plan_->padded * 4;
    sizes_[kValueAmax] = heads * chunks_ * plan_->padded_value * 4;
    sizes_[kQueryCodes] = rows * plan_->query_tile_bytes;
    sizes_[kQueryScales] = rows * kScalesOfBlock * 4;
    sizes_[kMeans] = smooths ? rows * plan_->padded * 4 : 0;
    sizes_[kRowTerm] = needs_row_term ? a.batch * a.heads * a.query_length * 4 : 0;
    sizes_[kTiles] = heads * key_blocks_ * plan_->tile_bytes;
    sizes_[kValueScales] = heads * plan_->padded_value * 4;
    sizes_[kCounters] = (1 + heads) * sage::kCounters * 4;
    sizes_[kKeyTotals] = heads * plan_->padded * 4;
    sizes_[kValueTotals] = heads * plan_->padded_value * 4;
    sizes_[kTaken] = plan_->persistent != 0 ? 4 : 0;
    sizes_[kDelta] = smooths ? rows * key_blocks_ * sage::kKeyBlock * 4 : 0;
    if (a.mask.data != nullptr) {
        const int64_t heads_of_mask = mask_batches_ * mask_heads_;
        sizes_[kMaskTiles] = heads_of_mask * query_blocks_ * key_blocks_;
        sizes_[kMaskLive] = sizes_[kMaskDiscerning] = heads_of_mask * a.query_length;
        sizes_[kMaskKeys] = mask_batches_ * mask_kv_heads_ * a.key_length;
        sizes_[kMaskCounts] = heads * 4;
    }
    sizes_[kSinks] = converts_sinks_ ? a.heads * 4 : 0;
    scratch_bytes_ = kAlignment;  // the memory may begin anywhere
    for (const int64_t size : sizes_) scratch_bytes_ += aligned(size);
    return true;
}

Work::Flags Work::flags(const Attention& a, char* const (&parts)[kParts]) const {
    if (a.mask.data == nullptr) return {};
    // (MB, heads, tokens), of bytes.
    const auto of = [&](Part part, int64_t heads, int64_t tokens, int64_t bytes) -> sage::Flags {
        return {as<const uint8_t>(parts[part]), mask_batches_ == 1 ? 0 : heads * tokens * bytes,
                heads == 1 ? 0 : tokens * bytes, bytes};
    };
    return {of(kMaskTiles, mask_heads_, query_blocks_, key_blocks_),
            of(kMaskLive, mask_heads_, a.query_length, 1),
            of(kMaskKeys, mask_kv_heads_, a.key_length, 1), as<float>(parts[kMaskCounts])};
}

bool Work::launch(Device& device, const Attention& a, void* scratch, CUstream stream,
                  Error& error) const {
    if (a.batch == 0 || a.heads == 0 || a.query_length == 0) return true;  // there is no output
    const Current current(device.driver(), device.context(), error);
    if (!current.ok()) return false;
    if (plan_ == nullptr) return fill(device, a, stream, error);
    if (!load(device, a, stream, error)) return false;

    char* parts[kParts];
    uintptr_t address =
        (reinterpret_cast<uintptr_t>(scratch) + kAlignment - 1) / kAlignment * kAlignment;
    for (int part = 0; part < kParts; part++) {
        parts[part] = sizes_[part] == 0 ? nullptr : reinterpret_cast<char*>(address);
        address += uintptr_t(aligned(sizes_[part]));
    }
    if (a.mask.data != nullptr && !look_through_mask(device, a, parts, stream, error)) return false;
    const float* sinks = static_cast<const float*>(a.sinks);
    if (converts_sinks_) {
        float* const converted = as<float>(parts[kSinks]);
        if (!spread_sinks(device, a, converted, a.heads, 1, stream, error)) return false;
        sinks = converted;
    }

    const Flags mask = flags(a, parts);
    const sage::Strided query = strided(a.query, a.heads, a.query_length, a.head_dim);
    const sage::Strided key = strided(a.key, a.kv_heads, a.key_length, a.head_dim);
    const sage::Strided value = strided(a.value, a.kv_heads, a.key_length, a.value_head_dim);
    const int64_t key_tasks = a.batch * a.kv_heads * chunks_;
    const int64_t rows = a.batch * a.heads * query_blocks_;
    const double to_log2 = plan_->softcap != 0 ? 1.0 : kLog2E;
    const float dead_value = a.dead_rows_are_nan ? NAN : 0.0f;
    float* const key_sums = as<float>(parts[kKeySums]);
    uint32_t* const value_amax = as<uint32_t>(parts[kValueAmax]);
    uint32_t* const counters = as<uint32_t>(parts[kCounters]);
    float* const key_totals = as<float>(parts[kKeyTotals]);
    float* const value_totals = as<float>(parts[kValueTotals]);
    float* const query_scales = as<float>(parts[kQueryScales]);
    float* const means = as<float>(parts[kMeans]);
    float* const row_term = as<float>(parts[kRowTerm]);
    float* const value_scales = as<float>(parts[kValueScales]);
    float* const delta = as<float>(parts[kDelta]);
    uint32_t* const taken = as<uint32_t>(parts[kTaken]);
    char* const tiles = parts[kTiles];

    const sage::StatisticsParams statistics = {key,       value,         key_sums,   value_amax,
                                               mask.keys, a.kv_heads,    first_key_, end_key_,
                                               chunks_,   chunk_tokens_, key_tasks};
    const sage::QueryParams quantize_query = {query,
                                              key_totals,
                                              parts[kQueryCodes],
                                              query_scales,
                                              means,
                                              row_term,
                                              mask.counts,
                                              taken,
                                              mask.live,
                                              a.heads,
                                              group_,
                                              a.query_length,
                                              query_blocks_,
                                              first_live_,
                                              end_live_,
                                              first_key_,
                                              end_key_,
                                              1,
                                              float(fabs(double(a.scale)) * to_log2),
                                              a.scale};
    const sage::KeyParams quantize_key = {key,
                                          key_totals,
                                          means,
                                          tiles,
                                          tiles + plan_->scales_offset,
                                          delta,
                                          mask.counts,
                                          mask.keys,
                                          plan_->tile_bytes,
                                          a.kv_heads,
                                          key_blocks_,
                                          group_ * query_blocks_,
                                          first_key_,
                                          end_key_,
                                          1};
    const sage::ValueParams quantize_value = {value,
                                              reinterpret_cast<uint32_t*>(value_totals),
                                              tiles + plan_->value_offset,
                                              value_scales,
                                              mask.keys,
                                              plan_->tile_bytes,
                                              a.kv_heads,
                                              key_blocks_,
                                              first_key_,
                                              end_key_,
                                              1};
    const sage::ScheduleParams schedule = {counters, key_totals, value_totals, a.batch * a.kv_heads,
                                           tasks_ahead(a, device.multiprocessors())};
    const sage::QuantizeParams<> quantize = {statistics, quantize_query, quantize_key,
                                             quantize_value, schedule};
    const int64_t fitting_heads = most(1, kCachedBytes / (key_blocks_ * plan_->tile_bytes));
    const int64_t kv_heads = a.batch * a.kv_heads;
    const int64_t heads_at_once = blocks_of(kv_heads, blocks_of(kv_heads, fitting_heads)) * group_;
    const sage::AttendParams attend = {parts[kQueryCodes],
                                       query_scales,
                                       tiles,
                                       value_scales,
                                       delta,
                                       row_term,
                                       sinks,
                                       a.output,
                                       a.lse,
                                       a.mask,
                                       mask.tiles,
                                       mask.live,
                                       nullptr,
                                       nullptr,
                                       taken,
                                       a.heads * a.query_length * a.value_head_dim,
                                       a.query_length * a.value_head_dim,
                                       a.value_head_dim,
                                       a.query_length,
                                       a.heads,
                                       group_,
                                       a.query_length,
                                       a.key_length,
                                       query_blocks_,
                                       key_blocks_,
                                       query_blocks_,
                                       1,
                                       lower_,
                                       upper_,
                                       a.value_head_dim,
                                       key_blocks_,
                                       rows,
                                       heads_at_once,
                                       a.softcap > kLeastSoftcap ? a.softcap : kLeastSoftcap,
                                       dead_value};
    const auto start = [&](int64_t kernel, int64_t blocks, const auto& params, bool dependent) {
        return device.launch(kernel, blocks, &params, sizeof params, stream, dependent, error);
    };
    const auto start_attend = [&](int64_t blocks) {
        const bool dependent = plan_->dependent != 0;
        if (plan_->copies_mask == 0) return start(plan_->attend, blocks, attend, dependent);
        return start(plan_->attend, blocks, with_mask_map(attend, a, device.driver()), dependent);
    };
    const int64_t blocks = plan_->persistent != 0 ? least(rows, device.multiprocessors()) : rows;
    return SAGE_CUDA_CHECK(device.driver(), error, cuMemsetD8Async,
                           CUdeviceptr(reinterpret_cast<uintptr_t>(counters)), 0,
                           size_t(sizes_[kCounters]), stream) &&
           start(plan_->quantize, quantizing_blocks(a), quantize, false) && start_attend(blocks);
}

// All kernels before any is started: a call that fails has written nothing.
bool Work::load(Device& device, const Attention& a, CUstream stream, Error& error) const {
    const Arch& arch = device.arch();
    for (const int64_t kernel : {plan_->quantize, plan_->attend})
        if (!device.load(kernel, stream, error)) return false;
    if (a.mask.data != nullptr)
        for (const int64_t kernel : {arch.mask_rows, arch.mask_keys, arch.mask_counts})
            if (!device.load(kernel, stream, error)) return false;
    return !converts_sinks_ || device.load(arch.sinks, stream, error);
}

bool Work::look_through_mask(const Device& device, const Attention& a, char* const (&parts)[kParts],
                             CUstream stream, Error& error) const {
    const Arch& arch = device.arch();
    uint8_t* const discerning = as<uint8_t>(parts[kMaskDiscerning]);
    uint8_t* const keys = as<uint8_t>(parts[kMaskKeys]);
    const sage::MaskRowsParams rows = {a.mask,
                                       as<uint8_t>(parts[kMaskTiles]),
                                       as<uint8_t>(parts[kMaskLive]),
                                       discerning,
                                       mask_heads_,
                                       a.query_length,
                                       a.key_length,
                                       query_blocks_,
                                       key_blocks_,
                                       lower_,
                                       upper_};
    const sage::MaskKeysParams of_keys = {
        a.mask,         discerning,   keys,        mask_kv_heads_, mask_heads_ / mask_kv_heads_,
        a.query_length, a.key_length, key_blocks_, lower_,         upper_};
    const sage::MaskCountsParams counts = {
        keys,         as<float>(parts[kMaskCounts]), mask_kv_heads_,
        a.key_length, a.batch / mask_batches_,       a.kv_heads / mask_kv_heads_};
    const int64_t kv_heads = mask_batches_ * mask_kv_heads_;
    return device.launch(arch.mask_rows, mask_batches_ * mask_heads_ * query_blocks_, &rows,
                         sizeof rows, stream, false, error) &&
           device.launch(arch.mask_keys, kv_heads * key_blocks_, &of_keys, sizeof of_keys, stream,
                         false, error) &&
           device.launch(arch.mask_counts, kv_heads, &counts, sizeof counts, stream, false, error);
}

// Queries that see nothing: zeros, and an LSE of what the sinks are.
bool Work::fill(Device& device, const Attention& a, CUstream stream, Error& error) const {
    const int64_t rows = a.batch * a.heads * a.query_length;
    const int64_t element = a.dtype == Dtype::kFloat32 ? 4 : 2;
    if (a.lse != nullptr && !device.load(device.arch().sinks, stream, error)) return false;
    if (a.value_head_dim > 0 &&
        !SAGE_CUDA_CHECK(device.driver(), error, cuMemsetD8Async,
                         CUdeviceptr(reinterpret_cast<uintptr_t>(a.output)), 0,
                         size_t(rows * a.value_head_dim * element), stream))
        return false;
    return a.lse == nullptr || spread_sinks(device, a, a.lse, rows, a.query_length, stream, error);
}

bool Work::spread_sinks(const Device& device, const Attention& a, float* out, int64_t count,
                        int64_t repeats, CUstream stream, Error& error) const {
    const sage::SinksParams params = {a.sinks, out, a.sinks_kind, count, a.heads, repeats};
    const int64_t kernel = device.arch().sinks;
    const int64_t threads = device.pack().kernels()[size_t(kernel)].threads;
    return device.launch(kernel, blocks_of(count, threads), &params, sizeof params, stream, false,
                         error);
}

}  // namespace sage_cuda
