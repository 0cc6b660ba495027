// Products of a warpgroup, with operands laid out, and registers filled and read, as CuTe says.
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <sage/arch/hopper.cuh>

namespace products {

using namespace sage;
namespace gmma = cute::SM90::GMMA;

struct Params {
    uint8_t const* a;  // (64, K) codes
    uint8_t const* b;  // (N, K)
    uint32_t* c;       // (64, N): bits of the accumulators, added to
    int64_t wrong;     // 1: a descriptor with the swizzle of another width
};

template <int kRowBytes>
using RowsAtom = cute::conditional_t<kRowBytes == 128, gmma::Layout_K_SW128_Atom<uint8_t>,
                                     gmma::Layout_K_SW64_Atom<uint8_t>>;

// A matrix of kRows rows and kK bytes, in columns of kRowBytes, in CuTe's canonical layout.
template <int kRows, int kK, int kRowBytes>
struct Matrix {
    static constexpr int kBytes = kRows * kK;
    using Layout = decltype(cute::tile_to_shape(RowsAtom<kRowBytes>{},
                                                cute::Shape<cute::Int<kRows>, cute::Int<kK>>{}));

    SAGE_DEVICE static void fill(char* shared, uint8_t const* codes) {
        for (int i = arch::thread_index(); i < kBytes; i += 128) {
            int const offset = Layout{}(i / kK, i % kK);
            arch::store_shared(reinterpret_cast<uint8_t*>(shared) + offset,
                               arch::load_global(codes + i));
        }
    }

    SAGE_DEVICE static uint64_t step(char const* shared, int step, bool wrong) {
        int const byte = step * 32;
        char const* const start = shared + byte / kRowBytes * kRows * kRowBytes + byte % kRowBytes;
        constexpr int kOther = kRowBytes == 128 ? 64 : 128;
        return wrong ? arch::matrix_rows<kOther>(start - byte % kRowBytes)
                     : arch::matrix_rows<kRowBytes>(start);
    }
};

// CuTe's layouts map (thread, element) to row + 64 * column.
template <class Layout, int kColumns, class Visit>
SAGE_DEVICE void each_element(Visit visit) {
    static_assert(cute::size<0>(Layout{}) == 128);
    for (int element = 0; element < cute::size<1>(Layout{}); ++element) {
        int const index = Layout{}(arch::thread_index(), element);
        visit(index % 64 * kColumns + index / 64, element);
    }
}

template <bool kIntegers, int kN, int kK, int kRowBytes, class CuteAtom>
struct Kernel {
    using Params = products::Params;
    using A = Matrix<64, kK, kRowBytes>;
    using B = Matrix<kN, kK, kRowBytes>;
    using Traits = cute::MMA_Traits<CuteAtom>;
    static constexpr int kThreads = 128, kSharedBytes = A::kBytes + B::kBytes, kMinBlocks = 1;

    SAGE_DEVICE static void run(Params const& p) {
        char* const shared = arch::shared_memory();
        A::fill(shared, p.a);
        B::fill(shared + A::kBytes, p.b);
        arch::fence_async();
        arch::barrier();

        cute::conditional_t<kIntegers, uint32_t, float> c[kN / 2];
        uint32_t bits[kN / 2];
        each_element<typename Traits::CLayout, kN>(
            [&](int index, int element) { bits[element] = arch::load_global(p.c + index); });
        std::memcpy(c, bits, sizeof c);
        uint32_t a[kK / 32][4] = {};
        if constexpr (!kIntegers) {
            for (int step = 0; step < kK / 32; ++step) {
                each_element<typename Traits::ALayout, 32>([&](int index, int element) {
                    uint32_t const code =
                        arch::load_global(p.a + index / 32 * kK + step * 32 + index % 32);
                    a[step][element / 4] |= code << element % 4 * 8;
                });
            }
        }
        arch::wgmma_fence();
        for (int step = 0; step < kK / 32; ++step) {
            uint64_t const b = B::step(shared + A::kBytes, step, p.wrong == 1);
            if constexpr (kIntegers) {
                arch::wgmma_s8<kN>(c, A::step(shared, step, false), b, true);
            } else {
                arch::wgmma_e4m3<kN>(c, a[step], b, true);
            }
        }
        arch::wgmma_commit();
        arch::wgmma_wait<0>();
        std::memcpy(bits, c, sizeof c);
        each_element<typename Traits::CLayout, kN>(
            [&](int index, int element) { arch::store_global(p.c + index, bits[element]); });
    }
};

// c (2): the descriptor that CuTe makes of a matrix at the start of memory, and the layer's.
template <int kRowBytes>
struct Descriptor {
    using Params = products::Params;
    static constexpr int kThreads = 128, kSharedBytes = 1024, kMinBlocks = 1;

    SAGE_DEVICE static void run(Params const& p) {
        if (arch::thread_index() != 0) return;
        using Layout = typename Matrix<64, kRowBytes, kRowBytes>::Layout;
        auto const whole = cute::make_tensor(
            cute::make_smem_ptr(reinterpret_cast<uint8_t*>(arch::shared_memory())), Layout{});
        auto const step =
            cute::local_tile(whole, cute::Shape<cute::_64, cute::_32>{}, cute::make_coord(0, 0));
        uint64_t const expected = gmma::make_gmma_desc<gmma::Major::K>(step).desc_;
        uint64_t const own = arch::matrix_rows<kRowBytes>(arch::shared_memory());
        arch::store_global(reinterpret_cast<uint64_t*>(p.c), expected);
        arch::store_global(reinterpret_cast<uint64_t*>(p.c) + 1, own);
    }
};

}  // namespace products

#define INTEGERS(n, k, row)                                                        \
    SAGE_KERNEL(s8_##n##_##k##_##row, 128, (64 + n) * k, sizeof(products::Params), \
                products::Kernel<true, n, k, row, products::gmma::MMA_64x##n##x32_S32S8S8_SS_TN>)
#define FLOATS(n, k, row)                                                    \
    SAGE_KERNEL(                                                             \
        e4m3_##n##_##k##_##row, 128, (64 + n) * k, sizeof(products::Params), \
        products::Kernel<false, n, k, row, products::gmma::MMA_64x##n##x32_F32E4M3E4M3_RS_TN<>>)

INTEGERS(64, 64, 64)
INTEGERS(128, 64, 64)
INTEGERS(128, 128, 128)
INTEGERS(128, 256, 128)
FLOATS(64, 64, 64)
FLOATS(96, 128, 64)
FLOATS(128, 128, 128)
FLOATS(256, 64, 64)
SAGE_KERNEL(descriptor_128, 128, 1024, sizeof(products::Params), products::Descriptor<128>)
SAGE_KERNEL(descriptor_64, 128, 1024, sizeof(products::Params), products::Descriptor<64>)
