#include "warp.hpp"

#include <cstring>
#include <sage/host/convert.hpp>

namespace sage::host {

namespace {

template <class Argument>
Argument& of(void* argument) {
    return *static_cast<Argument*>(argument);
}

void shuffle_xor(void* const (&arguments)[kLanes]) {
    uint32_t values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = of<ShuffleXor>(arguments[lane]).value;
    for (int lane = 0; lane < kLanes; ++lane) {
        auto& argument = of<ShuffleXor>(arguments[lane]);
        argument.value = values[lane ^ argument.lane_mask];
    }
}

void load_matrix(void* const (&arguments)[kLanes]) {
    uint32_t words[kLanes][4];  // of each row
    for (int lane = 0; lane < kLanes; ++lane) {
        std::memcpy(words[lane], of<LoadMatrix>(arguments[lane]).row, sizeof words[lane]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t* const registers = of<LoadMatrix>(arguments[lane]).registers;
        for (int matrix = 0; matrix < 4; ++matrix) {
            registers[matrix] = words[matrix * 8 + lane / 4][lane % 4];
        }
    }
}

constexpr int kRows = 16, kColumns = 8, kStepBytes = 32;

// The operands of a product as bytes along the contracted dim, whatever their format: PTX gives
// lane l the 4 bytes from 4 * (l % 4) on, and 16 further on, of rows l / 4 and l / 4 + 8 of A and
// of column l / 4 of B.
struct Operands {
    uint8_t a[kRows][kStepBytes];
    uint8_t b[kColumns][kStepBytes];

    explicit Operands(void* const (&arguments)[kLanes]) {
        for (int lane = 0; lane < kLanes; ++lane) {
            auto const& argument = of<Mma>(arguments[lane]);
            int const row = lane / 4, byte = lane % 4 * 4;
            for (int r = 0; r < 4; ++r) {
                std::memcpy(&a[row + r % 2 * 8][byte + r / 2 * 16], &argument.a[r], 4);
            }
            for (int r = 0; r < 2; ++r) std::memcpy(&b[row][byte + r * 16], &argument.b[r], 4);
        }
    }
};

// The formats: how many elements the step has, and the element at an index of its bytes.
struct S4 {
    using Value = int32_t;
    static constexpr int kElements = 64;
    static int32_t at(uint8_t const* bytes, int k) {
        int const code = bytes[k / 2] >> (k % 2 * 4) & 15;
        return (code ^ 8) - 8;
    }
};

struct S8 {
    using Value = int32_t;
    static constexpr int kElements = 32;
    static int32_t at(uint8_t const* bytes, int k) { return static_cast<int8_t>(bytes[k]); }
};

struct E4m3 {
    using Value = float;
    static constexpr int kElements = 32;
    static float at(uint8_t const* bytes, int k) { return e4m3_to_float(bytes[k]); }
};

struct F16 {
    using Value = float;
    static constexpr int kElements = 16;
    static float at(uint8_t const* bytes, int k) {
        uint16_t half;
        std::memcpy(&half, bytes + 2 * k, sizeof half);
        return half_to_float(half);
    }
};

struct Tf32 {
    using Value = float;
    static constexpr int kElements = 8;
    static float at(uint8_t const* bytes, int k) {
        uint32_t word;
        std::memcpy(&word, bytes + 4 * k, sizeof word);
        return from_bits(word & 0xffff'e000);  // tensor cores ignore the low bits
    }
};

// Products are exact. Floating-point sums are in float32, in the order of k; those of Ada's FP8
// tensor cores, which keep 13 bits of the mantissa behind the point ("FP22"), are not modelled.
// Integers do not overflow within a step: 32 * 128 * 128 < 2^31.
template <class Format, class Value = typename Format::Value>
void multiply(Operands const& operands, Value (&sums)[kRows][kColumns]) {
    constexpr int kElements = Format::kElements;
    Value a[kRows][kElements], b[kElements][kColumns];
    for (int i = 0; i < kRows; ++i) {
        for (int k = 0; k < kElements; ++k) a[i][k] = Format::at(operands.a[i], k);
    }
    for (int j = 0; j < kColumns; ++j) {
        for (int k = 0; k < kElements; ++k) b[k][j] = Format::at(operands.b[j], k);
    }
    for (int i = 0; i < kRows; ++i) {
        Value row[kColumns] = {};
        for (int k = 0; k < kElements; ++k) {
            for (int j = 0; j < kColumns; ++j) row[j] += a[i][k] * b[k][j];
        }
        std::memcpy(sums[i], row, sizeof row);
    }
}

float add(float x, float y) { return x + y; }

// Wraps around, as the device's does.
int32_t add(int32_t x, int32_t y) {
    return static_cast<int32_t>(static_cast<uint32_t>(x) + static_cast<uint32_t>(y));
}

// Accumulator i of lane l is at row l / 4 + 8 * (i / 2), column 2 * (l % 4) + i % 2.
template <class Format>
void mma(void* const (&arguments)[kLanes]) {
    using Value = typename Format::Value;
    Value sums[kRows][kColumns];
    multiply<Format>(Operands(arguments), sums);
    for (int lane = 0; lane < kLanes; ++lane) {
        auto* const accumulators = static_cast<Value*>(of<Mma>(arguments[lane]).accumulators);
        for (int i = 0; i < 4; ++i) {
            Value const sum = sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
            accumulators[i] = add(accumulators[i], sum);
        }
    }
}

// As above with each pair of columns as two halves of a word: rounded to half after each product.
void mma_e4m3_half(void* const (&arguments)[kLanes]) {
    float sums[kRows][kColumns];
    multiply<E4m3>(Operands(arguments), sums);
    for (int lane = 0; lane < kLanes; ++lane) {
        auto* const accumulators = static_cast<uint32_t*>(of<Mma>(arguments[lane]).accumulators);
        for (int i = 0; i < 2; ++i) {
            float const* const sum = &sums[lane / 4 + i * 8][lane % 4 * 2];
            uint32_t const low = float_to_half(half_to_float(accumulators[i] & 0xffff) + sum[0]);
            uint32_t const high = float_to_half(half_to_float(accumulators[i] >> 16) + sum[1]);
            accumulators[i] = low | high << 16;
        }
    }
}

}  // namespace

char const* name_of(Collective operation) {
    switch (operation) {
        case Collective::kShuffleXor:
            return "shuffle_xor";
        case Collective::kLoadMatrix:
            return "load_matrix_x4";
        case Collective::kMmaS4:
            return "mma<MmaS4>";
        case Collective::kMmaS8:
            return "mma<MmaS8>";
        case Collective::kMmaE4m3:
            return "mma<MmaE4m3>";
        case Collective::kMmaE4m3Half:
            return "mma<MmaE4m3Half>";
        case Collective::kMmaF16:
            return "mma<MmaF16>";
        case Collective::kMmaTf32:
            return "mma<MmaTf32>";
        case Collective::kWgmma:
            return "wgmma";
        case Collective::kWgmmaFence:
            return "wgmma_fence";
        case Collective::kWgmmaCommit:
            return "wgmma_commit";
        case Collective::kWgmmaWait:
            return "wgmma_wait";
    }
    __builtin_unreachable();
}

void perform(Collective operation, void* const (&arguments)[kLanes]) {
    switch (operation) {
        case Collective::kShuffleXor:
            return shuffle_xor(arguments);
        case Collective::kLoadMatrix:
            return load_matrix(arguments);
        case Collective::kMmaS4:
            return mma<S4>(arguments);
        case Collective::kMmaS8:
            return mma<S8>(arguments);
        case Collective::kMmaE4m3:
            return mma<E4m3>(arguments);
        case Collective::kMmaE4m3Half:
            return mma_e4m3_half(arguments);
        case Collective::kMmaF16:
            return mma<F16>(arguments);
        case Collective::kMmaTf32:
            return mma<Tf32>(arguments);
        default:
            break;  // of wgmma: see wgmma.hpp
    }
}

}  // namespace sage::host
