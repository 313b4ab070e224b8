"""Models, servers, interleaved timing and provenance that the benchmarks share."""
