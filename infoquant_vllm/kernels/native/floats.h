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

}  // namespace infoquant
