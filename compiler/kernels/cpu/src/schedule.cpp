#include "schedule.hpp"

#include <sched.h>

namespace sage_cpu {
namespace {

#if defined(__x86_64__)
void pause() { __builtin_ia32_pause(); }
#else
void pause() {}
#endif

// All tasks of a call in one order: first those that look through the mask, then those that pack,
// then those that attend. A worker takes the next, and waits where it needs what others still work
// on. Whatever is waited for was taken earlier, by a worker that runs; so this ends with any number
// of workers, also when the host runs them one after the other. Where packed keys of all heads
// would take too much memory, one task packs a head and attends it.
//
// A task's result does not depend on who runs it or when, nor on how rows are divided into tasks.
class Queue {
 public:
    Queue(const Call& call, int64_t workers) : call_(call), p_(*call.problem) {
        scans_ = call.has_map ? call.map.planes() * call.map.row_blocks : 0;
        blocks_ = ceil_div(p_.key_length - call.first, kBlockKeys);
        packs_ = call.packs && !call.head_by_head ? p_.batch * p_.kv_heads * blocks_ : 0;
        if (call.attends) {
            int64_t rows = p_.heads / p_.kv_heads * p_.query_length;
            // Small problems: some tasks for each worker, down to one group of rows.
            int64_t share = ceil_div(rows * p_.batch * p_.kv_heads, kTasksPerWorker * workers);
            task_rows_ = min(kTaskRows, round_up(share, kGroupRows));
            row_tasks_ = ceil_div(rows, task_rows_);
            attends_ = p_.batch * p_.kv_heads * (call.head_by_head ? 1 : row_tasks_);
        }
    }

    int64_t size() const { return scans_ + packs_ + attends_; }

    void work(int64_t worker) {
        char* scratch = call_.scratch + worker * call_.scratch_bytes;
        for (;;) {
            int64_t index = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
            if (index < scans_) {
                scan(index);
            } else if (index < scans_ + packs_) {
                wait_for(scanned_, scans_);
                index -= scans_;
                pack(index / blocks_, index % blocks_, head(index / blocks_));
                __atomic_fetch_add(&packed_, 1, __ATOMIC_RELEASE);
            } else if (index < size()) {
                wait_for(scanned_, scans_);
                wait_for(packed_, packs_);
                index -= scans_ + packs_;
                if (call_.head_by_head)
                    pack_and_attend(index, head(worker), scratch);
                else
                    attend(index, scratch);
            } else {
                return;
            }
        }
    }

 private:
    static constexpr int64_t kTasksPerWorker = 3;
    static constexpr int kSpins = 2000;

    void wait_for(int64_t& done, int64_t all) {
        for (int spins = 0; __atomic_load_n(&done, __ATOMIC_ACQUIRE) < all; spins++) {
            if (spins < kSpins)
                pause();
            else
                sched_yield();
        }
    }

    // `place` is the index of a batch and key/value head, or of a worker.
    char* head(int64_t place) const { return call_.packed + place * call_.layout.head_bytes; }

    const MaskMap* map() const { return call_.has_map ? &call_.map : nullptr; }

    void scan(int64_t index) {
        int64_t plane = index / call_.map.row_blocks;
        call_.kernels->scan({&p_, &call_.map, plane / call_.map.heads, plane % call_.map.heads,
                             index % call_.map.row_blocks});
        __atomic_fetch_add(&scanned_, 1, __ATOMIC_RELEASE);
    }

    void pack(int64_t plane, int64_t block, char* head) {
        call_.kernels->pack({&p_, &call_.layout, map(), plane / p_.kv_heads, plane % p_.kv_heads,
                             call_.first / kBlockKeys + block, call_.first, call_.everything,
                             head});
    }

    void attend(int64_t index, char* scratch) {
        int64_t plane, row_task;
        if (call_.has_map && call_.map.heads == 1) {
            // Heads that share a mask follow each other: its rows stay in the cache.
            int64_t batch = index / (row_tasks_ * p_.kv_heads),
                    rest = index % (row_tasks_ * p_.kv_heads);
            plane = batch * p_.kv_heads + rest % p_.kv_heads;
            row_task = rest / p_.kv_heads;
        } else {
            plane = index / row_tasks_;  // the packed head stays in the cache
            row_task = index % row_tasks_;
        }
        // Under a causal mask the last rows have the most work: the small tasks fill the end.
        if (p_.window_right >= 0) row_task = row_tasks_ - 1 - row_task;
        attend(plane, row_task, head(plane), scratch);
    }

    void attend(int64_t plane, int64_t row_task, const char* head, char* scratch) {
        int64_t rows = p_.heads / p_.kv_heads * p_.query_length, first = row_task * task_rows_;
        call_.kernels->attend({&p_, &call_.layout, map(), plane / p_.kv_heads, plane % p_.kv_heads,
                               first, min(task_rows_, rows - first), head, scratch});
    }

    void pack_and_attend(int64_t plane, char* head, char* scratch) {
        for (int64_t block = 0; block < blocks_; block++) pack(plane, block, head);
        for (int64_t task = 0; task < row_tasks_; task++) attend(plane, task, head, scratch);
    }

    const Call& call_;
    const sage_cpu_problem& p_;
    int64_t scans_, packs_, attends_ = 0;
    int64_t blocks_, task_rows_ = 0, row_tasks_ = 0;
    int64_t next_ = 0, scanned_ = 0, packed_ = 0;  // atomic
};

void work(void* queue, int64_t worker) { static_cast<Queue*>(queue)->work(worker); }

}  // namespace

void run(const Call& call, const sage_cpu_host* host) {
    int64_t workers = host == nullptr ? 1 : host->workers;
    Queue queue(call, workers);
    workers = min(workers, queue.size());
    if (workers <= 1)
        queue.work(0);
    else
        host->parallel_for(host->context, workers, work, &queue);
}

}  // namespace sage_cpu
