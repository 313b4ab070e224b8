"""Kernels for GPUs, sm_80 and later, in Triton; one per file, beside the launchers that the operations call."""
