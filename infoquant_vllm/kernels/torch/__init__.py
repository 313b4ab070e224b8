"""Kernels in vectorized torch: the definition of each operation, and what serves without compiled kernels.

The compiled library and the Triton kernels give the same bits unless their docstrings name a difference. The naive
oracles of tests/common/oracles.py check all three.
"""
