"""GPU kernels in Triton, one operation per file; the reference says what each means."""
