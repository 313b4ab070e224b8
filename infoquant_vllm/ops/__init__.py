"""One operation per file: what vLLM's graph sees, and which kernel does it."""
