#if defined(__x86_64__)
#include "src/simd_avx512.hpp"
// What follows needs an instruction set.
#include "float_attend.hpp"

namespace sage_ort {
constexpr FloatKernels kFloatAvx512 = make_float_kernels();
}
#endif
