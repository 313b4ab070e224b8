// Vectors of one register, 16 lanes with AVX-512 and 8 without, and rows of float32, bfloat16 or float16 read into
// them. Arithmetic is the compiler's; avx512.h and avx2.h have the operations for which it has no operators.
// The names that end in 16 are always 16 lanes wide: with AVX2 they take two registers.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// Vectors of two registers are passed by value to functions that are always inlined, so their ABI does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

namespace infoquant {

#ifdef __AVX512F__
constexpr int LANES = 16;  // 32-bit lanes of a register
#else
constexpr int LANES = 8;
#endif
constexpr int DOUBLE_LANES = LANES / 2, LANES16 = 16;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
typedef uint16_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));  // bits of float16 or bfloat16
typedef double Doubles __attribute__((vector_size(4 * LANES)));

typedef float Floats16 __attribute__((vector_size(64)));
typedef int32_t Ints16 __attribute__((vector_size(64)));
typedef uint8_t Bytes16 __attribute__((vector_size(64)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));
typedef int8_t Int8s16 __attribute__((vector_size(16)));

template <typename V = Floats>
inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <typename V>
inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// Subtracting zero keeps every value as it is, -0.0 too.
inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat(int32_t x) { return x - Ints{}; }
inline Doubles splat(double x) { return x - Doubles{}; }
inline Floats16 splat16(float x) { return x - Floats16{}; }
inline Ints16 splat16(int32_t x) { return x - Ints16{}; }

#ifdef __AVX512F__
inline Ints lane_index() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
#else
inline Ints lane_index() { return Ints{0, 1, 2, 3, 4, 5, 6, 7}; }
#endif
inline Ints16 lane_index16() { return Ints16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Lane i of the result is lane i ^ distance of v.
inline Floats16 xor_shuffle(Floats16 v, int distance) { return __builtin_shuffle(v, lane_index16() ^ distance); }

// The minimum of all lanes: of lanes 4 apart first, then of those 2 and 1 apart.
inline float hmin8(__m256 v) {
    const __m128 four = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

inline float hmax8(__m256 v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace infoquant

#ifdef __AVX512F__
#include "simd/avx512.h"
#else
#include "simd/avx2.h"
#endif

namespace infoquant {

// The first `count` elements (all, if count is larger), zeros after them.
template <typename V = Floats, typename T>
inline V load_some(const T* from, int64_t count) {
    if (count >= static_cast<int64_t>(sizeof(V) / sizeof(T))) return load<V>(from);
    V v{};
    std::memcpy(&v, from, count * sizeof(T));
    return v;
}

inline void store_some(float* to, Floats v, int64_t count) {
    if (count >= LANES) return store(to, v);
    std::memcpy(to, &v, count * sizeof(float));
}

inline uint16_t to_float16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline float from_float16(uint16_t bits) { return _cvtsh_ss(bits); }

// Lane i of the result is reduce(all lanes of vectors[i]), where reduce takes two vectors; `vectors` are overwritten.
template <typename Reduce>
INLINE Floats reduce_each(Floats (&vectors)[LANES], const Reduce& reduce) {
#pragma GCC unroll 4
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        const Ints second = (lane_index() & distance) != 0, own = lane_index() + (second & LANES);
#pragma GCC unroll 8
        for (int i = 0; i < distance; i++) {
            const Floats a = vectors[i], b = vectors[i + distance];
            vectors[i] = reduce(__builtin_shuffle(a, b, own), __builtin_shuffle(a, b, own ^ distance));
        }
    }
    return vectors[0];
}

enum Dtype : int64_t { FLOAT32, BFLOAT16, FLOAT16 };  // as library.py numbers them

constexpr int64_t element_bytes(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

inline const void* element(const void* x, Dtype dtype, int64_t index) {
    return static_cast<const char*>(x) + index * element_bytes(dtype);
}

inline void* element(void* x, Dtype dtype, int64_t index) {
    return static_cast<char*>(x) + index * element_bytes(dtype);
}

// Calls f with the dtype as a constant.
template <typename F>
inline void with_dtype(Dtype dtype, const F& f) {
    if (dtype == FLOAT32) return f(std::integral_constant<Dtype, FLOAT32>());
    if (dtype == BFLOAT16) return f(std::integral_constant<Dtype, BFLOAT16>());
    f(std::integral_constant<Dtype, FLOAT16>());
}

// Rounds to nearest, ties to even. A NaN needs its own branch: adding to its bits may carry into the sign and leave -0.
inline Halves to_bfloat16(Floats x) {
#ifdef __AVX512BF16__
    constexpr int DENORMAL = 0x20;  // the instruction flushes denormals to zero
    if (__builtin_expect(_mm512_fpclass_ps_mask(x, DENORMAL) == 0, true)) return (Halves)_mm512_cvtneps_pbh(x);
#endif
    const Ints bits = (Ints)x;
    const Ints rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : splat(0x7FC0), Halves);
}

template <Dtype DTYPE>
inline Floats load_as(const void* from) {
    if constexpr (DTYPE == FLOAT32) return load(from);
    if constexpr (DTYPE == BFLOAT16) return from_bfloat16(load<Halves>(from));
    return from_float16(load<Halves>(from));
}

// v in the dtype: Floats or Halves.
template <Dtype DTYPE>
inline auto to_dtype(Floats v) {
    if constexpr (DTYPE == FLOAT32) {
        return v;
    } else {
        return DTYPE == BFLOAT16 ? to_bfloat16(v) : to_float16(v);
    }
}

// v rounded to what the dtype can hold.
template <Dtype DTYPE>
inline Floats round_to(Floats v) {
    const auto rounded = to_dtype<DTYPE>(v);
    return load_as<DTYPE>(&rounded);
}

// `count` elements of x from `first` on (LANES at most), zeros after them.
template <Dtype DTYPE>
inline Floats load_part(const void* x, int64_t first, int64_t count) {
    const void* const from = element(x, DTYPE, first);
    if (count >= LANES) return load_as<DTYPE>(from);
    char padded[4 * LANES] = {};
    std::memcpy(padded, from, count * element_bytes(DTYPE));
    return load_as<DTYPE>(padded);
}

template <Dtype DTYPE>
inline void store_part(void* out, int64_t first, int64_t count, Floats v) {
    void* const to = element(out, DTYPE, first);
    const auto values = to_dtype<DTYPE>(v);
    if (count >= LANES) return store(to, values);
    std::memcpy(to, &values, count * element_bytes(DTYPE));
}

// Elements first .. first + count of x to float32.
template <Dtype DTYPE>
inline void load_rows(const void* x, int64_t first, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        __builtin_prefetch(element(x, DTYPE, first + count + i));  // the next rows, while these are worked on
        store(to + i, load_as<DTYPE>(element(x, DTYPE, first + i)));
    }
    if (i < count) store_some(to + i, load_part<DTYPE>(x, first + i, count - i), count - i);
}

inline void load_rows(const void* x, Dtype dtype, int64_t first, int64_t count, float* to) {
    with_dtype(dtype, [&](auto constant) { load_rows<constant>(x, first, count, to); });
}

// `count` values to elements first .. first + count of out, rounded to its dtype.
inline void store_rows(const float* values, int64_t first, int64_t count, void* out, Dtype dtype) {
    with_dtype(dtype, [&](auto constant) {
        for (int64_t i = 0; i < count; i += LANES) {
            store_part<constant>(out, first + i, count - i, load_some(values + i, count - i));
        }
    });
}

}  // namespace infoquant
