#include "elements.hpp"
#include "float_task.hpp"
#include "kernels.hpp"
#include "status.hpp"

namespace sage_ort {
namespace {

using sage_cpu::Carver;
using sage_cpu::ceil_div;
using sage_cpu::max;
using sage_cpu::min;
using sage_cpu::round_up;

constexpr int64_t kTasksPerWorker = 3;
constexpr double kProductsOfWorker = 1 << 18;  // waking up a thread for fewer does not pay

const FloatKernels& kernels() {
    switch (sage_cpu_isa()) {
#if defined(__x86_64__) && !defined(SAGE_CPU_WITHOUT_AVX512VNNI)
        case SAGE_CPU_ISA_AVX512VNNI:
            return kFloatAvx512;
#endif
#if defined(__x86_64__) && !defined(SAGE_CPU_WITHOUT_AVX2)
        case SAGE_CPU_ISA_AVXVNNI:
        case SAGE_CPU_ISA_AVX2:
            return kFloatAvx2;
#endif
        default:
            return kFloatPortable;
    }
}

// Tasks stand in one queue; a worker takes the next. Works with any number of workers, and when
// they run one after the other.
struct Queue {
    const Setting& setting;
    const Call& call;
    const FloatKernels& kernels;
    const float* sinks;
    char* scratch;
    int64_t scratch_bytes;  // of one worker
    int64_t task_rows, row_tasks, tasks;
    int64_t next;  // atomic

    void work(int64_t worker) {
        int64_t rows = call.heads / call.kv_heads * call.query_length;
        for (;;) {
            int64_t index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (index >= tasks) return;
            int64_t plane = index / row_tasks;
            // Under a causal mask the last rows have the most work: the small tasks fill the end.
            int64_t row_task = row_tasks - 1 - index % row_tasks, first = row_task * task_rows;
            kernels.attend({&call, &setting.node, sinks, plane / call.kv_heads,
                            plane % call.kv_heads, first, min(task_rows, rows - first),
                            scratch + worker * scratch_bytes});
        }
    }
};

}  // namespace

OrtStatus* attend_float(const Setting& setting, const Call& call) {
    if (writes_nothing(call)) return nullptr;
    int64_t planes = call.batch * call.kv_heads;
    int64_t rows = call.heads / call.kv_heads * call.query_length;
    double products = double(planes) * double(rows) * double(call.key_length) *
                      double(call.head_dim + call.value_head_dim);
    double wanted = products / kProductsOfWorker + 1;
    int64_t workers =
        wanted < double(setting.threads.workers()) ? int64_t(wanted) : setting.threads.workers();

    int64_t share = ceil_div(rows * planes, kTasksPerWorker * workers);
    int64_t task_rows = min(
        kFloatTaskRows, round_up(share, is_transposed(call) ? kTransposedRows : kFloatBlockRows));
    int64_t row_tasks = ceil_div(rows, task_rows);
    workers = min(workers, planes * row_tasks);

    Scratch memory(setting.allocator);
    const FloatKernels& kernels_here = kernels();
    int64_t scratch_bytes = kernels_here.scratch_bytes(call);
    Carver measured{nullptr};
    measured.take<float>(sinks_to_convert(call));
    measured.take<char>(workers * scratch_bytes);
    Carver carver{memory.allocate(measured.used)};
    if (carver.base == nullptr)
        return refuse(setting.api, ORT_FAIL, "no memory for a workspace of %lld bytes",
                      static_cast<long long>(measured.used));
    float* sinks = carver.take<float>(sinks_to_convert(call));
    char* scratch = carver.take<char>(workers * scratch_bytes);

    Queue queue{setting,       call,      kernels_here, read_sinks(call, sinks), scratch,
                scratch_bytes, task_rows, row_tasks,    planes * row_tasks,      0};
    auto work = [](void* argument, int64_t worker) { static_cast<Queue*>(argument)->work(worker); };
    if (workers == 1)
        queue.work(0);
    else
        setting.threads.run(workers, work, &queue);
    return setting.threads.take_failure();
}

}  // namespace sage_ort
