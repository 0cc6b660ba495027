// As crt/host_defines.h: CUDA's own checks which host compilers nvcc takes, which does not matter
// here.
#pragma once
