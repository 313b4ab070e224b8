// Reads memory as fast as one thread can: the bound that benchmarks compare kernels to that stream weights.
#include "kernels.h"

namespace infoquant {

// Four streams with software prefetch: one alone is slower, since the hardware prefetcher stops at each page.
void read_memory(const uint8_t* from, int64_t bytes, uint8_t* to) {
    constexpr int STREAMS = 4;
    Ints sums[STREAMS] = {};
    const int64_t apart = bytes / STREAMS;
    for (int64_t i = 0; i < apart; i += 64) {
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; s++) {
            const uint8_t* const line = from + s * apart + i;
            _mm_prefetch(line + 1024, _MM_HINT_T0);
            for (int part = 0; part < 64; part += sizeof(Ints)) sums[s] ^= load<Ints>(line + part);
        }
    }
    const Ints sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    store(to, sum);
}

}  // namespace infoquant
