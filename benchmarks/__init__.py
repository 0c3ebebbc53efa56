"""What velm_kernels buys, in time and memory: ``python -m benchmarks``."""
