"""Complete models that use velm_kernels, trained and evaluated on real data."""
