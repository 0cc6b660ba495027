#include <string.h>

#include "elements.hpp"
#include "kernels.hpp"
#include "src/plan.hpp"
#include "status.hpp"

namespace sage_ort {
namespace {

using sage_cpu::Carver;

// What the library takes of head dims.
constexpr int64_t kHeadDimStep = 8, kLeastHeadDim = 16;
constexpr int64_t kRowsOfTask = 256;

int64_t fitting(int64_t head_dim) {
    return sage_cpu::round_up(sage_cpu::max(head_dim, kLeastHeadDim), kHeadDimStep);
}

// Rows that lie dense, of any width.
struct Rows {
    char* data;
    int64_t count, bytes;  // of one row
};

// Copies rows to rows of another width: cut, or filled up with zeros.
void copy_rows(Threads& threads, const Rows& from, const Rows& to) {
    struct Copy {
        Rows from, to;
    } copy{from, to};
    auto task = [](void* argument, int64_t index) {
        const auto& [source, target] = *static_cast<Copy*>(argument);
        int64_t kept = sage_cpu::min(source.bytes, target.bytes);
        int64_t last = sage_cpu::min((index + 1) * kRowsOfTask, source.count);
        for (int64_t row = index * kRowsOfTask; row < last; row++) {
            char* place = target.data + row * target.bytes;
            memcpy(place, source.data + row * source.bytes, size_t(kept));
            memset(place + kept, 0, size_t(target.bytes - kept));
        }
    };
    threads.run(sage_cpu::ceil_div(from.count, kRowsOfTask), task, &copy);
}

// A tensor of a call as the library sees it. Zeros in further channels change no score, and further
// channels of V none of the others: so head dims that the library does not take are filled up.
struct Operand {
    Rows given, used;

    Operand(Carver& carver, const void* data, int64_t count, int64_t head_dim, int64_t size) {
        given = {static_cast<char*>(const_cast<void*>(data)), count, head_dim * size};
        used = {given.data, count, fitting(head_dim) * size};
        if (is_copy()) used.data = carver.take<char>(used.count * used.bytes);
    }

    bool is_copy() const { return given.bytes != used.bytes; }

    void fill(Threads& threads) const {
        if (is_copy()) copy_rows(threads, given, used);
    }
    void give_back(Threads& threads) const {
        if (is_copy()) copy_rows(threads, used, given);
    }

    sage_cpu_tensor tensor(int64_t heads, int64_t length, int64_t head_dim) const {
        int64_t row = fitting(head_dim);
        return {used.data, {heads * length * row, length * row, row, 1}};
    }
};

// The memory of a call: what its tensors are filled up in, and sinks as floats.
struct Operands {
    Operand query, key, value, output;
    float* sinks;

    Operands(Carver& carver, const Call& c)
        : query(carver, c.query, c.batch * c.heads * c.query_length, c.head_dim,
                element_size(c.dtype)),
          key(carver, c.key, c.batch * c.kv_heads * c.key_length, c.head_dim,
              element_size(c.dtype)),
          value(carver, c.value, c.batch * c.kv_heads * c.key_length, c.value_head_dim,
                element_size(c.dtype)),
          output(carver, c.output, c.batch * c.heads * c.query_length, c.value_head_dim,
                 element_size(c.dtype)),
          sinks(carver.take<float>(sinks_to_convert(c))) {}
};

sage_cpu_problem describe(const Node& node, const Call& call, int32_t recipe) {
    sage_cpu_problem p{};
    p.struct_size = int32_t(sizeof p);
    p.isa = SAGE_CPU_ISA_AUTO;
    p.recipe = recipe;
    p.dtype = cpu_dtype(call.dtype);
    p.batch = call.batch;
    p.heads = call.heads;
    p.kv_heads = call.kv_heads;
    p.query_length = call.query_length;
    p.key_length = call.key_length;
    p.head_dim = fitting(call.head_dim);
    p.value_head_dim = fitting(call.value_head_dim);
    p.window_left = call.band.left;
    p.window_right = call.band.right;
    p.diagonal = call.band.diagonal;
    p.scale = node.scale;
    p.softcap = node.softcap;
    p.dead_rows = node.dead_rows == DeadRows::kNan ? SAGE_CPU_DEAD_NAN : SAGE_CPU_DEAD_ZERO;
    if (call.mask.data != nullptr) {
        p.mask_dtype = cpu_dtype(call.mask.dtype);
        p.mask.data = const_cast<void*>(call.mask.data);
        memcpy(p.mask.stride, call.mask.stride, sizeof p.mask.stride);
    }
    p.lse = call.lse;
    return p;
}

// The tasks that the library makes of a call at most: a worker without one would only take memory.
// Those that look through a mask are not counted, since few of them are worth a worker.
int64_t most_tasks(const Call& call) {
    int64_t rows = call.heads / call.kv_heads * call.query_length;
    return call.batch * call.kv_heads *
           (sage_cpu::ceil_div(call.key_length, sage_cpu::kBlockKeys) +
            sage_cpu::ceil_div(rows, sage_cpu::kGroupRows));
}

OrtStatus* refused(const OrtApi& api, int32_t error) {
    return refuse(api, ORT_INVALID_ARGUMENT, "%s", sage_cpu_describe(error));
}

}  // namespace

OrtStatus* attend_quantized(const Setting& setting, const Call& call, int32_t recipe) {
    if (writes_nothing(call)) return nullptr;
    sage_cpu_problem problem = describe(setting.node, call, recipe);
    sage_cpu_host host = *setting.threads.host();
    host.workers = sage_cpu::min(host.workers, most_tasks(call));
    int64_t workspace_bytes;
    int32_t error = sage_cpu_workspace_size(&problem, host.workers, &workspace_bytes);
    if (error != SAGE_CPU_OK) return refused(setting.api, error);

    Carver measured{nullptr};
    Operands(measured, call);
    measured.take<char>(workspace_bytes);
    Scratch scratch(setting.allocator);
    Carver carver{scratch.allocate(measured.used)};
    if (carver.base == nullptr)
        return refuse(setting.api, ORT_FAIL, "no memory for a workspace of %lld bytes",
                      static_cast<long long>(measured.used));
    Operands operands(carver, call);
    char* workspace = carver.take<char>(workspace_bytes);

    problem.query = operands.query.tensor(call.heads, call.query_length, call.head_dim);
    problem.key = operands.key.tensor(call.kv_heads, call.key_length, call.head_dim);
    problem.value = operands.value.tensor(call.kv_heads, call.key_length, call.value_head_dim);
    problem.output = operands.output.tensor(call.heads, call.query_length, call.value_head_dim);
    problem.sinks = read_sinks(call, operands.sinks);
    operands.query.fill(setting.threads);
    operands.key.fill(setting.threads);
    operands.value.fill(setting.threads);
    SAGE_ORT_TRY(setting.threads.take_failure());
    error = sage_cpu_attention(&problem, &host, workspace, workspace_bytes);
    if (error != SAGE_CPU_OK) return refused(setting.api, error);
    SAGE_ORT_TRY(setting.threads.take_failure());
    operands.output.give_back(setting.threads);
    return setting.threads.take_failure();
}

}  // namespace sage_ort
