// What the lanes of a warp compute together.
#pragma once

#include <sage/host/runtime.hpp>

namespace sage::host {

constexpr int kLanes = 32;

char const* name_of(Collective operation);

// Does the operation for the lanes' arguments, which are structs of its kind. The caller has
// checked the addresses and that all lanes ask for the same.
void perform(Collective operation, void* const (&arguments)[kLanes]);

}  // namespace sage::host
