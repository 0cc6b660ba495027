// Whether nobody else could have put there what a folder holds: it is run on the GPU with this
// user's rights.
#pragma once

#include "error.hpp"

namespace sage_cuda {

// As check_safe of compiler/kernels/cuda/cache.py: the folder and all above it belong to the user
// or the administrator, and no other user may write to them, but for folders above with a sticky
// bit.
bool check_safe(const char* folder, Error& error);

}  // namespace sage_cuda
