// The version of the operations: library.py refuses a library compiled from other sources.
#include <cstdint>

extern "C" int64_t infoquant_abi_version() { return 9; }
