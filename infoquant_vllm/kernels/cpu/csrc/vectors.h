// Vectors of sixteen 32-bit lanes: arithmetic is the compiler's, what it has no operators for is here.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace vectors {

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef int8_t Narrow __attribute__((vector_size(16)));  // sixteen lanes of one byte
typedef uint16_t Halves __attribute__((vector_size(32)));  // sixteen lanes of 16 bits

template <typename Vector>
inline Vector load(const void* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <typename Vector>
inline void store(void* to, Vector v) {
    std::memcpy(to, &v, sizeof v);
}

inline Floats all(float x) { return x - Floats{}; }
inline Ints all(int32_t x) { return x - Ints{}; }
inline Ints lane_index() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

#if defined(__AVX512F__)
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

// Lane i of the result is lane i ^ distance of v.
inline Floats partner(Floats v, int distance) { return __builtin_shuffle(v, lane_index() ^ distance); }

inline float largest(Floats v) {
    for (int distance = LANES / 2; distance; distance /= 2) v = larger(v, partner(v, distance));
    return v[0];
}

inline float smallest(Floats v) {
    for (int distance = LANES / 2; distance; distance /= 2) v = smaller(v, partner(v, distance));
    return v[0];
}

// By halves: lane i and lane i + 8, then 4, 2, 1.
inline float sum(Floats v) {
    for (int distance = LANES / 2; distance; distance /= 2) v += partner(v, distance);
    return v[0];
}

#if defined(__AVX512F__)

inline Floats nearest(Floats v) { return (Floats)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
inline Ints nearest_integers(Floats v) { return (Ints)_mm512_cvtps_epi32((__m512)v); }
inline Floats from_halves(Halves v) { return (Floats)_mm512_cvtph_ps((__m256i)v); }
inline Halves to_halves(Floats v) { return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }

#else

inline Floats join(__m256 low, __m256 high) {
    Floats v;
    std::memcpy(&v, &low, sizeof low);
    std::memcpy((char*)&v + sizeof low, &high, sizeof high);
    return v;
}

inline __m256 half(Floats v, int which) { return load<__m256>((const char*)&v + 32 * which); }

inline Floats nearest(Floats v) {
    return join(_mm256_round_ps(half(v, 0), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(half(v, 1), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline Ints nearest_integers(Floats v) {
    return (Ints)join((__m256)_mm256_cvtps_epi32(half(v, 0)), (__m256)_mm256_cvtps_epi32(half(v, 1)));
}

inline Floats from_halves(Halves v) {
    return join(_mm256_cvtph_ps(load<__m128i>(&v)), _mm256_cvtph_ps(load<__m128i>((const char*)&v + 16)));
}

inline Halves to_halves(Floats v) {
    const __m128i parts[2] = {_mm256_cvtps_ph(half(v, 0), _MM_FROUND_TO_NEAREST_INT),
                              _mm256_cvtps_ph(half(v, 1), _MM_FROUND_TO_NEAREST_INT)};
    return load<Halves>(parts);
}

#endif

// Each lane plus the products of its four unsigned bytes of `codes` with its four signed bytes of `x`.
inline Ints dot4(Ints sums, Bytes codes, Ints x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x);
#else
    Ints out;
    for (int which = 0; which < 2; ++which) {
        const __m256i c = load<__m256i>((const char*)&codes + 32 * which);
        const __m256i s = load<__m256i>((const char*)&x + 32 * which);
        const __m256i before = load<__m256i>((const char*)&sums + 32 * which);
#if defined(__AVXVNNI__)
        const __m256i total = _mm256_dpbusd_avx_epi32(before, c, s);
#else
        // 16-bit products of pairs, the even bytes and the odd ones: no sum here can overflow.
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(0xFF)),
                                               _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(s, 8));
        const __m256i total = _mm256_add_epi32(before, _mm256_add_epi32(even, odd));
#endif
        std::memcpy((char*)&out + 32 * which, &total, sizeof total);
    }
    return out;
#endif
}

// Rows of float32, bfloat16 or float16, as float32. The numbers are those that the wrappers pass.
enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline int64_t element_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

inline Floats to_floats(const void* from, int64_t dtype) {
    if (dtype == FLOAT32) return load<Floats>(from);
    const Halves raw = load<Halves>(from);
    if (dtype == FLOAT16) return from_halves(raw);
    return (Floats)(__builtin_convertvector(raw, Words) << 16);
}

inline void from_floats(void* to, Floats v, int64_t dtype) {
    if (dtype == FLOAT32) {
        store(to, v);
    } else if (dtype == FLOAT16) {
        store(to, to_halves(v));
    } else {  // round to nearest, ties to even
        const Words bits = (Words)v;
        store(to, __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Halves));
    }
}

// `to` has room for a whole number of vectors, and is zero beyond `size`.
inline void load_row(float* to, const void* from, int64_t size, int64_t dtype) {
    const int64_t bytes = element_bytes(dtype), whole = size / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(to + i, to_floats((const char*)from + i * bytes, dtype));
    if (whole < size) {
        alignas(64) char tail[64] = {};
        std::memcpy(tail, (const char*)from + whole * bytes, (size - whole) * bytes);
        store(to + whole, to_floats(tail, dtype));
    }
}

// `from` holds a whole number of vectors.
inline void store_row(void* to, const float* from, int64_t size, int64_t dtype) {
    const int64_t bytes = element_bytes(dtype), whole = size / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) from_floats((char*)to + i * bytes, load<Floats>(from + i), dtype);
    if (whole < size) {
        alignas(64) char tail[64];
        from_floats(tail, load<Floats>(from + whole), dtype);
        std::memcpy((char*)to + whole * bytes, tail, (size - whole) * bytes);
    }
}

}  // namespace vectors
