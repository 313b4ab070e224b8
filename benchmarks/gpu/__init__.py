"""What is run on a machine with a GPU, by run.sh; the rest of the benchmarks needs none."""
