// AVX2 with FMA and F16C, and AVX-VNNI where the compiler is told to use it: 16 registers of 8
// lanes.
#pragma once

#include <immintrin.h>

#include "plan.hpp"

namespace sage_cpu {
namespace {

struct Isa {
    static constexpr int64_t kLanes = 8;

    using Floats = __m256;
    using Ints = __m256i;

    static SAGE_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static SAGE_INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
    static SAGE_INLINE void store(int32_t* p, Ints x) { store_ints(p, x); }
    static SAGE_INLINE Floats load_bfloat16(const uint16_t* p) {
        return as_float(shift_left<16>(_mm256_cvtepu16_epi32(load_half(p))));
    }
    static SAGE_INLINE Floats load_float16(const uint16_t* p) {
        return _mm256_cvtph_ps(load_half(p));
    }
    static SAGE_INLINE void store_bfloat16(uint16_t* p, Floats x) {
        Ints bits = as_int(x), odd = bit_and(shift_right<16>(bits), set(1));
        Ints sum = add(bits, add(odd, set(0x7fff)));
        // Rounding could carry a NaN into infinity.
        Floats rounded = _mm256_blendv_ps(as_float(sum), as_float(set(0x7fc00000)),
                                          _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        sum = shift_right<16>(as_int(rounded));
        store_half(p, _mm_packus_epi32(low_half(sum), high_half(sum)));
    }
    static SAGE_INLINE void store_float16(uint16_t* p, Floats x) {
        store_half(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static SAGE_INLINE Floats set(float x) { return _mm256_set1_ps(x); }
    static SAGE_INLINE Ints set(int32_t x) { return _mm256_set1_epi32(x); }
    static SAGE_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static SAGE_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static SAGE_INLINE Floats abs(Floats x) { return _mm256_andnot_ps(set(-0.0f), x); }
    static SAGE_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static SAGE_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static SAGE_INLINE Floats to_float(Ints x) { return _mm256_cvtepi32_ps(x); }
    static SAGE_INLINE Ints round(Floats x) { return _mm256_cvtps_epi32(x); }  // half to even
    static SAGE_INLINE Floats as_float(Ints x) { return _mm256_castsi256_ps(x); }
    static SAGE_INLINE Ints as_int(Floats x) { return _mm256_castps_si256(x); }
    template <int N>
    static SAGE_INLINE Ints shift_left(Ints x) {
        return _mm256_slli_epi32(x, N);
    }
    template <int N>
    static SAGE_INLINE Ints shift_right(Ints x) {
        return _mm256_srli_epi32(x, N);
    }
    static SAGE_INLINE Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
    static SAGE_INLINE Ints bit_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
    static SAGE_INLINE float reduce_max(Floats x) {
        __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_max_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
    }
    static SAGE_INLINE float reduce_add(Floats x) {
        __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_add_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
    }
    static SAGE_INLINE int32_t reduce_add(Ints x) {
        __m128i y = _mm_add_epi32(low_half(x), high_half(x));
        y = _mm_add_epi32(y, _mm_unpackhi_epi64(y, y));
        return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 1)));
    }

    // The reductions of eight vectors at once, whose results fill a vector in order.
    static constexpr int kReduced = 8;
    static SAGE_INLINE void reduce_max_each(const Floats* x, float* results) {
        reduce_each(x, results, [](Floats a, Floats b) SAGE_LAMBDA { return max(a, b); });
    }
    static SAGE_INLINE void reduce_add_each(const Floats* x, float* results) {
        reduce_each(x, results, [](Floats a, Floats b) SAGE_LAMBDA { return a + b; });
    }

    // Lane i of a where bit i is set, else of b.
    static SAGE_INLINE Floats select(uint32_t bits, Floats a, Floats b) {
        Ints own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        Ints wanted = _mm256_cmpeq_epi32(bit_and(set(int32_t(bits)), own), own);
        return _mm256_blendv_ps(b, a, as_float(wanted));
    }
    static SAGE_INLINE uint32_t less(Floats a, Floats b) {
        return bits_of(_mm256_cmp_ps(a, b, _CMP_LT_OQ));
    }
    static SAGE_INLINE uint32_t equal(Floats a, Floats b) {
        return bits_of(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
    }
    static SAGE_INLINE uint32_t unordered(Floats a, Floats b) {  // either is NaN
        return bits_of(_mm256_cmp_ps(a, b, _CMP_UNORD_Q));
    }
    static SAGE_INLINE uint64_t nonzero_bytes(const uint8_t* p) {  // of 64
        return ~(zero_bytes(p) | zero_bytes(p + 32) << 32);
    }

    // The lowest byte of every lane.
    static SAGE_INLINE void store_bytes(void* p, Ints x) {
        Ints lowest = _mm256_set1_epi32(0x0c080400);  // of each half's lanes
        Ints bytes = _mm256_shuffle_epi8(x, lowest);
        _mm_storel_epi64(static_cast<__m128i*>(p),
                         _mm_unpacklo_epi32(low_half(bytes), high_half(bytes)));
    }

    static constexpr int kVectors = 2;  // of one register tile: kGroupRows x (2 * 8) sums
    // Sanitizers put calls into the code, and those overwrite pinned registers.
#if defined(SAGE_CPU_SANITIZE)
    static constexpr bool kHasRegisterTile = false;
#else
    static constexpr bool kHasRegisterTile = true;
#endif

    // store_tile stores integers below 256, a tile's worth, in the order that packing takes the
    // least work, and adds them to sums. slot_key says which key lies where.
#if defined(__AVXVNNI__)
    // VPDPBUSD multiplies unsigned by signed bytes. P is unsigned; Q is signed, so K is stored
    // with an offset, which a correction per row of Q takes out again.
    static constexpr int kKeyOffset = 128;
    using Element = uint8_t;  // of Q and P; Q's are signed, the same bits

    // Half h of vector z, of four, goes to bytes 16 h + 4 z.
    static SAGE_INLINE Ints store_tile(Element* p, const Ints* x, Ints sums) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++, p += 32, x += 4) {
            Ints low = _mm256_packs_epi32(x[0], x[1]), high = _mm256_packs_epi32(x[2], x[3]);
            Ints bytes = _mm256_packus_epi16(low, high);
            store_ints(p, bytes);
            sums = _mm256_dpbusd_avx_epi32(sums, bytes, _mm256_set1_epi8(1));
        }
        return sums;
    }
    static constexpr int64_t slot_key(int64_t slot) {
        return slot / 32 * 32 + 8 * (slot / 4 % 4) + 4 * (slot / 16 % 2) + slot % 4;
    }

    // The register tile of products: see gemm.hpp.
    using Sum = Ints;
    using Panel = Ints;
    using Group = Ints;
    static constexpr int64_t kColumnsBytes = 32;
    static SAGE_INLINE Ints load_columns(const void* p) { return load_ints(p); }
    static SAGE_INLINE Panel load_panel(const void* p) { return load_columns(p); }
    static SAGE_INLINE Group broadcast_group(const Element* p) {  // four consecutive elements
        int32_t group;
        __builtin_memcpy(&group, p, sizeof group);
        return set(group);
    }
    static SAGE_INLINE Ints first(int32_t x) { return set(x); }
    static SAGE_INLINE Sum begin(int32_t x) { return first(x); }
    static SAGE_INLINE Sum times_256(Sum x) { return shift_left<8>(x); }
    static SAGE_INLINE Ints total(Sum x) { return x; }
    template <bool SignedA>
    static SAGE_INLINE Sum dot(Sum sum, Group a, Panel b) {
        return SignedA ? _mm256_dpbusd_avx_epi32(sum, b, a) : _mm256_dpbusd_avx_epi32(sum, a, b);
    }
#else
    static constexpr int kKeyOffset = 0;
    // VPMADDUBSW would multiply bytes, but saturates. Products of 16 bits are exact.
    using Element = int16_t;  // of Q and P

    // Half h of vector z, of two, goes to elements 8 h + 4 z.
    static SAGE_INLINE Ints store_tile(Element* p, const Ints* x, Ints sums) {
        Ints words = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++, p += 16, x += 2) {
            Ints elements = _mm256_packs_epi32(x[0], x[1]);
            store_ints(p, elements);
            words = _mm256_add_epi16(words, elements);
        }
        return add(sums, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    }
    static constexpr int64_t slot_key(int64_t slot) {
        return slot / 16 * 16 + 8 * (slot / 4 % 2) + 4 * (slot / 8 % 2) + slot % 4;
    }

    // The register tile of products: see gemm.hpp. VPMADDWD adds products in pairs, which gives
    // each column two lanes.
    struct Halves {
        Ints low, high;  // columns 0-3 and 4-7
    };
    using Sum = Halves;
    using Panel = Halves;
    using Group = Ints;
    static constexpr int64_t kColumnsBytes = 16;
    static SAGE_INLINE Ints load_columns(const void* p) {
        return _mm256_cvtepi8_epi16(load_half(p));
    }
    static SAGE_INLINE Panel load_panel(const char* p) {
        return {load_columns(p), load_columns(p + kColumnsBytes)};
    }
    static SAGE_INLINE Group broadcast_group(const Element* p) {  // four consecutive elements
        int64_t group;
        __builtin_memcpy(&group, p, sizeof group);
        return _mm256_set1_epi64x(group);
    }
    static SAGE_INLINE Ints first(int32_t x) { return _mm256_set1_epi64x(uint32_t(x)); }
    static SAGE_INLINE Sum begin(int32_t x) { return {first(x), first(x)}; }
    static SAGE_INLINE Sum times_256(Sum x) {
        return {shift_left<8>(x.low), shift_left<8>(x.high)};
    }
    static SAGE_INLINE Ints total(Sum x) {
        Ints sums = _mm256_hadd_epi32(x.low, x.high);  // columns 0 1 4 5 2 3 6 7
        return _mm256_permute4x64_epi64(sums, _MM_SHUFFLE(3, 1, 2, 0));
    }
    template <bool SignedA>
    static SAGE_INLINE Sum dot(Sum sum, Group a, Panel b) {
        return {add(sum.low, _mm256_madd_epi16(a, b.low)),
                add(sum.high, _mm256_madd_epi16(a, b.high))};
    }
#endif

 private:
    template <class Fold>
    static SAGE_INLINE void reduce_each(const Floats* x, float* results, Fold fold) {
        Floats halves[4], quarters[2];  // one vector's lanes in each half, then in each quarter
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            halves[i] = fold(_mm256_permute2f128_ps(x[i], x[4 + i], 0x20),
                             _mm256_permute2f128_ps(x[i], x[4 + i], 0x31));
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
            quarters[i] = fold(_mm256_shuffle_ps(halves[2 * i], halves[2 * i + 1], 0x44),
                               _mm256_shuffle_ps(halves[2 * i], halves[2 * i + 1], 0xee));
        store(results, fold(_mm256_shuffle_ps(quarters[0], quarters[1], 0x88),
                            _mm256_shuffle_ps(quarters[0], quarters[1], 0xdd)));
    }
    static SAGE_INLINE Ints load_ints(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
    static SAGE_INLINE void store_ints(void* p, Ints x) {
        _mm256_storeu_si256(static_cast<__m256i*>(p), x);
    }
    static SAGE_INLINE __m128i load_half(const void* p) {
        return _mm_loadu_si128(static_cast<const __m128i*>(p));
    }
    static SAGE_INLINE void store_half(void* p, __m128i x) {
        _mm_storeu_si128(static_cast<__m128i*>(p), x);
    }
    static SAGE_INLINE __m128i low_half(Ints x) { return _mm256_castsi256_si128(x); }
    static SAGE_INLINE __m128i high_half(Ints x) { return _mm256_extracti128_si256(x, 1); }
    static SAGE_INLINE uint32_t bits_of(Floats lanes) {  // all ones or zeros
        return uint32_t(_mm256_movemask_ps(lanes));
    }
    static SAGE_INLINE uint64_t zero_bytes(const uint8_t* p) {  // of 32
        Ints zeros = _mm256_cmpeq_epi8(load_ints(p), _mm256_setzero_si256());
        return uint32_t(_mm256_movemask_epi8(zeros));
    }
};

}  // namespace
}  // namespace sage_cpu
