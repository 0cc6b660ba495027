// Every atom, with registers filled and read as CuTe's MMA_Traits says: one warp, one product.
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm89.hpp>
#include <sage/arch.cuh>

namespace atoms {

using namespace sage;

// The codes of the elements, one in each word, row by row.
struct Params {
    uint32_t const* a;  // (16, K)
    uint32_t const* b;  // (8, K)
    uint32_t* c;        // (16, 8): bits of the accumulators, added to
};

// Elements of a thread in its registers, `kBits` each, to or from a matrix of kRows rows in memory.
// CuTe's layouts map (thread, element) to row + kRows * column.
template <class Layout, int kRows, int kColumns, int kBits, class Visit>
SAGE_DEVICE void each_element(Visit visit) {
    constexpr int kElements = cute::size<1>(Layout{});
    static_assert(cute::size<0>(Layout{}) == 32 && kElements * 32 == kRows * kColumns);
    for (int element = 0; element < kElements; ++element) {
        int const index = Layout{}(arch::thread_index(), element);
        visit(index % kRows * kColumns + index / kRows, element * kBits / 32, element * kBits % 32);
    }
}

template <class Atom>
struct Kernel {
    using Params = atoms::Params;
    static constexpr int kThreads = 32, kSharedBytes = 0, kMinBlocks = 1;

    SAGE_DEVICE static void run(Params const& p) {
        using Traits = cute::MMA_Traits<typename Atom::Cute>;
        constexpr int kK = cute::size<2>(typename Traits::Shape_MNK{});
        constexpr int kBits = 32 * 8 / kK;
        constexpr int kAccumulatorBits = 32 * Atom::kAccumulators / 4;
        static_assert(cute::size<0>(typename Traits::Shape_MNK{}) == 16);
        static_assert(cute::size<1>(typename Traits::Shape_MNK{}) == 8);

        uint32_t a[4] = {}, b[2] = {}, bits[Atom::kAccumulators] = {};
        each_element<typename Traits::ALayout, 16, kK, kBits>([&](int index, int word, int shift) {
            a[word] |= arch::load_global(p.a + index) << shift;
        });
        each_element<typename Traits::BLayout, 8, kK, kBits>([&](int index, int word, int shift) {
            b[word] |= arch::load_global(p.b + index) << shift;
        });
        using CLayout = typename Traits::CLayout;
        each_element<CLayout, 16, 8, kAccumulatorBits>([&](int index, int word, int shift) {
            bits[word] |= arch::load_global(p.c + index) << shift;
        });
        typename Atom::Accumulator c[Atom::kAccumulators];
        std::memcpy(c, bits, sizeof c);
        arch::mma<Atom>(c, a, b);
        std::memcpy(bits, c, sizeof c);
        each_element<CLayout, 16, 8, kAccumulatorBits>([&](int index, int word, int shift) {
            uint32_t const mask = ~0u >> (32 - kAccumulatorBits);
            arch::store_global(p.c + index, bits[word] >> shift & mask);
        });
    }
};

}  // namespace atoms

#define ATOM(name) SAGE_KERNEL(name, 32, 0, sizeof(atoms::Params), atoms::Kernel<sage::arch::name>)

ATOM(MmaS4)
ATOM(MmaS8)
ATOM(MmaE4m3)
ATOM(MmaE4m3Half)
ATOM(MmaF16)
ATOM(MmaTf32)
