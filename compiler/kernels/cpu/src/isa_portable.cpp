#include "simd_portable.hpp"
// What follows needs an instruction set.
#include "kernels.hpp"

namespace sage_cpu {
constinit const Kernels kPortable = make_kernels();
}
