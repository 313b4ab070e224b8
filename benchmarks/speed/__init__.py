"""Time kernels, layers and servers against baselines, interleaved, and measure memory."""
