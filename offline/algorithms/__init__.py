"""Transform and round tensors: the mathematics, one algorithm per file."""
