#include "executor.hpp"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <random>

#include "fiber.hpp"
#include "mbarrier.hpp"
#include "prerequisites.hpp"
#include "publication.hpp"
#include "shadow.hpp"
#include "stores.hpp"
#include "tensor_map.hpp"
#include "traffic.hpp"
#include "warp.hpp"
#include "wgmma.hpp"

namespace sage::host {

namespace {

constexpr size_t kRedzone = 4096;
constexpr size_t kSharedAlignment = 1024;
constexpr int kGarbage = 0xCD;
constexpr int kRedzoneByte = 0xFA;

constexpr char kBarrier[] = "barrier";
constexpr char kMbarrierWait[] = "mbarrier_wait";
constexpr char kNamedBarrier[] = "named_barrier";

constexpr int kMbarrierBytes = 8;
constexpr size_t kMostMbarriers = 512;
constexpr int kNamedBarriers = 16;  // of which 0 is `barrier`
constexpr int kWarpgroup = 4;       // warps
constexpr int64_t kRegisters = 65536;

// A bulk copy lands at one of this many switches between threads, on average.
constexpr uint32_t kMeanFlight = 8;

// On average, a thread is interrupted after this many accesses to memory.
constexpr uint32_t kMeanSlice = 32;

struct Copy {
    char* to;
    char bytes[16];
};

struct Thread {
    Context context;
    char const* waits_at = nullptr;  // the operation; null when it can run
    Site site = {};                  // of the operation
    bool exited = false;
    bool awaited_prerequisites = false;
    std::vector<Copy> copies;    // in flight, oldest first
    std::vector<size_t> groups;  // the number of copies of each committed group, oldest first
    size_t uncommitted = 0;
    size_t mbarrier = 0;  // the offset of the one it waits at, and
    int parity = 0;       // for which phase
};

struct alignas(TensorMap::kAlignment) ParameterLine {
    char bytes[TensorMap::kAlignment];
};

struct NamedBarrier {
    int threads = 0;  // of this round; 0: nobody has come
    int arrived = 0;
    std::vector<int> waiting;
    Clock clock;
};

struct Warp {
    int arrived = 0;  // at the collective
    int first = 0;    // the thread that arrived first
    Collective operation = {};
    void* arguments[kLanes] = {};
    int exited = 0;
    int at_barrier = 0;
    int first_at_barrier = 0;
    WarpProducts products;
    int registers = 0;  // that setmaxnreg has set, by its first lane
};

bool same(Site x, Site y) { return x.line == y.line && std::strcmp(x.file, y.file) == 0; }

char const* file_name(char const* path) {
    char const* const slash = std::strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

// printf to a string; not on large buffers of its own, since it runs on a fiber's stack.
__attribute__((format(printf, 1, 2))) std::string format(char const* pattern, ...) {
    char text[512];
    va_list values;
    va_start(values, pattern);
    std::vsnprintf(text, sizeof text, pattern, values);
    va_end(values);
    return text;
}

std::string at(Site site) { return format(" (%s:%d)", file_name(site.file), site.line); }

// The random numbers that choose who runs: xorshift64*.
class Dice {
 public:
    void seed(uint64_t seed) { state_ = (seed + 1) * 0x9e37'79b9'7f4a'7c15; }
    // 0 .. count - 1
    uint32_t roll(uint32_t count) {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        auto const high = static_cast<uint32_t>((state_ * 0x2545'f491'4f6c'dd1d) >> 32);
        return static_cast<uint32_t>(static_cast<uint64_t>(high) * count >> 32);
    }

 private:
    uint64_t state_ = 1;
};

class Executor {
 public:
    std::string execute(Launch const& launch);

    // The services; see Runtime.
    int thread_index() const { return current_; }
    int64_t block_index() const { return block_; }
    int64_t grid_size() const { return launch_->grid; }
    char* shared_memory() { return shared_; }
    void barrier(Site site);
    void access(Access access, void const* address, int bytes, Site site);
    uint32_t take_ticket(uint32_t* counter, Site site);
    uint32_t arrive(uint32_t* counter, Site site);
    void await(uint32_t const* counter, uint32_t arrivals, Site site);
    void await_prerequisites();
    void copy_async(void* shared, void const* global, Site site);
    void copy_async_commit();
    void copy_async_wait(int newest);
    void collective(Collective operation, void* argument, Site site);
    void mbarrier_init(void* mbarrier, int arrivals, Site site);
    void mbarrier_arrive(void* mbarrier, int bytes, Site site);
    void mbarrier_wait(void* mbarrier, int parity, Site site);
    void copy_bulk(void* shared, void const* global, int bytes, void* mbarrier, Site site);
    void copy_tensor(void* shared, void const* map, int const* at, int dims, void* mbarrier,
                     Site site);
    void fence_async();
    void named_barrier(int id, int threads, bool waits, Site site);
    void set_registers(int registers, Site site);

    static thread_local Executor* running;

 private:
    void run_block(int64_t block);
    static void run_thread();
    void exit_thread();

    void run_next();
    void wait(char const* operation, Site site);
    void wake(int thread);
    void interrupt();

    void check_shared(void const* address, int bytes, char const* operation, Site site);
    void check_no_mbarrier(void const* address, int bytes, char const* operation, Site site);
    void check_global(void const* address, int bytes, bool store, char const* operation, Site site);
    void check_span(char const* begin, char const* end, char const* operation, Site site);
    void check_published(void const* address, int bytes, Site site);
    void check_prerequisites(uintptr_t begin, size_t size, bool store, char const* operation,
                             Site site);
    void check_not_stored_before(void const* address, int bytes, Site site);
    void check_place(void const* address, int bytes, bool store, char const* operation, Site site);
    void check_counter(uint32_t const* counter, char const* operation, Site site);
    void check_range(uintptr_t begin, uintptr_t size, bool store, char const* operation, Site site);
    void check_race(Conflict conflict, void const* address, char const* operation, Site site);
    void check_redzones();
    void read_rows(Warp const& warp);
    Mbarrier& mbarrier_at(void const* address, char const* operation, Site site);
    void complete_if_due(size_t offset);
    void issue(BulkCopy copy, Mbarrier& state);
    void land(size_t index);
    void perform_wgmma(Warp& warp, Site site);
    void check_end_of_block();
    [[noreturn]] void fail(std::string const& what);
    std::string name(int thread) const;
    std::string deadlock() const;

    Launch const* launch_ = nullptr;
    int threads_count_ = 0;
    int64_t block_ = 0;
    int current_ = 0;
    int at_barrier_ = 0;
    int exited_ = 0;
    uint32_t slice_ = 0;
    size_t last_range_ = 0;
    char* shared_ = nullptr;
    int64_t shared_bytes_ = 0;
    std::string failure_;
    Context host_;
    Dice dice_;
    Shadow shadow_;
    Stores stores_;
    Publications publications_;
    Prerequisites prerequisites_;
    Traffic traffic_;
    Stacks stacks_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<int> ready_;
    std::vector<char> arena_;
    std::vector<ParameterLine> params_;     // of the launch, as aligned as any may be
    std::map<size_t, Mbarrier> mbarriers_;  // by offset
    std::vector<BulkCopy> bulk_copies_;     // in flight
    NamedBarrier named_[kNamedBarriers];
};

thread_local Executor* Executor::running = nullptr;

std::string Executor::execute(Launch const& launch) {
    launch_ = &launch;
    threads_count_ = launch.entry.threads;
    shared_bytes_ = launch.entry.shared_bytes;
    failure_.clear();
    stacks_.reserve(threads_count_);
    threads_.resize(static_cast<size_t>(threads_count_));
    warps_.resize(static_cast<size_t>(threads_count_ / kLanes));
    arena_.resize(static_cast<size_t>(shared_bytes_) + 2 * kRedzone + kSharedAlignment);
    params_.resize((launch.entry.params_bytes + sizeof(ParameterLine) - 1) / sizeof(ParameterLine));
    std::memcpy(params_.data(), launch.params, launch.entry.params_bytes);
    auto const low = reinterpret_cast<uintptr_t>(arena_.data()) + kRedzone;
    shared_ = reinterpret_cast<char*>((low + kSharedAlignment - 1) & ~(kSharedAlignment - 1));
    prerequisites_.begin_launch(launch.stream, launch.dependent, stores_);
    stores_.clear();
    if (launch.detect_races) {
        shadow_.reset(static_cast<size_t>(shared_bytes_));
        publications_.begin_launch();
    }
    if (launch.bytes != nullptr) traffic_.begin_launch(launch.cache);

    // Blocks may run in any order, too.
    std::vector<int64_t> blocks(static_cast<size_t>(launch.grid));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(launch.seed));
    running = this;
    for (int64_t const block : blocks) {
        run_block(block);
        if (!failure_.empty()) break;
    }
    running = nullptr;
    if (launch.bytes != nullptr) *launch.bytes = traffic_.bytes();
    return failure_;
}

void Executor::run_block(int64_t block) {
    block_ = block;
    at_barrier_ = exited_ = 0;
    dice_.seed(launch_->seed ^ static_cast<uint64_t>(block) << 20);
    slice_ = 1 + dice_.roll(2 * kMeanSlice);
    std::memset(shared_ - kRedzone, kRedzoneByte, kRedzone);
    std::memset(shared_, kGarbage, static_cast<size_t>(shared_bytes_));
    std::memset(shared_ + shared_bytes_, kRedzoneByte, kRedzone);
    if (launch_->detect_races) {
        shadow_.barrier();
        publications_.begin_block(block);
    }
    if (launch_->bytes != nullptr) traffic_.begin_block();
    std::fill(warps_.begin(), warps_.end(), Warp{});
    mbarriers_.clear();
    bulk_copies_.clear();
    std::fill(std::begin(named_), std::end(named_), NamedBarrier{});
    ready_.clear();
    for (int thread = 0; thread < threads_count_; ++thread) {
        Thread& state = threads_[static_cast<size_t>(thread)];
        prepare(state.context, stacks_.low(thread), stacks_.top(thread), run_thread);
        state.exited = false;
        state.awaited_prerequisites = false;
        state.copies.clear();
        state.groups.clear();
        state.uncommitted = 0;
        wake(thread);
    }
    std::swap(ready_[dice_.roll(static_cast<uint32_t>(ready_.size()))], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    switch_context(host_, threads_[static_cast<size_t>(current_)].context);
    if (failure_.empty()) check_end_of_block();
    if (failure_.empty()) check_redzones();
}

void Executor::run_thread() {
    running->launch_->entry.run(running->params_.data());
    running->exit_thread();
}

void Executor::exit_thread() {
    Thread& thread = threads_[static_cast<size_t>(current_)];
    Warp& warp = warps_[static_cast<size_t>(current_ / kLanes)];
    if (!thread.copies.empty()) {
        fail(
            format("exits with %zu asynchronous copies in flight, %zu of them not committed: the "
                   "kernel must wait for all of its copies",
                   thread.copies.size(), thread.uncommitted));
    }
    if (warp.arrived > 0) {
        fail(std::string("exits while ") + name(warp.first) + " waits for it at " +
             name_of(warp.operation) + at(threads_[static_cast<size_t>(warp.first)].site));
    }
    if (!warp.products.empty()) {
        fail("exits with products of wgmma in flight: the kernel must wait for all of them");
    }
    for (int other = 0; other < threads_count_ && at_barrier_ > 0; ++other) {
        Thread const& waiting = threads_[static_cast<size_t>(other)];
        if (waiting.waits_at == kBarrier) {
            fail("exits while " + name(other) + " waits for it at barrier" + at(waiting.site));
        }
    }
    thread.exited = true;
    ++warp.exited;
    if (++exited_ == threads_count_) switch_context(thread.context, host_);
    run_next();
}

// Runs a thread that can run, at random: perhaps this one. Returns when this one is chosen.
void Executor::run_next() {
    while (!bulk_copies_.empty() && (ready_.empty() || dice_.roll(kMeanFlight) == 0)) {
        land(dice_.roll(static_cast<uint32_t>(bulk_copies_.size())));
    }
    if (ready_.empty()) fail(deadlock());
    std::swap(ready_[dice_.roll(static_cast<uint32_t>(ready_.size()))], ready_.back());
    int const previous = current_;
    current_ = ready_.back();
    ready_.pop_back();
    if (current_ == previous) return;
    switch_context(threads_[static_cast<size_t>(previous)].context,
                   threads_[static_cast<size_t>(current_)].context);
}

void Executor::wait(char const* operation, Site site) {
    Thread& thread = threads_[static_cast<size_t>(current_)];
    thread.waits_at = operation;
    thread.site = site;
}

void Executor::wake(int thread) {
    threads_[static_cast<size_t>(thread)].waits_at = nullptr;
    ready_.push_back(thread);
}

// Between two accesses to memory, any other thread may run.
void Executor::interrupt() {
    if (--slice_ > 0) return;
    slice_ = 1 + dice_.roll(2 * kMeanSlice);
    ready_.push_back(current_);
    run_next();
}

void Executor::barrier(Site site) {
    Warp& warp = warps_[static_cast<size_t>(current_ / kLanes)];
    wait(kBarrier, site);
    if (exited_ > 0) {
        int exited = 0;
        while (!threads_[static_cast<size_t>(exited)].exited) ++exited;
        fail("waits at barrier" + at(site) + ", which " + name(exited) +
             " has exited without reaching: all threads of a block must");
    }
    if (warp.at_barrier == 0) warp.first_at_barrier = current_;
    Site const first = threads_[static_cast<size_t>(warp.first_at_barrier)].site;
    if (!same(site, first)) {
        fail("divergent barrier: it is at barrier" + at(site) + ", and " +
             name(warp.first_at_barrier) + " of the same warp at barrier" + at(first));
    }
    ++warp.at_barrier;
    if (++at_barrier_ == threads_count_) {
        at_barrier_ = 0;
        for (Warp& each : warps_) each.at_barrier = 0;
        if (launch_->detect_races) {
            shadow_.barrier();
            publications_.barrier();
        }
        for (int thread = 0; thread < threads_count_; ++thread) wake(thread);
    }
    run_next();
}

void Executor::collective(Collective operation, void* argument, Site site) {
    Warp& warp = warps_[static_cast<size_t>(current_ / kLanes)];
    int const first_thread = current_ / kLanes * kLanes;
    wait(name_of(operation), site);
    if (warp.exited > 0) {
        int exited = first_thread;
        while (!threads_[static_cast<size_t>(exited)].exited) ++exited;
        fail(std::string("waits at ") + name_of(operation) + at(site) + ", which " + name(exited) +
             " has exited without reaching: all lanes of a warp must");
    }
    if (warp.arrived == 0) {
        warp.first = current_;
        warp.operation = operation;
    }
    Site const first = threads_[static_cast<size_t>(warp.first)].site;
    if (operation != warp.operation || !same(site, first)) {
        fail(std::string("divergent warp collective: it is at ") + name_of(operation) + at(site) +
             ", and " + name(warp.first) + " of the same warp at " + name_of(warp.operation) +
             at(first));
    }
    if (operation == Collective::kShuffleXor) {
        int const mask = static_cast<ShuffleXor*>(argument)->lane_mask;
        if (mask < 0 || mask >= kLanes) {
            fail(format("shuffle_xor with lane mask %d: it must be 0 to 31", mask) + at(site));
        }
    } else if (operation == Collective::kLoadMatrix) {
        check_shared(static_cast<LoadMatrix*>(argument)->row, 16, "load_matrix_x4", site);
    }
    warp.arguments[current_ - first_thread] = argument;
    if (++warp.arrived == kLanes) {
        warp.arrived = 0;
        if (operation >= Collective::kWgmma) {
            perform_wgmma(warp, site);
        } else {
            if (operation == Collective::kLoadMatrix && launch_->detect_races) read_rows(warp);
            perform(operation, warp.arguments);
            if (launch_->detect_races) shadow_.collective(current_ / kLanes);
        }
        for (int lane = 0; lane < kLanes; ++lane) wake(first_thread + lane);
    }
    run_next();
}

void Executor::read_rows(Warp const& warp) {
    int const last = current_;
    int const first_thread = last / kLanes * kLanes;
    shadow_.gather(last / kLanes);
    for (int lane = 0; lane < kLanes; ++lane) {
        current_ = first_thread + lane;  // whose address it is
        auto const* const row =
            static_cast<char const*>(static_cast<LoadMatrix*>(warp.arguments[lane])->row);
        check_race(shadow_.read_row(static_cast<size_t>(row - shared_), last / kLanes), row,
                   "load_matrix_x4", threads_[static_cast<size_t>(last)].site);
    }
    current_ = last;
}

void Executor::access(Access access, void const* address, int bytes, Site site) {
    interrupt();
    switch (access) {
        case Access::kLoadGlobal:
            check_global(address, bytes, false, "load_global", site);
            return check_not_stored_before(address, bytes, site);
        case Access::kLoadWritten:
            return check_published(address, bytes, site);
        case Access::kStoreGlobal:
            return check_global(address, bytes, true, "store_global", site);
        case Access::kStoreStreaming:
            check_global(address, bytes, true, "store_streaming", site);
            if (launch_->bytes != nullptr) {
                traffic_.stream(reinterpret_cast<uintptr_t>(address), static_cast<size_t>(bytes));
            }
            return;
        case Access::kLoadShared:
        case Access::kStoreShared: {
            bool const store = access == Access::kStoreShared;
            char const* const operation = store ? "store_shared" : "load_shared";
            check_shared(address, bytes, operation, site);
            check_no_mbarrier(address, bytes, operation, site);
            if (!launch_->detect_races) return;
            auto const offset = static_cast<size_t>(static_cast<char const*>(address) - shared_);
            auto const size = static_cast<size_t>(bytes);
            check_race(store ? shadow_.write(offset, size, current_)
                             : shadow_.read(offset, size, current_),
                       address, operation, site);
        }
    }
}

// A counter is memory that no other operation may touch: it is checked as a store of whoever comes.
void Executor::check_counter(uint32_t const* counter, char const* operation, Site site) {
    interrupt();
    check_global(counter, sizeof *counter, true, operation, site);
    if (!launch_->detect_races || *counter == publications_.count(counter)) return;
    fail(format("%s at %p, which is %u where %u came: a counter must be zero before the launch",
                operation, static_cast<void const*>(counter), *counter,
                publications_.count(counter)) +
         at(site));
}

uint32_t Executor::take_ticket(uint32_t* counter, Site site) {
    check_counter(counter, "take_ticket", site);
    if (launch_->detect_races) publications_.take(counter);
    return (*counter)++;
}

uint32_t Executor::arrive(uint32_t* counter, Site site) {
    check_counter(counter, "arrive", site);
    if (launch_->detect_races) {
        publications_.await(counter, publications_.count(counter), current_);
        publications_.arrive(counter, current_);
    }
    return (*counter)++;
}

// Blocks run one after another, in the order of their tickets: what has not arrived yet is of
// blocks with later ones, which a device need not run before this one ends.
void Executor::await(uint32_t const* counter, uint32_t arrivals, Site site) {
    check_counter(counter, "await", site);
    if (*counter < arrivals) {
        fail(format("deadlock: awaits %u arrivals at %p, where %u came from the blocks that have "
                    "run: it may only wait for those with lower tickets",
                    arrivals, static_cast<void const*>(counter), *counter) +
             at(site));
    }
    if (launch_->detect_races) publications_.await(counter, arrivals, current_);
}

void Executor::await_prerequisites() {
    interrupt();
    threads_[static_cast<size_t>(current_)].awaited_prerequisites = true;
}

void Executor::copy_async(void* shared, void const* global, Site site) {
    interrupt();
    check_global(global, 16, false, "copy_async from global memory", site);
    check_shared(shared, 16, "copy_async to shared memory", site);
    auto* const to = static_cast<char*>(shared);
    if (launch_->detect_races) {
        check_race(shadow_.issue_copy(static_cast<size_t>(to - shared_), current_), to,
                   "copy_async", site);
    }
    Thread& thread = threads_[static_cast<size_t>(current_)];
    Copy& copy = thread.copies.emplace_back();
    copy.to = to;
    std::memcpy(copy.bytes, global, sizeof copy.bytes);
    ++thread.uncommitted;
}

void Executor::copy_async_commit() {
    Thread& thread = threads_[static_cast<size_t>(current_)];
    thread.groups.push_back(thread.uncommitted);
    thread.uncommitted = 0;
}

void Executor::copy_async_wait(int newest) {
    Thread& thread = threads_[static_cast<size_t>(current_)];
    auto const kept = static_cast<ptrdiff_t>(newest);
    auto const landing = static_cast<ptrdiff_t>(thread.groups.size()) - kept;
    if (landing <= 0) return;
    auto const groups_end = thread.groups.begin() + landing;
    auto const copies_end =
        thread.copies.begin() +
        static_cast<ptrdiff_t>(std::accumulate(thread.groups.begin(), groups_end, size_t{0}));
    for (auto copy = thread.copies.begin(); copy != copies_end; ++copy) {
        std::memcpy(copy->to, copy->bytes, sizeof copy->bytes);
        if (launch_->detect_races) {
            shadow_.land_copy(static_cast<size_t>(copy->to - shared_), current_);
        }
    }
    thread.copies.erase(thread.copies.begin(), copies_end);
    thread.groups.erase(thread.groups.begin(), groups_end);
}

Mbarrier& Executor::mbarrier_at(void const* address, char const* operation, Site site) {
    check_shared(address, kMbarrierBytes, operation, site);
    auto const offset = static_cast<size_t>(static_cast<char const*>(address) - shared_);
    auto const found = mbarriers_.find(offset);
    if (found == mbarriers_.end()) {
        fail(format("%s at offset %zu of shared memory, where no mbarrier was made", operation,
                    offset) +
             at(site));
    }
    if (launch_->detect_races) {
        check_race(shadow_.unordered_write(offset, kMbarrierBytes, current_), address, operation,
                   site);
    }
    return found->second;
}

void Executor::check_no_mbarrier(void const* address, int bytes, char const* operation, Site site) {
    if (mbarriers_.empty()) return;
    auto const begin = static_cast<size_t>(static_cast<char const*>(address) - shared_);
    auto const next = mbarriers_.lower_bound(begin + static_cast<size_t>(bytes));
    if (next == mbarriers_.begin()) return;
    if (std::prev(next)->first + kMbarrierBytes > begin) {
        fail(format("%s at offset %zu of shared memory, which is an mbarrier", operation, begin) +
             at(site));
    }
}

void Executor::mbarrier_init(void* mbarrier, int arrivals, Site site) {
    interrupt();
    check_shared(mbarrier, kMbarrierBytes, "mbarrier_init", site);
    if (arrivals < 1 || arrivals >= 1 << 20) {
        fail(format("mbarrier_init for %d arrivals", arrivals) + at(site));
    }
    auto const offset = static_cast<size_t>(static_cast<char*>(mbarrier) - shared_);
    if (mbarriers_.size() == kMostMbarriers) fail("mbarrier_init of too many" + at(site));
    int const index = static_cast<int>(mbarriers_.size());
    if (!mbarriers_.insert({offset, {index, arrivals, arrivals}}).second) {
        fail("mbarrier_init of an mbarrier" + at(site));
    }
    if (launch_->detect_races) {
        check_race(shadow_.write(offset, kMbarrierBytes, current_), mbarrier, "mbarrier_init",
                   site);
    }
}

void Executor::mbarrier_arrive(void* mbarrier, int bytes, Site site) {
    interrupt();
    Mbarrier& state = mbarrier_at(mbarrier, "mbarrier_arrive", site);
    if (state.missing == 0) {
        fail(format("mbarrier_arrive at mbarrier %d: all %d arrivals of phase %d have come, but "
                    "not its bytes",
                    state.index, state.arrivals, state.phase) +
             at(site));
    }
    if (launch_->detect_races) shadow_.release(current_, state.arrived);
    state.bytes += bytes;
    --state.missing;
    complete_if_due(static_cast<size_t>(static_cast<char*>(mbarrier) - shared_));
}

void Executor::complete_if_due(size_t offset) {
    Mbarrier& state = mbarriers_.at(offset);
    if (!state.completes()) return;
    if (state.on_the_way != 0) {
        fail(
            format("phase %d of mbarrier %d is complete while %lld bytes are on their way to it: "
                   "it must expect the bytes of all copies",
                   state.phase, state.index, static_cast<long long>(state.on_the_way)));
    }
    int const parity = state.phase % 2;
    state.complete_phase();
    for (int thread = 0; thread < threads_count_; ++thread) {
        Thread const& waiting = threads_[static_cast<size_t>(thread)];
        if (waiting.exited || waiting.waits_at != kMbarrierWait || waiting.mbarrier != offset ||
            waiting.parity != parity) {
            continue;
        }
        if (launch_->detect_races) shadow_.acquire(thread, state.complete);
        wake(thread);
    }
}

void Executor::mbarrier_wait(void* mbarrier, int parity, Site site) {
    interrupt();
    Mbarrier const& state = mbarrier_at(mbarrier, kMbarrierWait, site);
    if (state.is_complete(parity)) {
        if (launch_->detect_races) shadow_.acquire(current_, state.complete);
        return;
    }
    wait(kMbarrierWait, site);
    Thread& thread = threads_[static_cast<size_t>(current_)];
    thread.mbarrier = static_cast<size_t>(static_cast<char*>(mbarrier) - shared_);
    thread.parity = parity;
    run_next();
}

void Executor::copy_bulk(void* shared, void const* global, int bytes, void* mbarrier, Site site) {
    interrupt();
    if (bytes <= 0 || bytes % 16 != 0) {
        fail(format("copy_bulk of %d bytes: it must be a multiple of 16", bytes) + at(site));
    }
    Mbarrier& state = mbarrier_at(mbarrier, "copy_bulk", site);
    auto const* const from = static_cast<char const*>(global);
    for (int i = 0; i < bytes; i += 16) {
        check_global(from + i, 16, false, "copy_bulk from global memory", site);
    }
    auto const offset = static_cast<size_t>(static_cast<char*>(mbarrier) - shared_);
    issue({static_cast<char*>(shared), from, bytes, offset, state.phase, site}, state);
}

void Executor::copy_tensor(void* shared, void const* map, int const* at, int dims, void* mbarrier,
                           Site site) {
    interrupt();
    Mbarrier& state = mbarrier_at(mbarrier, "copy_tensor", site);
    // In global memory a map would need a fence of its own before it is used.
    auto const* const params = reinterpret_cast<char const*>(params_.data());
    auto const place = static_cast<char const*>(map) - params;
    TensorMap decoded;
    if (place < 0 || place % static_cast<ptrdiff_t>(TensorMap::kAlignment) != 0 ||
        place + TensorMap::kBytes > launch_->entry.params_bytes || !decoded.decode(map)) {
        fail("copy_tensor by what is no tensor map among the parameters, 64-byte aligned" +
             sage::host::at(site));
    }
    if (decoded.rank() != dims) {
        fail(format("copy_tensor at %d coordinates of a tensor of %d dims", dims, decoded.rank()) +
             sage::host::at(site));
    }
    auto* const to = static_cast<char*>(shared);
    if ((to - shared_) % 128 != 0) {
        fail(format("copy_tensor to offset %td of shared memory: it must be a multiple of 128",
                    to - shared_) +
             sage::host::at(site));
    }
    auto const box = std::make_shared<TensorBox const>(decoded, at);
    for (int64_t index = 0; index < box->rows(); ++index) {
        TensorBox::Row const row = box->row(index);
        check_span(row.from, row.from + (row.end - row.begin), "copy_tensor from global memory",
                   site);
    }
    auto const offset = static_cast<size_t>(static_cast<char*>(mbarrier) - shared_);
    issue({to, nullptr, decoded.box_bytes(), offset, state.phase, site, box}, state);
}

// To shared memory, of whole units of 16 bytes; a swizzle stays within them all.
void Executor::issue(BulkCopy copy, Mbarrier& state) {
    std::string const operation = std::string(copy.name()) + " to shared memory";
    for (char* to = copy.to; to < copy.to + copy.bytes; to += 16) {
        check_shared(to, 16, operation.c_str(), copy.site);
        check_no_mbarrier(to, 16, copy.name(), copy.site);
        if (launch_->detect_races) {
            check_race(shadow_.issue_bulk(static_cast<size_t>(to - shared_), current_), to,
                       copy.name(), copy.site);
        }
    }
    state.on_the_way += copy.bytes;
    bulk_copies_.push_back(std::move(copy));
}

// A bulk copy has come, and its mbarrier is told.
void Executor::land(size_t index) {
    BulkCopy const copy = bulk_copies_[index];
    bulk_copies_.erase(bulk_copies_.begin() + static_cast<ptrdiff_t>(index));
    Mbarrier& state = mbarriers_.at(copy.mbarrier);
    if (state.phase != copy.phase) {
        fail(format("%s of %d bytes lands in phase %d of mbarrier %d, which did not expect it: it "
                    "was issued in phase %d",
                    copy.name(), copy.bytes, state.phase, state.index, copy.phase) +
             at(copy.site));
    }
    auto const offset = static_cast<size_t>(copy.to - shared_);
    if (copy.box == nullptr) {
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    } else {
        copy.box->copy(shared_, offset);
    }
    if (launch_->detect_races) {
        for (size_t i = 0; i < static_cast<size_t>(copy.bytes); i += 16) {
            shadow_.land_bulk(offset + i, state.index);
        }
        shadow_.release_bulk(state.index, state.arrived);
    }
    state.on_the_way -= copy.bytes;
    state.bytes -= copy.bytes;
    complete_if_due(copy.mbarrier);
}

void Executor::fence_async() {
    if (launch_->detect_races) shadow_.fence(current_);
}

void Executor::named_barrier(int id, int threads, bool waits, Site site) {
    interrupt();
    if (id < 1 || id >= kNamedBarriers || threads < kLanes || threads % kLanes != 0) {
        fail(format("named_barrier %d of %d threads: it must be 1 to 15, of whole warps", id,
                    threads) +
             at(site));
    }
    NamedBarrier& state = named_[id];
    if (state.threads != 0 && state.threads != threads) {
        fail(format("named_barrier %d of %d threads, to which others came as of %d", id, threads,
                    state.threads) +
             at(site));
    }
    state.threads = threads;
    if (launch_->detect_races) shadow_.release(current_, state.clock);
    if (waits) state.waiting.push_back(current_);
    bool const last = ++state.arrived == threads;
    if (waits) wait(kNamedBarrier, site);
    if (last) {
        for (int const thread : state.waiting) {
            if (launch_->detect_races) shadow_.acquire(thread, state.clock);
            wake(thread);
        }
        state.waiting.clear();
        state.threads = state.arrived = 0;
    }
    if (waits) run_next();
}

void Executor::set_registers(int registers, Site site) {
    if (registers < 24 || registers > 256 || registers % 8 != 0) {
        fail(format("setmaxnreg to %d: it must be a multiple of 8 from 24 to 256", registers) +
             at(site));
    }
    warps_[static_cast<size_t>(current_ / kLanes)].registers = registers;
}

// The operations of wgmma. Its reads begin when it is issued and end when it is waited for; what it
// computes comes then too.
void Executor::perform_wgmma(Warp& warp, Site site) {
    int const index = current_ / kLanes;
    std::string problem;
    switch (warp.operation) {
        case Collective::kWgmma: {
            if (launch_->detect_races) shadow_.collective(index);
            Wgmma* lanes[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                lanes[lane] = static_cast<Wgmma*>(warp.arguments[lane]);
            }
            problem = warp.products.issue(lanes, index, site);
            if (!problem.empty()) break;
            for (size_t const unit : warp.products.newest_units()) {
                check_shared(shared_ + unit, 16, "wgmma", site);
                if (!launch_->detect_races) continue;
                check_race(shadow_.begin_read(unit, index), shared_ + unit, "wgmma", site);
            }
            break;
        }
        case Collective::kWgmmaFence:
            warp.products.fence();
            break;
        case Collective::kWgmmaCommit:
            problem = warp.products.commit();
            break;
        default: {
            std::vector<size_t> read;
            int const newest = static_cast<WgmmaWait*>(warp.arguments[0])->newest;
            problem = warp.products.wait(newest, shared_, read);
            if (!launch_->detect_races) break;
            for (size_t const unit : read) shadow_.end_read(unit, index);
            shadow_.collective(index);
        }
    }
    if (!problem.empty()) fail(std::string(name_of(warp.operation)) + at(site) + ": " + problem);
}

void Executor::check_end_of_block() {
    auto const end = [&](std::string const& what) {
        failure_ = format("block %lld: ", static_cast<long long>(block_)) + what;
    };
    auto const awaited = [](Thread const& thread) { return thread.awaited_prerequisites; };
    if (launch_->dependent && std::none_of(threads_.begin(), threads_.end(), awaited)) {
        return end(
            "it ends without await_prerequisites: whoever waits for this launch would not "
            "have waited for those before it");
    }
    if (!bulk_copies_.empty()) {
        return end("it ends while a bulk copy is in flight" + at(bulk_copies_.front().site) +
                   ": the kernel must wait for all of its copies");
    }
    for (int id = 1; id < kNamedBarriers; ++id) {
        if (named_[id].arrived == 0) continue;
        return end(
            format("it ends with %d of %d threads at named_barrier %d: whoever arrives must "
                   "be waited for",
                   named_[id].arrived, named_[id].threads, id));
    }
    int64_t registers = 0;
    for (size_t warp = 0; warp < warps_.size(); ++warp) {
        Warp const& of_group = warps_[warp - warp % kWarpgroup];
        if (warps_[warp].products.history() != of_group.products.history()) {
            return end(
                format("warps %zu and %zu of a warpgroup differ in the products that they "
                       "issued",
                       warp - warp % kWarpgroup, warp));
        }
        if (warps_[warp].registers != of_group.registers) {
            return end(format("warps %zu and %zu of a warpgroup differ in their setmaxnreg",
                              warp - warp % kWarpgroup, warp));
        }
        registers += int64_t{warps_[warp].registers} * kLanes;
    }
    if (registers > kRegisters) {
        end(format("setmaxnreg asks for %lld registers; there are %lld",
                   static_cast<long long>(registers), static_cast<long long>(kRegisters)));
    }
}

void Executor::check_shared(void const* address, int bytes, char const* operation, Site site) {
    auto const offset = static_cast<char const*>(address) - shared_;
    if (offset < 0 || offset > shared_bytes_ - bytes) {
        fail(format("%s of %d bytes at offset %td is outside of the block's %lld bytes of shared "
                    "memory",
                    operation, bytes, offset, static_cast<long long>(shared_bytes_)) +
             at(site));
    }
    if (offset % bytes != 0) {
        fail(format("%s of %d bytes at offset %td of shared memory is misaligned", operation, bytes,
                    offset) +
             at(site));
    }
}

void Executor::check_global(void const* address, int bytes, bool store, char const* operation,
                            Site site) {
    check_place(address, bytes, store, operation, site);
    if (!launch_->detect_races) return;
    auto const begin = reinterpret_cast<uintptr_t>(address);
    auto const size = static_cast<uintptr_t>(bytes);
    if (store) {
        stores_.add(begin, size, publications_.now(current_));
    } else if (stores_.any(begin, size)) {
        fail(format("race between %s of %d bytes at %p and a store of the same launch: blocks run "
                    "in any order, and a device loads through a cache that is not kept coherent",
                    operation, bytes, address) +
             at(site));
    }
}

// Loads of as many bytes as alignment and length give.
void Executor::check_span(char const* begin, char const* end, char const* operation, Site site) {
    while (begin != end) {
        int bytes = 16;
        while (reinterpret_cast<uintptr_t>(begin) % static_cast<uintptr_t>(bytes) != 0 ||
               bytes > end - begin) {
            bytes /= 2;
        }
        check_global(begin, bytes, false, operation, site);
        begin += bytes;
    }
}

// That it is aligned, and in memory that the kernel may touch; it counts.
void Executor::check_place(void const* address, int bytes, bool store, char const* operation,
                           Site site) {
    auto const begin = reinterpret_cast<uintptr_t>(address);
    auto const size = static_cast<uintptr_t>(bytes);
    if (begin % size != 0) {
        fail(format("%s of %d bytes at %p is misaligned", operation, bytes, address) + at(site));
    }
    if (!launch_->ranges->empty()) check_range(begin, size, store, operation, site);
    check_prerequisites(begin, size, store, operation, site);
    if (launch_->bytes != nullptr) traffic_.add(begin, size, store);
}

// Before a thread has awaited them, launches that this one depends on may be about to do anything.
void Executor::check_prerequisites(uintptr_t begin, size_t size, bool store, char const* operation,
                                   Site site) {
    if (!launch_->dependent || threads_[static_cast<size_t>(current_)].awaited_prerequisites)
        return;
    if (store) {
        fail(format("%s of %zu bytes at %#zx before await_prerequisites: a launch that this one "
                    "depends on may still load or store there",
                    operation, size, begin) +
             at(site));
    }
    if (prerequisites_.stored(begin, size)) {
        fail(format("race between %s of %zu bytes at %#zx and a store of a launch that this one "
                    "depends on: missing await_prerequisites",
                    operation, size, begin) +
             at(site));
    }
}

// A device may load earlier than the program says what it is told that nobody stores to.
void Executor::check_not_stored_before(void const* address, int bytes, Site site) {
    if (!prerequisites_.stored(reinterpret_cast<uintptr_t>(address), static_cast<size_t>(bytes))) {
        return;
    }
    fail(
        format("load_global of %d bytes at %p, which a launch has stored that this one depends on: "
               "it must be load_written, which stays behind await_prerequisites",
               bytes, address) +
        at(site));
}

void Executor::check_published(void const* address, int bytes, Site site) {
    check_place(address, bytes, false, "load_written", site);
    auto const begin = reinterpret_cast<uintptr_t>(address);
    auto const size = static_cast<uintptr_t>(bytes);
    if (!launch_->detect_races || stores_.visible(begin, size, publications_, current_)) return;
    fail(format("race between load_written of %d bytes at %p and a store of the same launch: "
                "missing arrive or await, or a barrier before the one or after the other",
                bytes, address) +
         at(site));
}

void Executor::check_range(uintptr_t begin, uintptr_t size, bool store, char const* operation,
                           Site site) {
    std::vector<Range> const& ranges = *launch_->ranges;
    bool read_only = false;
    for (size_t i = 0; i < ranges.size(); ++i) {
        size_t const index = (last_range_ + i) % ranges.size();
        Range const& range = ranges[index];
        if (begin < range.begin || begin + size > range.end) continue;
        if (!store || range.writable) {
            last_range_ = index;
            return;
        }
        read_only = true;
    }
    if (read_only) {
        fail(format("%s of %zu bytes at %#zx writes to read-only memory", operation, size, begin) +
             at(site));
    }
    std::string nearest;
    for (Range const& range : ranges) {
        if (begin >= range.end && begin - range.end < 4096) {
            nearest = format(", %zu bytes after the end of [%#zx, %#zx)", begin - range.end,
                             range.begin, range.end);
        } else if (begin < range.begin && range.begin - begin < 4096) {
            nearest = format(", %zu bytes before the begin of [%#zx, %#zx)", range.begin - begin,
                             range.begin, range.end);
        }
    }
    fail(format("%s of %zu bytes at %#zx is outside of the memory that the kernel may touch",
                operation, size, begin) +
         nearest + at(site));
}

void Executor::check_race(Conflict conflict, void const* address, char const* operation,
                          Site site) {
    if (!conflict) return;
    std::string other;
    switch (conflict.other) {
        case Conflict::Other::kThread:
            other = name(conflict.index);
            break;
        case Conflict::Other::kWarp:
            other = format("several lanes of warp %d", conflict.index);
            break;
        case Conflict::Other::kSeveralWarps:
            other = "several warps";
            break;
        case Conflict::Other::kMbarrier:
            other = format("mbarrier %d", conflict.index);
            break;
    }
    std::string what;
    switch (conflict.kind) {
        case Conflict::Kind::kNone:
            return;
        case Conflict::Kind::kRead:
            what = "reading by " + other + ": missing barrier";
            break;
        case Conflict::Kind::kWrite:
            what = "writing by " + other + ": missing barrier";
            break;
        case Conflict::Kind::kLandedCopy:
            what = "an asynchronous copy of " + other + " that has landed: missing barrier";
            break;
        case Conflict::Kind::kCopyInFlight:
            what = "an asynchronous copy of " + other + " in flight: missing wait";
            break;
        case Conflict::Kind::kProductInFlight:
            what = "a product of wgmma of " + other + " in flight: missing wait";
            break;
        case Conflict::Kind::kNotFenced:
            what = "writing by " + other + ": missing fence_async before what orders them";
            break;
    }
    fail(format("race between %s at offset %td of shared memory", operation,
                static_cast<char const*>(address) - shared_) +
         at(site) + " and " + what);
}

void Executor::check_redzones() {
    auto const intact = [](char const* begin) {
        return std::all_of(begin, begin + kRedzone,
                           [](char byte) { return byte == static_cast<char>(kRedzoneByte); });
    };
    if (intact(shared_ - kRedzone) && intact(shared_ + shared_bytes_)) return;
    failure_ =
        format("block %lld: the memory %s its shared memory was written to, by a raw pointer",
               static_cast<long long>(block_), intact(shared_ - kRedzone) ? "after" : "before");
}

// Leaves the kernel for good. The threads' stacks are abandoned as they are, without destructors: a
// failure leaks the few strings that made its message.
void Executor::fail(std::string const& what) {
    failure_ =
        format("block %lld, ", static_cast<long long>(block_)) + name(current_) + ": " + what;
    Context abandoned;
    switch_context(abandoned, host_);
    __builtin_unreachable();
}

std::string Executor::name(int thread) const {
    return format("thread %d (warp %d, lane %d)", thread, thread / kLanes, thread % kLanes);
}

// Who waits for whom: the first thread of each operation that threads wait at.
std::string Executor::deadlock() const {
    std::string text = "deadlock: nobody can run;";
    std::vector<Thread const*> told;
    for (int thread = 0; thread < threads_count_; ++thread) {
        Thread const& state = threads_[static_cast<size_t>(thread)];
        if (state.exited || told.size() == 8) continue;
        bool const new_place = std::none_of(told.begin(), told.end(), [&](Thread const* other) {
            return state.waits_at == other->waits_at && same(state.site, other->site);
        });
        if (!new_place) continue;
        text += (told.empty() ? " " : ", ") + name(thread) + " waits at " + state.waits_at +
                at(state.site);
        if (state.waits_at == kMbarrierWait) {
            Mbarrier const& mbarrier = mbarriers_.at(state.mbarrier);
            text += format(" for parity %d of mbarrier %d: ", state.parity, mbarrier.index) +
                    mbarrier.text();
        }
        told.push_back(&state);
    }
    return text;
}

Executor& running() { return *Executor::running; }

}  // namespace

std::string execute(Launch const& launch) {
    static thread_local Executor executor;
    return executor.execute(launch);
}

Runtime const kRuntime = {
    [] { return running().thread_index(); },
    [] { return running().block_index(); },
    [] { return running().grid_size(); },
    [] { return running().shared_memory(); },
    [](Site site) { running().barrier(site); },
    [](Access access, void const* address, int bytes, Site site) {
        running().access(access, address, bytes, site);
    },
    [](uint32_t* counter, Site site) { return running().take_ticket(counter, site); },
    [](uint32_t* counter, Site site) { return running().arrive(counter, site); },
    [](uint32_t const* counter, uint32_t arrivals, Site site) {
        running().await(counter, arrivals, site);
    },
    [](Site) { running().await_prerequisites(); },
    [](void* shared, void const* global, Site site) { running().copy_async(shared, global, site); },
    [] { running().copy_async_commit(); },
    [](int newest) { running().copy_async_wait(newest); },
    [](Collective operation, void* argument, Site site) {
        running().collective(operation, argument, site);
    },
    [](void* mbarrier, int arrivals, Site site) {
        running().mbarrier_init(mbarrier, arrivals, site);
    },
    [](void* mbarrier, int bytes, Site site) { running().mbarrier_arrive(mbarrier, bytes, site); },
    [](void* mbarrier, int parity, Site site) { running().mbarrier_wait(mbarrier, parity, site); },
    [](void* shared, void const* global, int bytes, void* mbarrier, Site site) {
        running().copy_bulk(shared, global, bytes, mbarrier, site);
    },
    [](void* shared, void const* map, int const* at, int dims, void* mbarrier, Site site) {
        running().copy_tensor(shared, map, at, dims, mbarrier, site);
    },
    [](Site) { running().fence_async(); },
    [](int id, int threads, bool waits, Site site) {
        running().named_barrier(id, threads, waits, site);
    },
    [](int registers, Site site) { running().set_registers(registers, site); },
};

}  // namespace sage::host
