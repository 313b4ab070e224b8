"""CPU kernels: int8 products of oneDNN through torch, vectorised torch around them."""
