// How many bytes of global memory a launch loads and stores, in sectors of 32 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_set>

namespace sage::host {

struct Bytes {
    int64_t loaded = 0;       // by each block, what it loads repeatedly once
    int64_t loaded_once = 0;  // by the launch, what blocks load repeatedly once
    int64_t stored = 0;       // by the launch, once
};

class Traffic {
 public:
    void begin_launch() {
        loaded_.clear();
        stored_.clear();
        bytes_ = {};
    }

    void begin_block() { loaded_by_block_.clear(); }

    void add(uintptr_t address, size_t bytes, bool store) {
        for (uintptr_t sector = address / kSector; sector <= (address + bytes - 1) / kSector;
             ++sector) {
            if (store) {
                if (stored_.insert(sector).second) bytes_.stored += kSector;
                continue;
            }
            if (!loaded_by_block_.insert(sector).second) continue;
            bytes_.loaded += kSector;
            if (loaded_.insert(sector).second) bytes_.loaded_once += kSector;
        }
    }

    Bytes bytes() const { return bytes_; }

 private:
    static constexpr uintptr_t kSector = 32;

    std::unordered_set<uintptr_t> loaded_by_block_, loaded_, stored_;
    Bytes bytes_;
};

}  // namespace sage::host
