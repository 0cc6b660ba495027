// How many bytes of global memory a launch loads and stores, in sectors of 32 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>
#include <unordered_set>

namespace sage::host {

struct Bytes {
    int64_t loaded = 0;       // by each block, what it loads repeatedly once
    int64_t loaded_once = 0;  // by the launch, what blocks load repeatedly once
    int64_t stored = 0;       // by the launch, once
    int64_t streamed = 0;     // of these, by store_streaming
    int64_t missed = 0;       // of what blocks load, not in the cache that is followed
};

// A cache whose least recently used sectors leave first, and before all others those that were
// stored streaming. What is stored takes room as what is loaded.
class Cache {
 public:
    // An empty one.
    void begin(int64_t bytes) {
        sectors_ = static_cast<size_t>(bytes) / kSector;
        kept_.clear();
        streamed_.clear();
        places_.clear();
    }

    static constexpr uintptr_t kSector = 32;

    // Whether it was there.
    bool touch(uintptr_t sector) {
        bool const hit = forget(sector);
        if (places_.size() == sectors_) {
            std::list<uintptr_t> const& leaving = streamed_.empty() ? kept_ : streamed_;
            if (leaving.empty()) return false;  // there is no cache
            forget(leaving.back());
        }
        put(sector, kept_);
        return hit;
    }

    // It leaves before others.
    void stream(uintptr_t sector) {
        if (forget(sector)) put(sector, streamed_);
    }

 private:
    struct Place {
        std::list<uintptr_t>* list;
        std::list<uintptr_t>::iterator at;
    };

    void put(uintptr_t sector, std::list<uintptr_t>& list) {
        list.push_front(sector);
        places_[sector] = {&list, list.begin()};
    }

    bool forget(uintptr_t sector) {
        auto const found = places_.find(sector);
        if (found == places_.end()) return false;
        found->second.list->erase(found->second.at);
        places_.erase(found);
        return true;
    }

    size_t sectors_ = 0;
    std::list<uintptr_t> kept_, streamed_;  // the newest first
    std::unordered_map<uintptr_t, Place> places_;
};

class Traffic {
 public:
    // `cache`: the bytes of the one that is followed.
    void begin_launch(int64_t cache) {
        loaded_.clear();
        stored_.clear();
        streamed_.clear();
        bytes_ = {};
        cache_.begin(cache);
    }

    void begin_block() { loaded_by_block_.clear(); }

    void add(uintptr_t address, size_t bytes, bool store) {
        for_sectors(address, bytes, [&](uintptr_t sector) {
            if (store) {
                if (stored_.insert(sector).second) bytes_.stored += Cache::kSector;
                cache_.touch(sector);
                return;
            }
            if (!loaded_by_block_.insert(sector).second) return;
            bytes_.loaded += Cache::kSector;
            if (loaded_.insert(sector).second) bytes_.loaded_once += Cache::kSector;
            if (!cache_.touch(sector)) bytes_.missed += Cache::kSector;
        });
    }

    // What has just been stored was so by store_streaming.
    void stream(uintptr_t address, size_t bytes) {
        for_sectors(address, bytes, [&](uintptr_t sector) {
            if (streamed_.insert(sector).second) bytes_.streamed += Cache::kSector;
            cache_.stream(sector);
        });
    }

    Bytes bytes() const { return bytes_; }

 private:
    template <class Visit>
    static void for_sectors(uintptr_t address, size_t bytes, Visit visit) {
        uintptr_t const end = (address + bytes - 1) / Cache::kSector;
        for (uintptr_t sector = address / Cache::kSector; sector <= end; ++sector) visit(sector);
    }

    std::unordered_set<uintptr_t> loaded_by_block_, loaded_, stored_, streamed_;
    Cache cache_;
    Bytes bytes_;
};

}  // namespace sage::host
