// Reads memory as fast as one thread can: what benchmarks hold against kernels that are bound by reading weights.
#include "kernels.h"
#include "simd.h"

using namespace infoquant;

// Four streams with prefetches: one alone is slower, since every page starts its prefetching anew.
void infoquant::read(const uint8_t* from, int64_t bytes, uint8_t* to) {
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
    memcpy(to, &sum, sizeof sum);
}
