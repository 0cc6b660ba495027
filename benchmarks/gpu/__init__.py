"""The CUDA kernels on a GPU: right first, then how fast. ``make gpu`` runs it."""
