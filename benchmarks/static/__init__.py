"""What can be said of the GPU kernels without a GPU: what they compile to, and what that predicts."""
