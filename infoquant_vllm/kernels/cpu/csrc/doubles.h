// Vectors of float64, half as many as of float32.
#pragma once

#include "floats.h"

namespace infoquant {

constexpr int WIDTH = LANES / 2;  // float64 in a vector
typedef double Doubles __attribute__((vector_size(8 * WIDTH)));

inline Doubles widen(const float* source) {
#ifdef __AVX512F__
    return _mm512_cvtps_pd(_mm256_loadu_ps(source));
#else
    return _mm256_cvtps_pd(_mm_loadu_ps(source));
#endif
}

inline void narrow(float* target, Doubles v) {
#ifdef __AVX512F__
    _mm256_storeu_ps(target, _mm512_cvtpd_ps(v));
#else
    _mm_storeu_ps(target, _mm256_cvtpd_ps(v));
#endif
}

inline Doubles fma(Doubles a, Doubles b, Doubles c) {
#ifdef __AVX512F__
    return _mm512_fmadd_pd(a, b, c);
#else
    return _mm256_fmadd_pd(a, b, c);
#endif
}

}  // namespace infoquant
