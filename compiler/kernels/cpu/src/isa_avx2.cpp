#if defined(__x86_64__)
#include "simd_avx2.hpp"
// What follows needs an instruction set.
#include "kernels.hpp"
#include "register_tile_avx2.hpp"

namespace sage_cpu {
constinit const Kernels kAvx2 = make_kernels();
}
#endif
