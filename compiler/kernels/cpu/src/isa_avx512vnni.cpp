#if defined(__x86_64__)
#include "simd_avx512.hpp"
// What follows needs an instruction set.
#include "kernels.hpp"
#include "register_tile_avx512.hpp"

namespace sage_cpu {
constinit const Kernels kAvx512Vnni = make_kernels();
}
#endif
