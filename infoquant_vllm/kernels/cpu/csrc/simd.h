// What products of bytes need beside `rows.h`: dot products within lanes.
#pragma once
#include "rows.h"

#define INLINE static inline __attribute__((always_inline))

namespace infoquant {

typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));

template <typename V>
INLINE V load(const void* from) {
    V vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

// The first `count` elements (all, if there are more), zeros after them.
template <typename V, typename T>
INLINE V load_some(const T* from, int64_t count) {
    if (count * sizeof(T) >= sizeof(V)) return load<V>(from);
    V vector{};
    memcpy(&vector, from, count * sizeof(T));
    return vector;
}

// acc + the sum over the four bytes of each lane of weight (unsigned) times input (signed), exactly.
// `wide`: a pair's sum may exceed 16 bits.
INLINE Ints dot(Ints acc, Bytes weight, Ints input, [[maybe_unused]] bool wide) {
#ifdef __AVX512VNNI__
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weight, (__m512i)input);
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)weight, (__m256i)input);
#else
    const __m256i w = (__m256i)weight, x = (__m256i)input;
    if (!wide) {
        const __m256i pairs = _mm256_maddubs_epi16(w, x);
        return acc + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xFF)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return acc + (Ints)even + (Ints)odd;
#endif
}

}  // namespace infoquant
