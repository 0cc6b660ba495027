// Which bytes of global memory a launch has stored to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sage::host {

// A hash table of 16-byte words. Accesses are naturally aligned and of 1 to 16 bytes.
class Stores {
 public:
    void clear() {
        slots_.assign(kFewest, {});
        used_ = 0;
    }

    void add(uintptr_t address, size_t bytes) {
        if (2 * (used_ + 1) > slots_.size()) grow();
        Slot& slot = find(address / 16);
        if (slot.mask == 0) ++used_;
        slot.word = address / 16;
        slot.mask |= mask(address, bytes);
    }

    // Whether any of these bytes was stored.
    bool any(uintptr_t address, size_t bytes) {
        return used_ > 0 && (find(address / 16).mask & mask(address, bytes)) != 0;
    }

 private:
    struct Slot {
        uintptr_t word = 0;
        uint16_t mask = 0;  // of its bytes; 0: the slot is free
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
