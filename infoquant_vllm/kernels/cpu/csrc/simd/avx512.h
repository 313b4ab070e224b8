// Operations on the registers of AVX-512; simd.h has the types.
#pragma once

namespace infoquant {

// a * b + c, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }

// Like the instructions of AVX2: b where a or b is NaN, and where both are zeros.
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }

// Over all lanes, of lanes 8 apart first, then 4, 2 and 1.
inline float hmin(Floats v) {
    return hmin8(_mm256_min_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
inline float hmax(Floats v) {
    return hmax8(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}

// To nearest, ties to even. Integers that do not fit become the least one.
inline Floats round(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
inline Ints round_to_int(Floats v) { return (Ints)_mm512_cvtps_epi32(v); }

// acc + the sum over the four bytes of each lane of codes (unsigned) times x (signed), exactly. wide: for AVX2, which
// is faster where the sum of a pair of products is known to fit 16 bits.
INLINE Ints dot(Ints acc, Bytes codes, Ints x, [[maybe_unused]] bool wide) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
}

// The upper 16 bits of the products.
inline Words multiply_high(Words a, Words b) { return (Words)_mm512_mulhi_epu16((__m512i)a, (__m512i)b); }

// 4 * LANES integers within -128 .. 127 as bytes.
inline void store_bytes(int8_t* to, Ints a, Ints b, Ints c, Ints d) {
    // Packing leaves the 128-bit lanes of the four side by side.
    const __m512i low = _mm512_packs_epi32((__m512i)a, (__m512i)b), high = _mm512_packs_epi32((__m512i)c, (__m512i)d);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
}

// LANES unsigned bytes; GCC 12 takes __builtin_convertvector of bytes apart into scalars.
inline Ints widen_bytes(const uint8_t* from) { return (Ints)_mm512_cvtepu8_epi32(load<__m128i>(from)); }

// table[index] for LANES indices.
inline Floats gather(const float* table, const uint16_t* indices) {
    return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(load<__m256i>(indices)), table, 4);
}

inline Floats from_float16(Halves v) { return _mm512_cvtph_ps((__m256i)v); }
// GCC 12 splits __builtin_convertvector of 16 lanes into halves, which made norms and RoPE 1.4 times slower.
inline Floats from_bfloat16(Halves v) { return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16); }

inline Halves to_float16(Floats v) { return (Halves)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline Doubles widen(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
inline void narrow(float* to, Doubles v) { _mm256_storeu_ps(to, _mm512_cvtpd_ps(v)); }

}  // namespace infoquant
