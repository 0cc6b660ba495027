#include "shadow.hpp"

#include <algorithm>

namespace sage::host {

namespace {

constexpr uint32_t kLanded = 1 << 11;
constexpr uint32_t kAgent = kLanded - 1;
constexpr uint32_t kSeveralLanes = 1024;
constexpr uint32_t kSeveralWarps = kSeveralLanes + 32;
constexpr uint32_t kMbarrier = kSeveralWarps + 1;
constexpr uint32_t kAgents = kMbarrier + 512;
static_assert(kAgents <= kAgent + 1);
constexpr uint32_t kEndOfTime = 1 << 20;
constexpr size_t kUnit = 16;  // bytes

uint16_t mask(size_t offset, size_t bytes) {
    return static_cast<uint16_t>(((1u << bytes) - 1) << offset % kUnit);
}

void join(Clock& into, Clock const& from) {
    if (from.empty()) return;
    if (into.empty()) into.assign(kAgents, 0);
    for (size_t i = 0; i < kAgents; ++i) into[i] = std::max(into[i], from[i]);
}

uint32_t warp_of(uint32_t agent) {
    return agent < kSeveralLanes ? agent / 32 : agent - kSeveralLanes;
}

}  // namespace

void Shadow::reset(size_t bytes) {
    writes_.assign(bytes, 0);
    reads_.assign(bytes, 0);
    in_flight_.assign((bytes + 15) / 16, 0);
    reading_.assign(in_flight_.size(), 0);
    reading_warp_.assign(in_flight_.size(), 0);
    readers_.assign(in_flight_.size(), {});
    fences_.assign(kSeveralLanes, 0);
    clocked_ = false;
    now_ = kEndOfTime;
    barrier();
}

// Time starts over: the epoch's accesses so far are forgotten.
void Shadow::restart() {
    std::fill(writes_.begin(), writes_.end(), 0);
    std::fill(reads_.begin(), reads_.end(), 0);
    std::fill(std::begin(collective_), std::end(collective_), 0);
    std::fill(fences_.begin(), fences_.end(), 0);
    for (auto& readers : readers_) readers.clear();
    of_warps_.assign(32, {});
    of_threads_.assign(kSeveralLanes, {});
    std::fill(std::begin(diverged_), std::end(diverged_), false);
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
    gather(warp);
}

void Shadow::gather(int warp) {
    if (!diverged_[warp]) return;
    diverged_[warp] = false;
    for (int lane = 0; lane < 32; ++lane) {
        Clock& own = of_threads_[static_cast<size_t>(warp * 32 + lane)];
        join(of_warps_[static_cast<size_t>(warp)], own);
        own.clear();
    }
}

// All that the thread knows, and its own accesses so far: of its warp's, those before the last
// collective.
void Shadow::release(int thread, Clock& into) {
    clocked_ = true;
    auto const warp = static_cast<size_t>(thread / 32);
    join(into, of_warps_[warp]);
    join(into, of_threads_[static_cast<size_t>(thread)]);
    if (into.empty()) into.assign(kAgents, 0);
    uint32_t const before = std::max(collective_[warp], 1u) - 1;
    for (size_t lane = warp * 32; lane < warp * 32 + 32; ++lane) {
        into[lane] = std::max(into[lane], before);
    }
    into[kSeveralLanes + warp] = std::max(into[kSeveralLanes + warp], before);
    into[static_cast<size_t>(thread)] = now_;
    if (++now_ >= kEndOfTime) {
        restart();
        std::fill(into.begin(), into.end(), 0);
    }
}

void Shadow::acquire(int thread, Clock const& from) {
    if (from.empty()) return;
    join(of_threads_[static_cast<size_t>(thread)], from);
    diverged_[thread / 32] = true;
}

bool Shadow::knows(uint32_t agent, Tag earlier) const {
    if (!clocked_) return false;
    uint32_t const other = earlier & kAgent, time = earlier >> 12;
    Clock const& of_warp = of_warps_[warp_of(agent)];
    if (!of_warp.empty() && of_warp[other] >= time) return true;
    if (agent >= kSeveralLanes) return false;
    Clock const& own = of_threads_[agent];
    return !own.empty() && own[other] >= time;
}

// Whether an access by `agent` now, and an earlier one, one of them a write, are unordered.
bool Shadow::races(Tag earlier, uint32_t agent) const {
    if (earlier < epoch_) return false;
    uint32_t const other = earlier & kAgent;
    if (other == agent || knows(agent, earlier)) return false;
    if ((earlier & kLanded) != 0 || other >= kSeveralWarps || warp_of(other) != warp_of(agent)) {
        return true;
    }
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
        if ((tags[i] & kLanded) != 0) kind = Conflict::Kind::kLandedCopy;
        return conflict(kind, tags[i]);
    }
    return {};
}

Conflict Shadow::conflict(Conflict::Kind kind, Tag earlier) const {
    uint32_t const other = earlier & kAgent;
    if (other < kSeveralLanes) return {kind, Conflict::Other::kThread, static_cast<int>(other)};
    if (other < kSeveralWarps) {
        return {kind, Conflict::Other::kWarp, static_cast<int>(warp_of(other))};
    }
    if (other == kSeveralWarps) return {kind, Conflict::Other::kSeveralWarps, 0};
    return {kind, Conflict::Other::kMbarrier, static_cast<int>(other - kMbarrier)};
}

// Where clocks order accesses, every unordered reader is remembered by itself.
void Shadow::add_reader(size_t offset, size_t bytes, uint32_t agent) {
    uint16_t const read = mask(offset, bytes);
    std::vector<Reader>& readers = readers_[offset / kUnit];
    size_t kept = 0;
    for (Reader const& reader : readers) {
        bool const again = (reader.tag & kAgent) == agent && reader.bytes == read;
        if (reader.tag >= epoch_ && !again) readers[kept++] = reader;
    }
    readers.resize(kept);
    readers.push_back({tag(agent), read});
}

Conflict Shadow::race_with_readers(size_t offset, size_t bytes, uint32_t agent) const {
    uint16_t const written = mask(offset, bytes);
    for (Reader const& reader : readers_[offset / kUnit]) {
        if ((reader.bytes & written) == 0 || !races(reader.tag, agent)) continue;
        return conflict(Conflict::Kind::kRead, reader.tag);
    }
    return {};
}

Conflict Shadow::read_by(size_t offset, size_t bytes, uint32_t agent) {
    if (uint16_t const copier = in_flight_[offset / 16]; copier != 0) {
        return {Conflict::Kind::kCopyInFlight, Conflict::Other::kThread, copier - 1};
    }
    Conflict const race = first_race(writes_, offset, bytes, agent, Conflict::Kind::kWrite);
    if (race) return race;
    if (clocked_) {
        add_reader(offset, bytes, agent);
    } else {
        for (size_t i = offset; i < offset + bytes; ++i) reads_[i] = merged(reads_[i], agent);
    }
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
    if (reading_[offset / kUnit] != 0) {
        return {Conflict::Kind::kProductInFlight, Conflict::Other::kWarp,
                reading_warp_[offset / kUnit]};
    }
    Conflict race = first_race(writes_, offset, bytes, agent, Conflict::Kind::kWrite);
    if (!race) race = first_race(reads_, offset, bytes, agent, Conflict::Kind::kRead);
    if (!race && clocked_) race = race_with_readers(offset, bytes, agent);
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

void Shadow::land_bulk(size_t offset, int mbarrier) {
    in_flight_[offset / kUnit] = 0;
    std::fill_n(writes_.begin() + static_cast<ptrdiff_t>(offset), kUnit,
                tag(kLanded | (kMbarrier + static_cast<uint32_t>(mbarrier))));
}

void Shadow::release_bulk(int mbarrier, Clock& into) {
    clocked_ = true;
    if (into.empty()) into.assign(kAgents, 0);
    into[kMbarrier + static_cast<uint32_t>(mbarrier)] = now_;
    if (++now_ >= kEndOfTime) {
        restart();
        std::fill(into.begin(), into.end(), 0);
    }
}

Conflict Shadow::begin_read(size_t offset, int warp) {
    auto const agent = kSeveralLanes + static_cast<uint32_t>(warp);
    if (uint16_t const copier = in_flight_[offset / kUnit]; copier != 0) {
        return {Conflict::Kind::kCopyInFlight, Conflict::Other::kThread, copier - 1};
    }
    Conflict const race = first_race(writes_, offset, kUnit, agent, Conflict::Kind::kWrite);
    if (race) return race;
    for (size_t i = offset; i < offset + kUnit; ++i) {
        uint32_t const writer = writes_[i] & kAgent;
        if (writes_[i] == 0 || writer >= kSeveralLanes || fences_[writer] > writes_[i] >> 12) {
            continue;
        }
        return {Conflict::Kind::kNotFenced, Conflict::Other::kThread, static_cast<int>(writer)};
    }
    ++reading_[offset / kUnit];
    reading_warp_[offset / kUnit] = static_cast<uint16_t>(warp);
    return {};
}

void Shadow::end_read(size_t offset, int warp) {
    --reading_[offset / kUnit];
    clocked_ = true;
    add_reader(offset, kUnit, kSeveralLanes + static_cast<uint32_t>(warp));
}

void Shadow::fence(int thread) {
    if (++now_ >= kEndOfTime) restart();
    fences_[static_cast<size_t>(thread)] = now_;
}

}  // namespace sage::host
