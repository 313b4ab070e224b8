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

// The nearest integers, ties to even.
inline Ints nearest(Floats v) {
#ifdef __AVX512F__
    return (Ints)_mm512_cvtps_epi32(v);
#else
    return (Ints)_mm256_cvtps_epi32(v);
#endif
}

// Lanes of 0 .. 255 as bytes.
inline void store_bytes(uint8_t* target, Ints v) {
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i*)target, _mm512_cvtepi32_epi8((__m512i)v));
#else
    const __m256i words = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const int32_t halves[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
    std::memcpy(target, halves, sizeof halves);
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
