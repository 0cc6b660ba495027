#include "shadow.hpp"

#include <algorithm>

namespace sage::host {

namespace {

constexpr uint32_t kLanded = 1 << 11;
constexpr uint32_t kAgent = kLanded - 1;
constexpr uint32_t kSeveralLanes = 1024;
constexpr uint32_t kSeveralWarps = kSeveralLanes + 32;
constexpr uint32_t kEndOfTime = 1 << 20;

uint32_t warp_of(uint32_t agent) {
    return agent < kSeveralLanes ? agent / 32 : agent - kSeveralLanes;
}

}  // namespace

void Shadow::reset(size_t bytes) {
    writes_.assign(bytes, 0);
    reads_.assign(bytes, 0);
    in_flight_.assign((bytes + 15) / 16, 0);
    now_ = kEndOfTime;
    barrier();
}

// Time starts over: the epoch's accesses so far are forgotten.
void Shadow::restart() {
    std::fill(writes_.begin(), writes_.end(), 0);
    std::fill(reads_.begin(), reads_.end(), 0);
    std::fill(std::begin(collective_), std::end(collective_), 0);
    now_ = 1;
    epoch_ = tag(0);
}

void Shadow::barrier() {
    // Rather now, when nothing is lost, than amid an epoch.
    if (++now_ >= kEndOfTime / 2) restart();
    epoch_ = tag(0);
    std::fill(std::begin(collective_), std::end(collective_), now_);
}

void Shadow::collective(int warp) {
    if (++now_ >= kEndOfTime) restart();
    collective_[warp] = now_;
}

// Whether an access by `agent` now, and an earlier one, one of them a write, are unordered.
bool Shadow::races(Tag earlier, uint32_t agent) const {
    if (earlier < epoch_) return false;
    uint32_t const other = earlier & kAgent;
    if (other == agent) return false;
    if ((earlier & kLanded) != 0 || warp_of(other) != warp_of(agent)) return true;
    return earlier >> 12 >= collective_[warp_of(agent)];
}

// The tag of a byte that was read, after one more read. It stands for every earlier read of the
// epoch that a later write could race with.
Shadow::Tag Shadow::merged(Tag earlier, uint32_t reader) const {
    uint32_t const other = earlier & kAgent;
    if (earlier < epoch_ || other == reader) return tag(reader);
    if (warp_of(other) != warp_of(reader)) return tag(kSeveralWarps);
    bool const ordered = earlier >> 12 < collective_[warp_of(reader)];
    return tag(ordered ? reader : kSeveralLanes + warp_of(reader));
}

Conflict Shadow::first_race(std::vector<Tag> const& tags, size_t offset, size_t bytes,
                            uint32_t agent, Conflict::Kind kind) const {
    Tag newest = 0;
    for (size_t i = offset; i < offset + bytes; ++i) newest = std::max(newest, tags[i]);
    if (newest < epoch_) return {};
    for (size_t i = offset; i < offset + bytes; ++i) {
        if (!races(tags[i], agent)) continue;
        uint32_t const other = tags[i] & kAgent;
        if ((tags[i] & kLanded) != 0) kind = Conflict::Kind::kLandedCopy;
        if (other < kSeveralLanes) {
            return {kind, Conflict::Other::kThread, static_cast<int>(other)};
        }
        if (other == kSeveralWarps) return {kind, Conflict::Other::kSeveralWarps, 0};
        return {kind, Conflict::Other::kWarp, static_cast<int>(warp_of(other))};
    }
    return {};
}

Conflict Shadow::read_by(size_t offset, size_t bytes, uint32_t agent) {
    if (uint16_t const copier = in_flight_[offset / 16]; copier != 0) {
        return {Conflict::Kind::kCopyInFlight, Conflict::Other::kThread, copier - 1};
    }
    Conflict const race = first_race(writes_, offset, bytes, agent, Conflict::Kind::kWrite);
    if (race) return race;
    for (size_t i = offset; i < offset + bytes; ++i) reads_[i] = merged(reads_[i], agent);
    return {};
}

Conflict Shadow::read(size_t offset, size_t bytes, int thread) {
    return read_by(offset, bytes, static_cast<uint32_t>(thread));
}

Conflict Shadow::read_row(size_t offset, int warp) {
    return read_by(offset, 16, kSeveralLanes + static_cast<uint32_t>(warp));
}

Conflict Shadow::write(size_t offset, size_t bytes, int thread) {
    auto const agent = static_cast<uint32_t>(thread);
    if (uint16_t const copier = in_flight_[offset / 16]; copier != 0) {
        return {Conflict::Kind::kCopyInFlight, Conflict::Other::kThread, copier - 1};
    }
    Conflict race = first_race(writes_, offset, bytes, agent, Conflict::Kind::kWrite);
    if (!race) race = first_race(reads_, offset, bytes, agent, Conflict::Kind::kRead);
    if (race) return race;
    std::fill_n(writes_.begin() + static_cast<ptrdiff_t>(offset), bytes, tag(agent));
    return {};
}

Conflict Shadow::issue_copy(size_t offset, int thread) {
    Conflict const race = write(offset, 16, thread);
    if (!race) in_flight_[offset / 16] = static_cast<uint16_t>(thread + 1);
    return race;
}

void Shadow::land_copy(size_t offset, int thread) {
    in_flight_[offset / 16] = 0;
    std::fill_n(writes_.begin() + static_cast<ptrdiff_t>(offset), 16,
                tag(kLanded | static_cast<uint32_t>(thread)));
}

}  // namespace sage::host
