"""Transform and round tensors: pure functions, one algorithm per file, without files, models or progress."""
