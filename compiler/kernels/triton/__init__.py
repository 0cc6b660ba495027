"""The INT8 recipe in Triton, for GPUs that no CUTLASS kernel can be had for."""
