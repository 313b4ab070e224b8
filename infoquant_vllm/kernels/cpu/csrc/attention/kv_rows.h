// What attention does with rows of queries and a chunk of tokens, whichever way the products of whole numbers are made.
#pragma once
#include <algorithm>
#include <cmath>

#include "quantize/hadamard.h"
#include "attention/kv_tile.h"

namespace attention {

using namespace vectors;

constexpr int CHUNK = 128;  // tokens whose weights share a scale; chunks begin at multiples of it
constexpr int TILES = CHUNK / kv::TOKENS;
constexpr float LEVELS = 32512;  // 127 * 256: whole numbers up to it are 256 * high + low, signed bytes
constexpr float TINY = 0x1p-100f;
constexpr float CUT = -64;  // weights below 2^CUT of the largest are zero
constexpr int WIDTH = kv::MAX_HEAD_SIZE + 2 * LANES;

// One head of one query: its whole numbers, and sums over the tokens so far.
struct Row {
    int64_t first_seen, last_seen;
    float factor, query_sum;  // of the whole numbers: a score is factor * (key scale * product + key zero * sum)
    float largest, sum, zero;  // the exponent that weights are relative to; sums of weights and of weight * value zero
    alignas(64) int8_t high[kv::MAX_HEAD_SIZE], low[kv::MAX_HEAD_SIZE];
    // Sums of weight * value scale * code: the first half of the features, then, after padding, the second half.
    alignas(64) float values[WIDTH];
};

struct Chunk {
    const uint8_t* tiles[TILES];
    Floats parameters[4][TILES];  // key scale, key zero, value scale, value zero; zero beyond the sequence
};

// The tiles of a chunk that some rows see any token of; none if first > last.
struct Range {
    int first = TILES, last = -1;

    Range() = default;
    Range(const Row* rows, int64_t count, int64_t first_token) {
        int64_t from = rows[0].first_seen, to = rows[0].last_seen;
        for (int64_t r = 1; r < count; ++r) {
            from = std::min(from, rows[r].first_seen);
            to = std::max(to, rows[r].last_seen);
        }
        from = std::max(from - first_token, (int64_t)0), to = std::min(to - first_token, (int64_t)CHUNK - 1);
        first = from > to ? TILES : (int)(from / kv::TOKENS);
        last = from > to ? -1 : (int)(to / kv::TOKENS);
    }
};

inline int64_t half_width(int64_t head_size) { return (head_size / 2 + LANES - 1) / LANES * LANES; }

// x times 2^k for whole k <= 0, and 0 below 2^CUT or where k is not a number.
inline Floats times_power(Floats x, Floats k) {
#if defined(__AVX512F__)
    const __mmask16 kept = _mm512_cmp_ps_mask((__m512)k, _mm512_set1_ps(CUT), _CMP_GE_OQ);
    return (Floats)_mm512_maskz_scalef_ps(kept, (__m512)x, (__m512)k);
#else
    const auto kept = k >= all(CUT);
    const Ints whole = nearest_integers(kept ? k : all(0.0f));
    return kept ? x * (Floats)((whole + 127) << 23) : all(0.0f);
#endif
}

inline float power(float k) { return times_power(all(1.0f), all(k))[0]; }

// 2^f for f in [-1/2, 1/2], to 3e-6.
inline Floats fraction_power(Floats f) {
    Floats y = f * 0.009600395f + 0.055916894f;
    y = y * f + 0.24023719f;
    y = y * f + 0.69312197f;
    return y * f + 1.0f;
}

constexpr int SPLIT = 4 * LANES;

// Whole numbers x * scale of SPLIT lanes, |.| <= LEVELS, as 256 * high + low.
inline void split_integers(const Floats* x, Floats scale, int8_t* high, int8_t* low) {
#if defined(__AVX512BW__)
    // In each quarter of a register, what is packed has four lanes of one vector after four of the other.
    const auto pair = [&](int i) {
        return _mm512_packs_epi32((__m512i)nearest_integers(x[i] * scale), (__m512i)nearest_integers(x[i + 1] * scale));
    };
    const __m512i first = pair(0), second = pair(2), half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const auto above = [&](__m512i v) { return _mm512_srai_epi16(_mm512_add_epi16(v, half), 8); };
    const __m512i highs = _mm512_packs_epi16(above(first), above(second));
    const __m512i lows = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte));
    store(high, _mm512_permutexvar_epi32(order, highs));
    store(low, _mm512_permutexvar_epi32(order, lows));
#else
    for (int i = 0; i < SPLIT / LANES; ++i) {
        const Ints whole = nearest_integers(x[i] * scale);
        store(high + i * LANES, __builtin_convertvector((whole + 128) >> 8, Narrow));
        store(low + i * LANES, __builtin_convertvector(whole, Narrow));
    }
#endif
}

inline void start(Row& row, int64_t width) {
    row.largest = -INFINITY;
    row.sum = row.zero = 0;
    std::fill(row.values, row.values + width, 0.0f);
}

// Of R rows: lane r belongs to row r.
template <int R>
struct Weights {
    Floats before, now;  // factors of the sums so far and of this chunk's whole numbers
    alignas(64) int8_t high[R][CHUNK], low[R][CHUNK];
};

constexpr auto larger_of = [](Floats a, Floats b) { return larger(a, b); };
constexpr auto sum_of = [](Floats a, Floats b) { return a + b; };

// The parts of a row as one vector, by halves.
template <typename Operation>
inline Floats join(const Floats* parts, const Operation& of) {
    Floats four[TILES / 2];
    for (int t = 0; t < TILES / 2; ++t) four[t] = of(parts[t], parts[t + TILES / 2]);
    return of(of(four[0], four[2]), of(four[1], four[3]));
}

#if defined(__AVX512F__)
// Lane r is the operation over the lanes of v[r], by halves: of lanes 8 apart first, then of those 4, 2 and 1 apart,
// where each step leaves two rows in one vector.
template <typename Operation>
inline Floats across(const Floats (&v)[16], const Operation& of) {
    const auto shuffle = [](Floats a, Floats b, auto which) {
        return (Floats)_mm512_shuffle_f32x4((__m512)a, (__m512)b, decltype(which)::value);
    };
    const auto mix = [](Floats a, Floats b, auto which) {
        return (Floats)_mm512_shuffle_ps((__m512)a, (__m512)b, decltype(which)::value);
    };
    constexpr std::integral_constant<int, 0x44> low;
    constexpr std::integral_constant<int, 0xEE> high;
    constexpr std::integral_constant<int, 0x88> even;
    constexpr std::integral_constant<int, 0xDD> odd;
    Floats eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i) eight[i] = of(shuffle(v[i], v[i + 8], low), shuffle(v[i], v[i + 8], high));
    for (int i = 0; i < 4; ++i) {
        four[i] = of(shuffle(eight[i], eight[i + 4], even), shuffle(eight[i], eight[i + 4], odd));
    }
    for (int i = 0; i < 2; ++i) two[i] = of(mix(four[i], four[i + 2], low), mix(four[i], four[i + 2], high));
    const Floats all_rows = of(mix(two[0], two[1], even), mix(two[0], two[1], odd));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return (Floats)_mm512_permutexvar_ps(order, (__m512)all_rows);
}
#endif

template <int R, typename Operation>
inline Floats across(const Floats (&v)[R], const Operation& of) {
    Floats lanes{};
    for (int r = 0; r < R; ++r) {
        Floats x = v[r];
        for (int distance = LANES / 2; distance; distance /= 2) x = of(x, partner(x, distance));
        lanes[r] = x[0];
    }
    return lanes;
}

// Whole numbers of a row, product(tile), to scores in powers of two, for the tiles first .. last; the others' are
// those of tokens that nobody sees.
template <typename Product>
inline void to_scores(const Row& row, const Chunk& chunk, int64_t first_token, int first, int last,
                      const Product& product, Floats* x) {
    const Floats query_sum = all(row.query_sum), factor = all(row.factor);
    for (int t = first; t <= last; ++t) {
        x[t] = (product(t) * chunk.parameters[0][t] + query_sum * chunk.parameters[1][t]) * factor;
    }
    const int64_t begin = first_token + first * LANES, end = first_token + last * LANES + LANES - 1;
    if (row.first_seen <= begin && row.last_seen >= end) return;
    const Ints seen_from = all((int32_t)std::clamp<int64_t>(row.first_seen - first_token, 0, CHUNK));
    const Ints seen_to = all((int32_t)std::clamp<int64_t>(row.last_seen - first_token, -1, CHUNK));
    for (int t = first; t <= last; ++t) {
        const Ints index = lane_index() + t * LANES;
        x[t] = ((index >= seen_from) & (index <= seen_to)) ? x[t] : all(-INFINITY);
    }
}

// Takes the sums of a chunk into those so far.
template <int R>
inline void take(Row* rows, Floats exponents, Floats bounds, Floats sums, Floats zeros, Weights<R>& weights) {
    Floats largest{}, sum{}, zero{};
    for (int r = 0; r < R; ++r) largest[r] = rows[r].largest, sum[r] = rows[r].sum, zero[r] = rows[r].zero;
    const Floats before = largest;
    largest = larger(before, exponents);
    const Floats old = times_power(all(1.0f), before - largest), now = times_power(all(1.0f), exponents - largest);
    sum = sum * old + sums * now;
    zero = zero * old + zeros * now;
    for (int r = 0; r < R; ++r) rows[r].largest = largest[r], rows[r].sum = sum[r], rows[r].zero = zero[r];
    weights.before = old;
    weights.now = bounds / all(LEVELS) * now;
}

// Rows' scores to the weights of the chunk's values; x holds what is between. One step for all rows after another: a
// row's own steps wait for each other.
template <int R>
void softmax(Row* rows, const Chunk& chunk, Floats (&x)[R][TILES], Weights<R>& weights) {
    Floats parts[R], sums[R], zeros[R];
    for (int r = 0; r < R; ++r) parts[r] = join(x[r], larger_of);
    const Floats exponents = nearest(across(parts, larger_of));
    for (int r = 0; r < R; ++r) {
        const Floats exponent = all(exponents[r]);
        Floats weight[TILES], zero[TILES], scaled[TILES];
#pragma GCC unroll 8
        for (int t = 0; t < TILES; ++t) {
            const Floats whole = nearest(x[r][t]);
            weight[t] = times_power(fraction_power(x[r][t] - whole), whole - exponent);
            zero[t] = weight[t] * chunk.parameters[3][t];
            scaled[t] = weight[t] * chunk.parameters[2][t];
            x[r][t] = scaled[t];
        }
        sums[r] = join(weight, sum_of);
        zeros[r] = join(zero, sum_of);
        parts[r] = join(scaled, larger_of);
    }
    const Floats bounds = larger(all(TINY), across(parts, larger_of)), factors = all(LEVELS) / bounds;
    for (int r = 0; r < R; ++r) {
        const Floats factor = all(factors[r]);
        for (int t = 0; t < TILES; t += SPLIT / LANES) {
            split_integers(x[r] + t, factor, weights.high[r] + t * LANES, weights.low[r] + t * LANES);
        }
    }
    take(rows, exponents, bounds, across(sums, sum_of), across(zeros, sum_of), weights);
}

}  // namespace attention
