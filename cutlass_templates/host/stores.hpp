// Which bytes of global memory a launch has stored to, and who.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "publication.hpp"

namespace sage::host {

// A hash table of 16-byte words. Accesses are naturally aligned and of 1 to 16 bytes.
class Stores {
 public:
    void clear() {
        slots_.assign(kFewest, {});
        used_ = 0;
    }
    bool empty() const { return used_ == 0; }
    void swap(Stores& other) {
        slots_.swap(other.slots_);
        std::swap(used_, other.used_);
    }

    void add(uintptr_t address, size_t bytes, Event const& event) {
        if (2 * (used_ + 1) > slots_.size()) grow();
        Slot& slot = find(address / 16);
        if (slot.mask == 0) ++used_;
        slot.word = address / 16;
        slot.mask |= mask(address, bytes);
        for (size_t at = address % 16 / 4; at <= (address % 16 + bytes - 1) / 4; ++at) {
            slot.newest[at] = event;
        }
    }

    void add(Stores const& others) {
        for (Slot const& slot : others.slots_) {
            if (slot.mask == 0) continue;
            if (2 * (used_ + 1) > slots_.size()) grow();
            Slot& own = find(slot.word);
            if (own.mask == 0) ++used_;
            own.word = slot.word;
            own.mask |= slot.mask;
        }
    }

    // Whether any of these bytes was stored.
    bool any(uintptr_t address, size_t bytes) {
        return used_ > 0 && (find(address / 16).mask & mask(address, bytes)) != 0;
    }

    // Whether a thread sees the newest of what was stored to these bytes, 4 or more.
    bool visible(uintptr_t address, size_t bytes, Publications const& publications, int thread) {
        if (!any(address, bytes)) return true;
        Slot const& slot = find(address / 16);
        for (size_t at = address % 16 / 4; at <= (address % 16 + bytes - 1) / 4; ++at) {
            bool const is_stored = (slot.mask >> 4 * at & 15) != 0;
            if (is_stored && !publications.visible(slot.newest[at], thread)) return false;
        }
        return true;
    }

 private:
    struct Slot {
        uintptr_t word = 0;
        uint16_t mask = 0;  // of its bytes; 0: the slot is free
        Event newest[4];    // of each 4 bytes
    };
    static constexpr size_t kFewest = 1024;

    static uint16_t mask(uintptr_t address, size_t bytes) {
        return static_cast<uint16_t>(((1u << bytes) - 1) << address % 16);
    }

    // The word's slot, or the free one where it would go.
    Slot& find(uintptr_t word) {
        size_t index = word * 0x9e37'79b9'7f4a'7c15 >> 20;
        for (;; ++index) {
            Slot& slot = slots_[index & (slots_.size() - 1)];
            if (slot.mask == 0 || slot.word == word) return slot;
        }
    }

    void grow() {
        std::vector<Slot> old(slots_.size() * 2);
        old.swap(slots_);
        for (Slot const& slot : old) {
            if (slot.mask != 0) find(slot.word) = slot;
        }
    }

    std::vector<Slot> slots_;
    size_t used_ = 0;
};

}  // namespace sage::host
