#include "wgmma.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <sage/host/convert.hpp>

namespace sage::host {

namespace {

constexpr int kRows = 16, kStepBytes = 32, kUnit = 16, kMostColumns = 256;

// PTX, "Matrix-descriptor format": addresses and offsets without their low 4 bits.
uint32_t field(uint64_t descriptor, int first, int bits) {
    return static_cast<uint32_t>(descriptor >> first & ((uint64_t{1} << bits) - 1));
}

constexpr int kRowBytes[] = {16, 128, 64, 32};  // by the swizzle mode

}  // namespace

MatrixRows::MatrixRows(uint64_t descriptor)
    : start_(field(descriptor, 0, 14) << 4),
      leading_(field(descriptor, 16, 14) << 4),
      stride_(field(descriptor, 32, 14) << 4),
      base_(field(descriptor, 49, 3)),
      row_bytes_(kRowBytes[field(descriptor, 62, 2)]) {}

std::string MatrixRows::problem() const {
    uint32_t const period = 8 * static_cast<uint32_t>(row_bytes_);
    if (base_ != 0) return "a base offset, where swizzled rows begin at their period";
    if (row_bytes_ == kUnit) return "";
    if (start_ % period >= static_cast<uint32_t>(row_bytes_)) {
        return "rows that begin at offset " + std::to_string(start_) + ", not at a multiple of " +
               std::to_string(period) + " bytes, the period of their swizzle";
    }
    if (start_ % static_cast<uint32_t>(row_bytes_) + kStepBytes >
        static_cast<uint32_t>(row_bytes_)) {
        return "a step beyond the end of its swizzled rows";
    }
    if (stride_ % period != 0) {
        return "a stride of " + std::to_string(stride_) + " bytes, not of a multiple of " +
               std::to_string(period);
    }
    return "";
}

size_t MatrixRows::offset(int row, int half) const {
    auto const r = static_cast<uint32_t>(row), h = static_cast<uint32_t>(half);
    if (row_bytes_ == kUnit) return start_ + r / 8 * stride_ + h * leading_ + r % 8 * kUnit;
    uint32_t const address =
        start_ + r / 8 * stride_ + r % 8 * static_cast<uint32_t>(row_bytes_) + h * kUnit;
    // A column of 16 bytes is XORed with the index of its line of 128 bytes.
    uint32_t const columns = static_cast<uint32_t>(row_bytes_) / kUnit;
    return address ^ (address >> 7 & (columns - 1)) << 4;
}

WarpProducts::Registers* WarpProducts::registers_of(void const* lane_0) {
    for (Registers& registers : in_flight_) {
        if (registers.of_lanes[0] == lane_0) return &registers;
    }
    return nullptr;
}

std::string WarpProducts::issue(Wgmma* const (&lanes)[kLanes], int warp, Site site) {
    Wgmma const& first = *lanes[0];
    if (!fenced_) {
        return "there is no wgmma_fence between it and what used its registers before";
    }
    if (first.columns < 8 || first.columns > kMostColumns || first.columns % 8 != 0) {
        return "its columns must be a multiple of 8 from 8 to 256";
    }
    Product product = {first, {}, {}, {}};
    for (int lane = 0; lane < kLanes; ++lane) {
        Wgmma const& own = *lanes[lane];
        if (own.a_descriptor != first.a_descriptor || own.b_descriptor != first.b_descriptor ||
            own.accumulate != first.accumulate) {
            return "lanes of a warp have different descriptors";
        }
        product.a_of_lanes[lane] = own.a;
        if (own.a != nullptr) std::memcpy(product.a[lane], own.a, sizeof product.a[lane]);
    }
    auto const add_rows = [&](uint64_t descriptor, int from, int count) {
        MatrixRows const rows(descriptor);
        for (int row = from; row < from + count; ++row) {
            for (int half = 0; half < 2; ++half) product.units.push_back(rows.offset(row, half));
        }
        return rows.problem();
    };
    std::string problem;
    if (first.a == nullptr) problem = add_rows(first.a_descriptor, warp % 4 * kRows, kRows);
    if (problem.empty()) problem = add_rows(first.b_descriptor, 0, first.columns);
    if (!problem.empty()) return "its descriptor has " + problem;

    int const words = first.columns / 2;
    Registers* registers = registers_of(first.accumulators);
    if (registers == nullptr) {
        registers = &in_flight_.emplace_back();
        registers->words = words;
        registers->pending = 0;
        registers->values.resize(static_cast<size_t>(kLanes * words));
        for (int lane = 0; lane < kLanes; ++lane) {
            auto* const own = static_cast<uint32_t*>(lanes[lane]->accumulators);
            registers->of_lanes[lane] = own;
            std::copy_n(own, words, registers->values.begin() + lane * words);
            std::fill_n(own, words, kInFlight);
        }
    } else if (registers->words != words) {
        return "its accumulators are those of a product of another shape in flight";
    }
    ++registers->pending;
    ++uncommitted_;
    products_.push_back(std::move(product));
    remember(static_cast<uint64_t>(site.line) << 16 | static_cast<uint64_t>(first.columns));
    return "";
}

std::string WarpProducts::commit() {
    fenced_ = false;
    groups_.push_back(uncommitted_);
    uncommitted_ = 0;
    return "";
}

std::string WarpProducts::wait(int newest, char const* shared, std::vector<size_t>& read) {
    fenced_ = false;
    auto const landing = static_cast<ptrdiff_t>(groups_.size()) - newest;
    if (landing <= 0) return "";
    auto count = std::accumulate(groups_.begin(), groups_.begin() + landing, size_t{0});
    groups_.erase(groups_.begin(), groups_.begin() + landing);
    for (; count > 0; --count) {
        Product const& product = products_.front();
        std::string problem = compute(product, shared);
        if (!problem.empty()) return problem;
        read.insert(read.end(), product.units.begin(), product.units.end());
        products_.pop_front();
    }
    for (Registers& registers : in_flight_) {
        if (registers.pending > 0) continue;
        for (int lane = 0; lane < kLanes; ++lane) {
            uint32_t* const own = registers.of_lanes[lane];
            if (!std::all_of(own, own + registers.words,
                             [](uint32_t word) { return word == kInFlight; })) {
                return "accumulators were written while their product was in flight";
            }
            std::copy_n(registers.values.begin() + lane * registers.words, registers.words, own);
        }
    }
    in_flight_.erase(std::remove_if(in_flight_.begin(), in_flight_.end(),
                                    [](Registers const& each) { return each.pending == 0; }),
                     in_flight_.end());
    return "";
}

namespace {

struct Integers {
    using Value = int32_t;
    static Value of(uint8_t code) { return static_cast<int8_t>(code); }
};
struct Floats {
    using Value = float;
    static Value of(uint8_t code) {
        static float const* const table = [] {
            static float values[256];
            for (uint32_t i = 0; i < 256; ++i) values[i] = e4m3_to_float(i);
            return values;
        }();
        return table[code];
    }
};

int32_t add(int32_t x, int32_t y) {
    return static_cast<int32_t>(static_cast<uint32_t>(x) + static_cast<uint32_t>(y));
}
float add(float x, float y) { return x + y; }

// Products are exact, sums in the order of k; accumulator i of lane l is at row l / 4 + 8 * (i / 2
// % 2), column 8 * (i / 4) + 2 * (l % 4) + i % 2.
template <class Format>
void multiply(uint8_t const (&a)[kRows][kStepBytes], uint8_t const (*b)[kStepBytes], int columns,
              bool accumulate, uint32_t* accumulators) {
    using Value = typename Format::Value;
    static thread_local Value of_b[kStepBytes][kMostColumns];
    for (int column = 0; column < columns; ++column) {
        for (int k = 0; k < kStepBytes; ++k) of_b[k][column] = Format::of(b[column][k]);
    }
    for (int row = 0; row < kRows; ++row) {
        Value sums[kMostColumns] = {};
        for (int k = 0; k < kStepBytes; ++k) {
            Value const of_a = Format::of(a[row][k]);
            for (int column = 0; column < columns; ++column) {
                sums[column] += of_a * of_b[k][column];
            }
        }
        for (int column = 0; column < columns; ++column) {
            int const lane = row % 8 * 4 + column % 8 / 2;
            int const word = column / 8 * 4 + row / 8 * 2 + column % 2;
            uint32_t* const at = accumulators + lane * (columns / 2) + word;
            Value before = {};
            if (accumulate) std::memcpy(&before, at, sizeof before);
            Value const sum = add(before, sums[column]);
            std::memcpy(at, &sum, sizeof sum);
        }
    }
}

}  // namespace

std::string WarpProducts::compute(Product const& product, char const* shared) {
    Wgmma const& wgmma = product.of_lane_0;
    uint8_t a[kRows][kStepBytes];
    uint8_t b[kMostColumns][kStepBytes];
    size_t unit = 0;
    auto const copy_rows = [&](uint8_t (*rows)[kStepBytes], int count) {
        for (int row = 0; row < count; ++row) {
            for (int half = 0; half < 2; ++half) {
                std::memcpy(rows[row] + half * kUnit, shared + product.units[unit++], kUnit);
            }
        }
    };
    if (wgmma.a == nullptr) {
        copy_rows(a, kRows);
    } else {
        // Register r of lane l: row l / 4 + 8 * (r % 2), bytes 4 * (l % 4) + 16 * (r / 2) on.
        for (int lane = 0; lane < kLanes; ++lane) {
            if (std::memcmp(product.a_of_lanes[lane], product.a[lane], sizeof product.a[lane])) {
                return "operand A's registers were written while its product was in flight";
            }
            for (int r = 0; r < 4; ++r) {
                std::memcpy(&a[lane / 4 + r % 2 * 8][lane % 4 * 4 + r / 2 * 16],
                            &product.a[lane][r], 4);
            }
        }
    }
    copy_rows(b, wgmma.columns);
    Registers& registers = *registers_of(wgmma.accumulators);
    --registers.pending;
    if (wgmma.integers) {
        multiply<Integers>(a, b, wgmma.columns, wgmma.accumulate, registers.values.data());
    } else {
        multiply<Floats>(a, b, wgmma.columns, wgmma.accumulate, registers.values.data());
    }
    return "";
}

}  // namespace sage::host
