"""The CUDA kernels: specified, rendered, built, cached and launched, without nvcc."""
