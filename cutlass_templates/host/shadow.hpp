// The race detector: what was last done to each byte of a block's shared memory, and by whom.
//
// Time is counted in ticks of a clock that every barrier and every warp collective advances. Two
// accesses to a byte by different threads, one of them a write, are a race unless a barrier lies
// between them, or, within one warp, a warp collective. What an asynchronous copy wrote takes a
// barrier even within a warp, and between its issue and its landing nobody may touch it.
// So a race is found in whatever order the threads happen to run.
//
// It costs 8 bytes for each of shared memory, and an eighth of the time of an attention kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sage::host {

// With what an access conflicts.
struct Conflict {
    enum class Kind { kNone, kRead, kWrite, kLandedCopy, kCopyInFlight };
    enum class Other { kThread, kWarp, kSeveralWarps };
    Kind kind = Kind::kNone;
    Other other = Other::kThread;
    int index = 0;  // of the other thread or warp

    explicit operator bool() const { return kind != Kind::kNone; }
};

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

 private:
    // A tag is the time of an access (20 bits), whether it was a copy's landing (1), and an agent
    // (11): a thread, kSeveralLanes + a warp, or kSeveralWarps.
    using Tag = uint32_t;

    Tag tag(uint32_t agent) const { return now_ << 12 | agent; }
    bool races(Tag earlier, uint32_t agent) const;
    Tag merged(Tag earlier, uint32_t reader) const;
    Conflict first_race(std::vector<Tag> const& tags, size_t offset, size_t bytes, uint32_t agent,
                        Conflict::Kind kind) const;
    Conflict read_by(size_t offset, size_t bytes, uint32_t agent);
    void restart();

    std::vector<Tag> writes_, reads_;  // of each byte
    std::vector<uint16_t> in_flight_;  // of each 16 bytes: 1 + the thread that copies to them
    uint32_t now_ = 1;
    Tag epoch_ = 0;                 // tags from here on are later than the last barrier
    uint32_t collective_[32] = {};  // the time of each warp's last collective
};

}  // namespace sage::host
