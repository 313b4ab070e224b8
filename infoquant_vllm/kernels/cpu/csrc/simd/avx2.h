// Operations on the registers of AVX2, and on pairs of them as 16 lanes; simd.h has the types.
#pragma once

namespace infoquant {

// a * b + c, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }

// b where a or b is NaN, and where both are zeros.
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }

// Over all lanes, of lanes 4 apart first, then 2 and 1.
inline float hmin(Floats v) { return hmin8(v); }
inline float hmax(Floats v) { return hmax8(v); }

// To nearest, ties to even. Integers that do not fit become the least one.
inline Floats round(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Ints round_to_int(Floats v) { return (Ints)_mm256_cvtps_epi32(v); }

// acc + the sum over the four bytes of each lane of codes (unsigned) times x (signed), exactly. wide: the sum of a pair
// of products may exceed 16 bits.
INLINE Ints dot(Ints acc, Bytes codes, Ints x, [[maybe_unused]] bool wide) {
    const __m256i c = (__m256i)codes, s = (__m256i)x;
#ifdef __AVXVNNI__
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, c, s);
#else
    if (!wide) return acc + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(c, s), _mm256_set1_epi16(1));
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(0xFF)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(s, 8));
    return acc + (Ints)even + (Ints)odd;
#endif
}

// The sums of neighboring products of bytes (unsigned times signed), and of 16-bit integers. The first must fit 16 bits.
INLINE Words dot_pairs(Bytes codes, Ints x) { return (Words)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x); }
INLINE Ints dot_pairs(Words a, Ints b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

// The upper 16 bits of the products.
inline Words multiply_high(Words a, Words b) { return (Words)_mm256_mulhi_epu16((__m256i)a, (__m256i)b); }

// 4 * LANES integers within -128 .. 127 as bytes.
inline void store_bytes(int8_t* to, Ints a, Ints b, Ints c, Ints d) {
    // Packing leaves the 128-bit lanes of the four side by side.
    const __m256i low = _mm256_packs_epi32((__m256i)a, (__m256i)b), high = _mm256_packs_epi32((__m256i)c, (__m256i)d);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}

// LANES unsigned bytes; GCC 12 takes __builtin_convertvector of bytes apart into scalars.
inline Ints widen_bytes(const uint8_t* from) {
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

// table[index] for LANES indices.
inline Floats gather(const float* table, const uint16_t* indices) {
    return _mm256_i32gather_ps(table, _mm256_cvtepu16_epi32(load<__m128i>(indices)), 4);
}

inline Floats from_float16(Halves v) { return _mm256_cvtph_ps((__m128i)v); }
inline Floats from_bfloat16(Halves v) { return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16); }
inline Halves to_float16(Floats v) { return (Halves)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline Doubles widen(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
inline void narrow(float* to, Doubles v) { _mm_storeu_ps(to, _mm256_cvtpd_ps(v)); }

// Half 0 or 1 of a vector of 16 lanes, as a register.
template <typename V, typename V16>
inline V half(const V16& v, int which) {
    return load<V>(reinterpret_cast<const char*>(&v) + sizeof(V) * which);
}

template <typename V16, typename V>
inline V16 join(V low, V high) {
    const V halves[2] = {low, high};
    return load<V16>(halves);
}

inline Floats16 min(Floats16 a, Floats16 b) { return a < b ? a : b; }
inline Floats16 max(Floats16 a, Floats16 b) { return a > b ? a : b; }
inline float hmin(const Floats16& v) { return hmin8(min(half<Floats>(v, 0), half<Floats>(v, 1))); }
inline float hmax(const Floats16& v) { return hmax8(max(half<Floats>(v, 0), half<Floats>(v, 1))); }
inline Floats16 round(const Floats16& v) {
    return join<Floats16>(round(half<Floats>(v, 0)), round(half<Floats>(v, 1)));
}
inline Ints16 round_to_int(const Floats16& v) {
    return join<Ints16>(round_to_int(half<Floats>(v, 0)), round_to_int(half<Floats>(v, 1)));
}
inline Floats16 from_float16(Halves16 v) {
    return join<Floats16>(from_float16(half<Halves>(v, 0)), from_float16(half<Halves>(v, 1)));
}
INLINE Ints16 dot(Ints16 acc, const Bytes16& codes, const Ints16& x, bool wide) {
    const auto of_half = [&](int i) {
        return dot(half<Ints>(acc, i), half<Bytes>(codes, i), half<Ints>(x, i), wide);
    };
    return join<Ints16>(of_half(0), of_half(1));
}

}  // namespace infoquant
