// Tensors for the fuzz target: each in memory of exactly its extent, in any layout.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "sage_cpu.h"

namespace fuzz {

// What the bytes of an input decide; zeros once they are used up.
class Choices {
 public:
    Choices(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}

    int64_t below(int64_t limit) {  // limit: at most 2^16
        uint32_t number = byte();
        if (limit > 256) number = number << 8 | byte();
        return number % limit;
    }
    bool one_in(int64_t count) { return below(count) == count - 1; }
    template <class T, size_t N>
    T of(const T (&options)[N]) {
        return options[below(N)];
    }
    uint64_t seed() {
        uint64_t seed = 0;
        for (int i = 0; i < 4; ++i) seed = seed << 8 | byte();
        return seed;
    }

 private:
    uint32_t byte() { return next_ < end_ ? *next_++ : 0; }
    const uint8_t *next_, *end_;
};

// splitmix64
class Random {
 public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    double uniform() { return double(bits() >> 11) * 0x1p-53; }
    double gaussian() {
        return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
    }

 private:
    uint64_t state_;
};

inline int64_t element_size(int dtype) {
    return dtype == SAGE_CPU_FLOAT32 ? 4 : dtype == SAGE_CPU_BOOL ? 1 : 2;
}

inline double decode(const char* from, int dtype) {
    uint16_t half = 0;
    uint32_t bits = 0;
    float result = 0;
    switch (dtype) {
        case SAGE_CPU_BOOL:
            return *from != 0;
        case SAGE_CPU_FLOAT32:
            std::memcpy(&result, from, 4);
            return result;
        case SAGE_CPU_BFLOAT16:
            std::memcpy(&half, from, 2);
            bits = uint32_t(half) << 16;
            std::memcpy(&result, &bits, 4);
            return result;
    }
    std::memcpy(&half, from, 2);
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    double size = exponent == 0    ? std::ldexp(mantissa, -24)
                  : exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                   : std::ldexp(1024 + mantissa, exponent - 25);
    return half >> 15 ? -size : size;
}

// Round to nearest, half to even.
inline void encode(double x, int dtype, char* to) {
    if (dtype == SAGE_CPU_BOOL) {
        *to = x != 0;
        return;
    }
    float single = float(x);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    if (dtype == SAGE_CPU_FLOAT32) {
        std::memcpy(to, &bits, 4);
        return;
    }
    uint16_t half;
    if (dtype == SAGE_CPU_BFLOAT16) {
        half = uint16_t(std::isnan(x) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
        double size = std::fabs(x);
        int exponent = size < 0x1p-14 || !std::isfinite(size) ? -14 : std::ilogb(size);
        half = 0x7c00;
        if (std::isnan(x)) {
            half = 0x7e00;
        } else if (size < 65520) {  // a mantissa that rounds up to 2048 carries into the exponent
            half = uint16_t((exponent + 14) * 1024 +
                            int(std::nearbyint(std::ldexp(size, 10 - exponent))));
        }
        half |= uint16_t(std::signbit(x) << 15);
    }
    std::memcpy(to, &half, 2);
}

// Rank 4, in doubles.
struct Dense {
    int64_t size[4] = {0, 0, 0, 0};
    std::vector<double> values;

    Dense() = default;
    Dense(int64_t a, int64_t b, int64_t c, int64_t d) : size{a, b, c, d}, values(a * b * c * d) {}
    int64_t index(int64_t a, int64_t b, int64_t c, int64_t d) const {
        return ((a * size[1] + b) * size[2] + c) * size[3] + d;
    }
    double& at(int64_t a, int64_t b, int64_t c, int64_t d) { return values[index(a, b, c, d)]; }
    const double* row(int64_t a, int64_t b, int64_t c) const { return &values[index(a, b, c, 0)]; }
};

// One argument of a call. The memory is malloc'ed: neither a vector's alignment nor a byte to
// spare.
class Tensor {
 public:
    enum class Use { kInput, kMask, kOutput };

    Tensor() = default;
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    ~Tensor() { std::free(memory_); }

    void lay_out(Choices& choices, const int64_t (&size)[4], int dtype, Use use) {
        std::memcpy(size_, size, sizeof size_);
        dtype_ = dtype;
        choose_strides(choices, use);
        int64_t lowest = 0, highest = 0;
        bool empty = false;
        for (int dim = 0; dim < 4; ++dim) {
            if (size_[dim] <= 1) {
                empty |= size_[dim] == 0;
                continue;
            }
            int64_t reach = (size_[dim] - 1) * stride_[dim];
            (reach < 0 ? lowest : highest) += reach;
        }
        // Elements before the first make it less aligned.
        int64_t before = choices.one_in(2) ? choices.below(4) : 0;
        origin_ = before - lowest;
        elements_ = empty ? 0 : before + highest - lowest + 1;
        memory_ = static_cast<char*>(std::malloc(elements_ * element_size(dtype)));
        // What a wrong index reads is NaN, or what a write that is missing leaves.
        if (dtype != SAGE_CPU_BOOL)
            for (int64_t i = 0; i < elements_; ++i)
                encode(NAN, dtype, memory_ + i * element_size(dtype));
    }

    sage_cpu_tensor argument() const {
        char* first = memory_ == nullptr ? nullptr : memory_ + origin_ * element_size(dtype_);
        return {elements_ == 0 ? memory_ : first, {stride_[0], stride_[1], stride_[2], stride_[3]}};
    }
    // The same from token `first` on.
    sage_cpu_tensor argument_from(int64_t first) const {
        sage_cpu_tensor tensor = argument();
        if (first < size_[2])
            tensor.data = memory_ + (origin_ + first * stride_[2]) * element_size(dtype_);
        return tensor;
    }

    double get(const int64_t (&at)[4]) const { return decode(place(at), dtype_); }
    void set(const int64_t (&at)[4], double x) { encode(x, dtype_, place(at)); }

    Dense dense() const {
        Dense result(size_[0], size_[1], size_[2], size_[3]);
        for_each([&](const int64_t (&at)[4]) { result.at(at[0], at[1], at[2], at[3]) = get(at); });
        return result;
    }

    bool repeats_tokens() const { return stride_[2] == 0; }

    // All bytes, and those that no element lies in: what calls must leave alone.
    std::vector<char> bytes() const {
        return std::vector<char>(memory_, memory_ + elements_ * element_size(dtype_));
    }
    std::vector<char> bytes_between() const {
        std::vector<char> rest = bytes();
        for_each([&](const int64_t (&at)[4]) {
            std::memset(rest.data() + (place(at) - memory_), 0, element_size(dtype_));
        });
        return rest;
    }
    void restore(const std::vector<char>& bytes) {
        if (!bytes.empty()) std::memcpy(memory_, bytes.data(), bytes.size());
    }

    template <class F>
    void for_each(F f) const {
        for (int64_t a = 0; a < size_[0]; ++a)
            for (int64_t b = 0; b < size_[1]; ++b)
                for (int64_t c = 0; c < size_[2]; ++c)
                    for (int64_t d = 0; d < size_[3]; ++d) f({a, b, c, d});
    }

 private:
    char* place(const int64_t (&at)[4]) const {
        int64_t index = origin_;
        for (int dim = 0; dim < 4; ++dim)
            if (at[dim] != 0) index += at[dim] * stride_[dim];
        return memory_ + index * element_size(dtype_);
    }

    void choose_strides(Choices& choices, Use use) {
        static constexpr int kOrders[][4] = {
            // the dims from the innermost out
            {3, 2, 1, 0}, {3, 1, 2, 0}, {3, 2, 1, 0}, {2, 3, 1, 0}, {3, 0, 1, 2}, {0, 1, 2, 3}};
        int64_t order = choices.below(6);
        bool padded = choices.one_in(3), spread = choices.one_in(8);
        int64_t next = spread ? 2 : 1;
        for (int dim : kOrders[order]) {
            stride_[dim] = next;
            next *= size_[dim] == 0 ? 1 : size_[dim];
            if (padded) next += choices.below(9);
        }
        bool reversed = choices.one_in(4), broadcast = choices.one_in(use == Use::kMask ? 2 : 6);
        bool far = choices.one_in(4);
        static constexpr int64_t kFar[] = {INT64_MAX, INT64_MIN, 0, -1};
        for (int64_t dim = 0; dim < 4; ++dim) {
            if (reversed && choices.one_in(2)) stride_[dim] = -stride_[dim];
            if (broadcast && use != Use::kOutput && choices.one_in(2)) stride_[dim] = 0;
            // The stride of a dim of one element means nothing. PyTorch has any number there.
            if (far && size_[dim] == 1) stride_[dim] = choices.of(kFar);
        }
    }

    int64_t size_[4] = {0, 0, 0, 0}, stride_[4] = {0, 0, 0, 0};
    int dtype_ = 0;
    int64_t origin_ = 0, elements_ = 0;
    char* memory_ = nullptr;
};

}  // namespace fuzz
