"""Run the demo, and measure speed, memory and accuracy of served models and of kernels; see README.md.

Tests share the servers and the scoring with the benchmarks.
"""
