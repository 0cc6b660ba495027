"""Kernels of the operator sage::attention, and the registry that chooses among them."""
