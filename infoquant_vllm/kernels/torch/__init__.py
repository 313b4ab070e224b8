"""CPU kernels: int8 products of oneDNN through torch, vectorized torch around them."""
