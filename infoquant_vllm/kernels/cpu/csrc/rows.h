// Rows of numbers in any of the three dtypes, to float32 and back.
#pragma once

#include "floats.h"

namespace infoquant {

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };  // as library.py numbers them

typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Halves to_float16(Floats x) {
#ifdef __AVX512F__
    return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#endif
}

// To nearest, ties to even, as torch does it.
inline Halves to_bfloat16(Floats x) {
#ifdef __AVX512BF16__
    constexpr int DENORMAL = 0x20;  // which the instruction would lose
    if (__builtin_expect(_mm512_fpclass_ps_mask(x, DENORMAL) == 0, true)) return (Halves)_mm512_cvtneps_pbh(x);
#endif
    const Ints bits = (Ints)x;
    const Ints rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : Ints{} + 0x7FC0, Halves);
}

template <int64_t DTYPE>
inline Floats load_as(const void* source) {
    if (DTYPE == FLOAT32) return load(static_cast<const float*>(source));
    return DTYPE == BFLOAT16 ? from_bfloat16(static_cast<const uint16_t*>(source))
                             : from_float16(static_cast<const uint16_t*>(source));
}

// Elements first .. first + count of x to float32.
template <int64_t DTYPE>
inline void load_rows(const void* x, int64_t first, int64_t count, float* target) {
    constexpr int64_t BYTES = DTYPE == FLOAT32 ? 4 : 2;
    const char* source = static_cast<const char*>(x) + first * BYTES;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        __builtin_prefetch(source + (count + i) * BYTES);  // the next rows, which come in while these are worked on
        store(target + i, load_as<DTYPE>(source + i * BYTES));
    }
    if (i == count) return;
    char last[4 * LANES] = {};
    std::memcpy(last, source + i * BYTES, (count - i) * BYTES);
    store_some(target + i, load_as<DTYPE>(last), count - i);
}

inline void load_rows(const void* x, int64_t dtype, int64_t first, int64_t count, float* target) {
    if (dtype == FLOAT32) return load_rows<FLOAT32>(x, first, count, target);
    if (dtype == BFLOAT16) return load_rows<BFLOAT16>(x, first, count, target);
    load_rows<FLOAT16>(x, first, count, target);
}

// `count` values to elements first .. first + count of out, rounded to its dtype.
inline void store_rows(const float* values, int64_t first, int64_t count, void* out, int64_t dtype) {
    if (dtype == FLOAT32) {
        std::memcpy(static_cast<float*>(out) + first, values, count * sizeof(float));
        return;
    }
    uint16_t* const target = static_cast<uint16_t*>(out) + first;
    const auto rounded = [&](Floats v) { return dtype == BFLOAT16 ? to_bfloat16(v) : to_float16(v); };
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Halves halves = rounded(load(values + i));
        std::memcpy(target + i, &halves, sizeof halves);
    }
    if (i == count) return;
    const Halves halves = rounded(load_some(values + i, count - i));
    std::memcpy(target + i, &halves, (count - i) * sizeof(uint16_t));
}

// `count` elements from `first` on, LANES or fewer, zeros behind them.
template <int64_t DTYPE>
inline Floats load_part(const void* x, int64_t first, int64_t count) {
    constexpr int64_t BYTES = DTYPE == FLOAT32 ? 4 : 2;
    const char* const from = static_cast<const char*>(x) + first * BYTES;
    if (count >= LANES) return load_as<DTYPE>(from);
    char some[4 * LANES] = {};
    std::memcpy(some, from, count * BYTES);
    return load_as<DTYPE>(some);
}

template <int64_t DTYPE>
inline void store_part(void* out, int64_t first, int64_t count, Floats v) {
    constexpr int64_t BYTES = DTYPE == FLOAT32 ? 4 : 2;
    char* const to = static_cast<char*>(out) + first * BYTES;
    const auto copy = [&](const auto& values) {
        if (count >= LANES) {
            std::memcpy(to, &values, sizeof values);
        } else {
            std::memcpy(to, &values, count * BYTES);
        }
    };
    if constexpr (DTYPE == FLOAT32) {
        copy(v);
    } else {
        copy(DTYPE == BFLOAT16 ? to_bfloat16(v) : to_float16(v));
    }
}

// To what the dtype can hold.
template <int64_t DTYPE>
inline Floats rounded(Floats v) {
    if constexpr (DTYPE == FLOAT32) return v;
    const Halves halves = DTYPE == BFLOAT16 ? to_bfloat16(v) : to_float16(v);
    return load_as<DTYPE>(&halves);
}

}  // namespace infoquant
