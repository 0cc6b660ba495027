// Any machine: vectors of four lanes by the compiler's vector extensions (SSE2, NEON, or scalars).
#pragma once

#include "convert_scalar.hpp"

namespace sage_cpu {
namespace {

struct Isa {
    static constexpr int64_t kLanes = 4;
    static constexpr int kVectors = 4;  // of one register tile
    static constexpr int kKeyOffset = 0;

    typedef float Floats __attribute__((vector_size(16)));
    typedef int32_t Ints __attribute__((vector_size(16)));
    using Element = int16_t;  // of Q and P

    static SAGE_INLINE Floats load(const float* p) {
        Floats x;
        __builtin_memcpy(&x, p, sizeof x);
        return x;
    }
    static SAGE_INLINE void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
    static SAGE_INLINE void store(int32_t* p, Ints x) { __builtin_memcpy(p, &x, sizeof x); }
    static SAGE_INLINE Floats load_bfloat16(const uint16_t* p) {
        return Floats{from_bfloat16(p[0]), from_bfloat16(p[1]), from_bfloat16(p[2]),
                      from_bfloat16(p[3])};
    }
    static SAGE_INLINE Floats load_float16(const uint16_t* p) {
        return Floats{from_float16(p[0]), from_float16(p[1]), from_float16(p[2]),
                      from_float16(p[3])};
    }
    static SAGE_INLINE void store_bfloat16(uint16_t* p, Floats x) {
        for (int i = 0; i < 4; i++) p[i] = to_bfloat16(x[i]);
    }
    static SAGE_INLINE void store_float16(uint16_t* p, Floats x) {
        for (int i = 0; i < 4; i++) p[i] = to_float16(x[i]);
    }
    static SAGE_INLINE Floats set(float x) { return Floats{x, x, x, x}; }
    static SAGE_INLINE Ints set(int32_t x) { return Ints{x, x, x, x}; }
    static SAGE_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
    static SAGE_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }
    static SAGE_INLINE Floats abs(Floats x) { return as_float(as_int(x) & set(0x7fffffff)); }
    static SAGE_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
    // Exponents are added to the bits of floats: sums wrap around.
    static SAGE_INLINE Ints add(Ints a, Ints b) { return Ints(Unsigned(a) + Unsigned(b)); }
    static SAGE_INLINE Floats to_float(Ints x) { return __builtin_convertvector(x, Floats); }
    // Half to even, for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the lowest bits.
    static SAGE_INLINE Ints round(Floats x) {
        return as_int(x + set(12582912.0f)) - set(0x4b400000);
    }
    static SAGE_INLINE Floats as_float(Ints x) { return (Floats)x; }
    static SAGE_INLINE Ints as_int(Floats x) { return (Ints)x; }
    template <int N>
    static SAGE_INLINE Ints shift_left(Ints x) {
        return Ints(Unsigned(x) << N);
    }
    template <int N>
    static SAGE_INLINE Ints shift_right(Ints x) {
        return Ints(Unsigned(x) >> N);
    }
    static SAGE_INLINE Ints bit_and(Ints a, Ints b) { return a & b; }
    static SAGE_INLINE Ints bit_or(Ints a, Ints b) { return a | b; }
    static SAGE_INLINE float reduce_max(Floats x) {
        float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
        return a > b ? a : b;
    }
    static SAGE_INLINE float reduce_add(Floats x) { return (x[0] + x[1]) + (x[2] + x[3]); }
    static SAGE_INLINE int32_t reduce_add(Ints x) { return (x[0] + x[1]) + (x[2] + x[3]); }

    // The reductions of several vectors at once.
    static constexpr int kReduced = 8;
    static SAGE_INLINE void reduce_max_each(const Floats* x, float* results) {
        for (int i = 0; i < kReduced; i++) results[i] = reduce_max(x[i]);
    }
    static SAGE_INLINE void reduce_add_each(const Floats* x, float* results) {
        for (int i = 0; i < kReduced; i++) results[i] = reduce_add(x[i]);
    }

    static SAGE_INLINE Floats select(uint32_t bits, Floats a, Floats b) {
        Ints wanted = (set(int32_t(bits)) & Ints{1, 2, 4, 8}) != 0;
        return wanted ? a : b;
    }
    static SAGE_INLINE uint32_t less(Floats a, Floats b) { return bits_of(a < b); }
    static SAGE_INLINE uint32_t equal(Floats a, Floats b) { return bits_of(a == b); }
    static SAGE_INLINE uint32_t unordered(Floats a, Floats b) {  // either is NaN
        return bits_of((a != a) | (b != b));
    }
    static SAGE_INLINE uint64_t nonzero_bytes(const uint8_t* p) {  // of 64
        uint64_t bits = 0;
        for (int i = 0; i < 64; i++) bits |= uint64_t(p[i] != 0) << i;
        return bits;
    }

    // Stores integers below 256, a tile's worth, in the order of the keys, and adds them to sums.
    static SAGE_INLINE Ints store_tile(Element* p, const Ints* x, Ints sums) {
        for (int v = 0; v < 16; v++) {
            for (int i = 0; i < 4; i++) p[4 * v + i] = Element(x[v][i]);
            sums = sums + x[v];
        }
        return sums;
    }
    static constexpr int64_t slot_key(int64_t slot) { return slot; }
    static SAGE_INLINE void store_bytes(void* p, Ints x) {
        uint8_t* bytes = static_cast<uint8_t*>(p);
        for (int i = 0; i < 4; i++) bytes[i] = uint8_t(x[i]);
    }

    // The register tile of products: see gemm.hpp.
    static constexpr bool kHasRegisterTile = false;
    typedef int8_t Panel __attribute__((vector_size(16)));
    struct Group {
        int16_t elements[4];
    };
    using Sum = Ints;
    static SAGE_INLINE Sum begin(int32_t x) { return set(x); }
    static SAGE_INLINE Sum times_256(Sum x) { return shift_left<8>(x); }
    static SAGE_INLINE Ints total(Sum x) { return x; }
    template <bool SignedA>
    static SAGE_INLINE Sum dot(Sum sum, Group a, Panel b) {
        for (int i = 0; i < 4; i++)
            for (int e = 0; e < 4; e++) sum[i] += a.elements[e] * b[4 * i + e];
        return sum;
    }
    static SAGE_INLINE Panel load_panel(const void* p) {
        Panel x;
        __builtin_memcpy(&x, p, sizeof x);
        return x;
    }
    static SAGE_INLINE Group broadcast_group(const Element* p) {
        return {{p[0], p[1], p[2], p[3]}};
    }

 private:
    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    static SAGE_INLINE uint32_t bits_of(Ints lanes) {  // all ones or zeros
        return (lanes[0] & 1) | (lanes[1] & 2) | (lanes[2] & 4) | (lanes[3] & 8);
    }
};

}  // namespace
}  // namespace sage_cpu
