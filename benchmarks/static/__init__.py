"""Examine the GPU kernels without a GPU: the code that they compile to, and what it predicts."""
