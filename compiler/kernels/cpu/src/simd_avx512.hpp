// AVX-512 with VNNI: 32 registers of 16 lanes.
#pragma once

#include <immintrin.h>

#include "plan.hpp"

namespace sage_cpu {
namespace {

struct Isa {
    static constexpr int64_t kLanes = 16;
    static constexpr int kVectors = 4;  // of one register tile: kGroupRows x (4 * 16) sums
    // VPDPBUSD multiplies unsigned by signed bytes. P is unsigned; Q is signed, so K is stored
    // with an offset, which a correction per row of Q takes out again.
    static constexpr int kKeyOffset = 128;

    using Floats = __m512;
    using Ints = __m512i;
    using Element = uint8_t;  // of Q and P; Q's are signed, the same bits

    static SAGE_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static SAGE_INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
    static SAGE_INLINE void store(int32_t* p, Ints x) { _mm512_storeu_si512(p, x); }
    static SAGE_INLINE Floats load_bfloat16(const uint16_t* p) {
        __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static SAGE_INLINE Floats load_float16(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static SAGE_INLINE void store_bfloat16(uint16_t* p, Floats x) {
        __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        // Rounding could carry a NaN into infinity.
        sum = _mm512_mask_mov_epi32(sum, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                    _mm512_set1_epi32(0x7fc00000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
    }
    static SAGE_INLINE void store_float16(uint16_t* p, Floats x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static SAGE_INLINE Floats set(float x) { return _mm512_set1_ps(x); }
    static SAGE_INLINE Ints set(int32_t x) { return _mm512_set1_epi32(x); }
    static SAGE_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static SAGE_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static SAGE_INLINE Floats abs(Floats x) { return _mm512_abs_ps(x); }
    static SAGE_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static SAGE_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    static SAGE_INLINE Floats to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
    static SAGE_INLINE Ints round(Floats x) { return _mm512_cvtps_epi32(x); }  // half to even
    static SAGE_INLINE Floats as_float(Ints x) { return _mm512_castsi512_ps(x); }
    static SAGE_INLINE Ints as_int(Floats x) { return _mm512_castps_si512(x); }
    template <int N>
    static SAGE_INLINE Ints shift_left(Ints x) {
        return _mm512_slli_epi32(x, N);
    }
    template <int N>
    static SAGE_INLINE Ints shift_right(Ints x) {
        return _mm512_srli_epi32(x, N);
    }
    static SAGE_INLINE Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
    static SAGE_INLINE Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
    static SAGE_INLINE float reduce_max(Floats x) { return _mm512_reduce_max_ps(x); }
    static SAGE_INLINE float reduce_add(Floats x) { return _mm512_reduce_add_ps(x); }
    static SAGE_INLINE int32_t reduce_add(Ints x) { return _mm512_reduce_add_epi32(x); }

    // The reductions of eight vectors at once: folding pairs into one vector takes a third of the
    // work of folding each alone.
    static constexpr int kReduced = 8;
    static SAGE_INLINE void reduce_max_each(const Floats* x, float* results) {
        reduce_each(x, results, [](Floats a, Floats b) SAGE_LAMBDA { return max(a, b); });
    }
    static SAGE_INLINE void reduce_add_each(const Floats* x, float* results) {
        reduce_each(x, results, [](Floats a, Floats b) SAGE_LAMBDA { return a + b; });
    }

    // Lane i of a where bit i is set, else of b.
    static SAGE_INLINE Floats select(uint32_t bits, Floats a, Floats b) {
        return _mm512_mask_blend_ps(__mmask16(bits), b, a);
    }
    static SAGE_INLINE uint32_t less(Floats a, Floats b) {
        return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
    }
    static SAGE_INLINE uint32_t equal(Floats a, Floats b) {
        return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
    }
    static SAGE_INLINE uint32_t unordered(Floats a, Floats b) {  // either is NaN
        return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
    }
    static SAGE_INLINE uint64_t nonzero_bytes(const uint8_t* p) {  // of 64
        __m512i x = _mm512_loadu_si512(p);
        return _mm512_test_epi8_mask(x, x);
    }

    // Stores integers below 256, a tile's worth, in the order that packing takes the least work,
    // and adds them to sums. slot_key says which key lies where: lanes 4 l to 4 l + 3 of vector z
    // go to bytes 16 l + 4 z and following.
    static SAGE_INLINE Ints store_tile(Element* p, const Ints* x, Ints sums) {
        __m512i low = _mm512_packs_epi32(x[0], x[1]), high = _mm512_packs_epi32(x[2], x[3]);
        __m512i bytes = _mm512_packus_epi16(low, high);
        _mm512_storeu_si512(p, bytes);
        return _mm512_dpbusd_epi32(sums, bytes, _mm512_set1_epi8(1));
    }
    static constexpr int64_t slot_key(int64_t slot) {
        return 16 * (slot / 4 % 4) + 4 * (slot / 16) + slot % 4;
    }
    // The lowest byte of every lane.
    static SAGE_INLINE void store_bytes(void* p, Ints x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
    }

    // The register tile of products: see gemm.hpp.
    // Sanitizers put calls into the code, and those overwrite pinned registers.
#if defined(SAGE_CPU_SANITIZE)
    static constexpr bool kHasRegisterTile = false;
#else
    static constexpr bool kHasRegisterTile = true;
#endif
    using Sum = Ints;
    using Panel = Ints;
    using Group = Ints;
    static SAGE_INLINE Sum begin(int32_t x) { return set(x); }
    static SAGE_INLINE Sum times_256(Sum x) { return shift_left<8>(x); }
    static SAGE_INLINE Ints total(Sum x) { return x; }
    template <bool SignedA>
    static SAGE_INLINE Sum dot(Sum sum, Group a, Panel b) {
        return SignedA ? _mm512_dpbusd_epi32(sum, b, a) : _mm512_dpbusd_epi32(sum, a, b);
    }
    static SAGE_INLINE Panel load_panel(const void* p) { return _mm512_loadu_si512(p); }
    static SAGE_INLINE Group broadcast_group(const Element* p) {  // four consecutive elements
        int32_t group;
        __builtin_memcpy(&group, p, sizeof group);
        return _mm512_set1_epi32(group);
    }

 private:
    template <class Fold>
    static SAGE_INLINE void reduce_each(const Floats* x, float* results, Fold fold) {
        Floats halves[4], quarters[2];  // one vector's lanes in each half, then in each quarter
        for (int i = 0; i < 4; i++)
            halves[i] = fold(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x44),
                             _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xee));
        for (int i = 0; i < 2; i++)
            quarters[i] = fold(_mm512_shuffle_f32x4(halves[2 * i], halves[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(halves[2 * i], halves[2 * i + 1], 0xdd));
        Floats pairs = fold(_mm512_unpacklo_ps(quarters[0], quarters[1]),
                            _mm512_unpackhi_ps(quarters[0], quarters[1]));
        pairs = fold(pairs, _mm512_shuffle_ps(pairs, pairs, 0x4e));
        // Quarter i holds the results of vectors i and 4 + i in its first two lanes.
        __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm256_storeu_ps(results, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, pairs)));
    }
};

}  // namespace
}  // namespace sage_cpu
