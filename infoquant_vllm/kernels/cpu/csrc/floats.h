// Vectors of float32, as wide as the registers of the target that is compiled for.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace infoquant {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Floats load(const float* source) {
    Floats v;
    std::memcpy(&v, source, sizeof v);
    return v;
}

inline void store(float* target, Floats v) { std::memcpy(target, &v, sizeof v); }

// The first `count` lanes, as many as there are or fewer.
inline Floats load_some(const float* source, int64_t count) {
    if (count >= LANES) return load(source);
    Floats v{};
    std::memcpy(&v, source, count * sizeof(float));
    return v;
}

inline void store_some(float* target, Floats v, int64_t count) {
    if (count >= LANES) return store(target, v);
    std::memcpy(target, &v, count * sizeof(float));
}

inline Floats splat(float value) {
#ifdef __AVX512F__
    return _mm512_set1_ps(value);
#else
    return _mm256_set1_ps(value);
#endif
}

// a * b + c, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) {
#ifdef __AVX512F__
    return _mm512_fmadd_ps(a, b, c);
#else
    return _mm256_fmadd_ps(a, b, c);
#endif
}

inline Floats smaller(Floats a, Floats b) {
#ifdef __AVX512F__
    return _mm512_min_ps(a, b);
#else
    return _mm256_min_ps(a, b);
#endif
}

inline Floats larger(Floats a, Floats b) {
#ifdef __AVX512F__
    return _mm512_max_ps(a, b);
#else
    return _mm256_max_ps(a, b);
#endif
}

// Over all lanes.
inline float smallest(Floats v) {
#ifdef __AVX512F__
    return _mm512_reduce_min_ps(v);
#else
    const __m128 half = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(pair, _mm_movehdup_ps(pair)));
#endif
}

// The nearest integers, ties to even; the least integer for what is beyond them all.
inline Ints nearest(Floats v) {
#ifdef __AVX512F__
    return (Ints)_mm512_cvtps_epi32(v);
#else
    return (Ints)_mm256_cvtps_epi32(v);
#endif
}

// 4 * LANES integers plus an offset, at least 0, as bytes. The sums are at most 255, the offset below 2^15.
inline void store_codes(uint8_t* target, Ints a, Ints b, Ints c, Ints d, int16_t offset) {
    // Packing saturates, and leaves the 128-bit lanes of the four side by side.
#ifdef __AVX512F__
    const __m512i all = _mm512_set1_epi16(offset);
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b), all);
    const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32((__m512i)c, (__m512i)d), all);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(target, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
#else
    const __m256i all = _mm256_set1_epi16(offset);
    const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32((__m256i)a, (__m256i)b), all);
    const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32((__m256i)c, (__m256i)d), all);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)target, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
#endif
}

// table[place] for LANES places.
inline Floats look_up(const float* table, const uint16_t* places) {
#ifdef __AVX512F__
    return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)places)), table, 4);
#else
    return _mm256_i32gather_ps(table, _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)places)), 4);
#endif
}

inline Floats from_float16(const uint16_t* source) {
#ifdef __AVX512F__
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source));
#else
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source));
#endif
}

inline Floats from_bfloat16(const uint16_t* source) {
#ifdef __AVX512F__
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)source)), 16);
#else
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)source)), 16);
#endif
}

}  // namespace infoquant
