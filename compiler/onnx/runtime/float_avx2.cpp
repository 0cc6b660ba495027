#if defined(__x86_64__)
#include "src/simd_avx2.hpp"
// What follows needs an instruction set.
#include "float_attend.hpp"

namespace sage_ort {
constexpr FloatKernels kFloatAvx2 = make_float_kernels();
}
#endif
