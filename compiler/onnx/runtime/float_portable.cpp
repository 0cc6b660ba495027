#include "src/simd_portable.hpp"
// What follows needs an instruction set.
#include "float_attend.hpp"

namespace sage_ort {
constexpr FloatKernels kFloatPortable = make_float_kernels();
}
