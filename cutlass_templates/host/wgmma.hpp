// The products of warpgroups, wgmma: a warp's quarter of each, from issue to wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <sage/host/runtime.hpp>
#include <string>
#include <vector>

#include "warp.hpp"

namespace sage::host {

// Rows of 32 bytes in shared memory, as a 64-bit matrix descriptor of PTX addresses them: K-major,
// which is the only order of 8-bit operands.
class MatrixRows {
 public:
    explicit MatrixRows(uint64_t descriptor);

    // What is wrong with the descriptor, or "".
    std::string problem() const;
    // The offset in shared memory of 16 bytes, `half` 0 or 1, of a row.
    size_t offset(int row, int half) const;

 private:
    uint32_t start_, leading_, stride_, base_;
    int row_bytes_;  // of the swizzle: 128, 64 or 32; 16 without one
};

// What one warp has issued. Results come to the registers at a wait, and no sooner: until then
// these hold kInFlight, and must not be touched.
class WarpProducts {
 public:
    static constexpr uint32_t kInFlight = 0x7fc0'dead;  // NaN, and a large integer

    // All functions return what is wrong, or "". The arguments are those of the lanes.
    std::string issue(Wgmma* const (&lanes)[kLanes], int warp, Site site);
    void fence() { fenced_ = true; }
    std::string commit();
    // Computes all but the newest groups from shared memory. The 16 bytes that they read are added
    // to `read`.
    std::string wait(int newest, char const* shared, std::vector<size_t>& read);

    // The 16 bytes that the newest product reads.
    std::vector<size_t> const& newest_units() const { return products_.back().units; }
    bool empty() const { return products_.empty(); }
    // Of all operations so far: the same for the four warps of a warpgroup.
    uint64_t history() const { return history_; }

 private:
    struct Registers {
        int words;
        uint32_t* of_lanes[kLanes];
        std::vector<uint32_t> values;  // (lanes, words)
        int pending;                   // products into them
    };
    struct Product {
        Wgmma of_lane_0;
        uint32_t const* a_of_lanes[kLanes];
        uint32_t a[kLanes][4];
        std::vector<size_t> units;  // offsets in shared memory: of A, if it is there, then of B
    };

    void remember(uint64_t what) { history_ = (history_ ^ what) * 0x9e37'79b9'7f4a'7c15; }
    std::string compute(Product const& product, char const* shared);
    Registers* registers_of(void const* lane_0);

    bool fenced_ = false;
    std::deque<Product> products_;  // oldest first
    std::deque<size_t> groups_;     // the number of products of each, oldest first
    size_t uncommitted_ = 0;
    std::vector<Registers> in_flight_;
    uint64_t history_ = 0;
};

}  // namespace sage::host
