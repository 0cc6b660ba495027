// What a launch that depends on the one before it may not touch before it has awaited that.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stores.hpp"

namespace sage::host {

// The launches that may not have ended when a launch begins: the one before it in its stream, if it
// depends on that, the one before that, if that did, and so on. All of them were executed by the
// same host thread, one after another.
class Prerequisites {
 public:
    // Of the launch after one that stored `stores`, which it may take.
    void begin_launch(void const* stream, bool dependent, Stores& stores) {
        if (!dependent || stream != stream_) {
            stores_.clear();
        } else if (stores_.empty()) {
            stores_.swap(stores);
        } else {
            stores_.add(stores);
        }
        stream_ = stream;
    }

    // Whether any of these bytes is one that they stored.
    bool stored(uintptr_t address, size_t bytes) { return stores_.any(address, bytes); }

 private:
    void const* stream_ = nullptr;  // of the newest launch
    Stores stores_;
};

}  // namespace sage::host
