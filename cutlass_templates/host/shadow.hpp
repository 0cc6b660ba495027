// The race detector: what was last done to each byte of a block's shared memory, and by whom.
//
// Time is counted in ticks of a clock that every barrier and every warp collective advances. Two
// accesses to a byte by different threads, one of them a write, are a race unless a barrier lies
// between them, or, within one warp, a warp collective. What an asynchronous copy wrote takes a
// barrier even within a warp, and between its issue and its landing nobody may touch it.
// So a race is found in whatever order the threads happen to run.
//
// What orders some threads only, an mbarrier or a named barrier, hands knowledge on: the Clock of
// whoever releases is joined into that of whoever acquires, and an access is ordered before those
// of everybody whose clock has come to it (vector clocks). Copies that signal an mbarrier are
// accesses by that mbarrier, products of wgmma reads by their warp, from issue to wait.
//
// It costs 8 bytes for each of shared memory, and an eighth of the time of an attention kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sage::host {

// With what an access conflicts.
struct Conflict {
    enum class Kind {
        kNone,
        kRead,
        kWrite,
        kLandedCopy,
        kCopyInFlight,
        kProductInFlight,  // of wgmma, which reads
        kNotFenced,        // written by a thread, and not yet there for asynchronous units
    };
    enum class Other { kThread, kWarp, kSeveralWarps, kMbarrier };
    Kind kind = Kind::kNone;
    Other other = Other::kThread;
    int index = 0;  // of the other thread, warp or mbarrier

    explicit operator bool() const { return kind != Kind::kNone; }
};

// The time up to which the accesses of each agent are known to have happened.
using Clock = std::vector<uint32_t>;

// Offsets and sizes are of naturally aligned accesses of 1 to 16 bytes inside of the memory.
class Shadow {
 public:
    // Forgets everything; for memory of `bytes`.
    void reset(size_t bytes);

    void barrier();
    void collective(int warp);

    Conflict read(size_t offset, size_t bytes, int thread);
    // The row of a matrix, which the whole warp reads.
    Conflict read_row(size_t offset, int warp);
    Conflict write(size_t offset, size_t bytes, int thread);
    Conflict issue_copy(size_t offset, int thread);
    void land_copy(size_t offset, int thread);

    // With what the write of what is there is unordered, for an operation of its own kind on it.
    Conflict unordered_write(size_t offset, size_t bytes, int thread) const {
        return first_race(writes_, offset, bytes, static_cast<uint32_t>(thread),
                          Conflict::Kind::kWrite);
    }

    // What orders some threads, from the first release on. `mbarrier` is an index below 512.
    void release(int thread, Clock& into);
    void acquire(int thread, Clock const& from);
    // What the lanes of a warp have acquired is the warp's from now on.
    void gather(int warp);

    // A copy of 16 bytes by an asynchronous unit, which then signals an mbarrier.
    Conflict issue_bulk(size_t offset, int thread) { return issue_copy(offset, thread); }
    void land_bulk(size_t offset, int mbarrier);
    // For whoever waits for the phase of the mbarrier that the landing belongs to.
    void release_bulk(int mbarrier, Clock& into);

    // 16 bytes that a product of the warp reads from now until end_read.
    Conflict begin_read(size_t offset, int warp);
    void end_read(size_t offset, int warp);
    // What the thread has written is there for asynchronous units from now on.
    void fence(int thread);

 private:
    // A tag is the time of an access (20 bits), whether it was a copy's landing (1), and an agent
    // (11): a thread, kSeveralLanes + a warp, kSeveralWarps, or kMbarrier + an mbarrier.
    using Tag = uint32_t;

    // One of several unordered reads of a unit of 16 bytes.
    struct Reader {
        Tag tag;
        uint16_t bytes;  // a bit for each
    };

    Tag tag(uint32_t agent) const { return now_ << 12 | agent; }
    bool races(Tag earlier, uint32_t agent) const;
    Tag merged(Tag earlier, uint32_t reader) const;
    Conflict first_race(std::vector<Tag> const& tags, size_t offset, size_t bytes, uint32_t agent,
                        Conflict::Kind kind) const;
    Conflict read_by(size_t offset, size_t bytes, uint32_t agent);
    Conflict race_with_readers(size_t offset, size_t bytes, uint32_t agent) const;
    void add_reader(size_t offset, size_t bytes, uint32_t agent);
    bool knows(uint32_t agent, Tag earlier) const;
    Conflict conflict(Conflict::Kind kind, Tag earlier) const;
    void restart();

    std::vector<Tag> writes_, reads_;  // of each byte
    std::vector<uint16_t> in_flight_;  // of each 16 bytes: 1 + the thread that copies to them
    uint32_t now_ = 1;
    Tag epoch_ = 0;                 // tags from here on are later than the last barrier
    uint32_t collective_[32] = {};  // the time of each warp's last collective

    // Of the orders among some threads only; empty until there is one.
    bool clocked_ = false;
    std::vector<Clock> of_warps_;    // what all lanes of a warp know
    std::vector<Clock> of_threads_;  // what a thread has acquired since its warp's last collective
    bool diverged_[32] = {};         // whether any lane of a warp has
    std::vector<std::vector<Reader>> readers_;  // of each 16 bytes
    std::vector<uint16_t> reading_;             // of each 16 bytes: products in flight that read it
    std::vector<uint16_t> reading_warp_;        // the warp of the last of these
    std::vector<uint32_t> fences_;              // the time of each thread's last fence
};

}  // namespace sage::host
