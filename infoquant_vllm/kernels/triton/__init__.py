"""Kernels for NVIDIA GPUs, sm_80 and later, in Triton, and the launchers that the operations call."""
