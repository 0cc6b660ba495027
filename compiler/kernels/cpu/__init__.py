"""The native CPU kernel: a C++ library behind a C ABI (``sage_cpu.h``), and its binding."""
