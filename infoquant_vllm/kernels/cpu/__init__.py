"""CPU kernels in C++, compiled when the package is installed (`hatch_build.py`), one library per kind of CPU."""
