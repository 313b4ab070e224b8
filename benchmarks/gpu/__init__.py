"""Run on a machine with a GPU, by run.sh; the other benchmarks need none."""
