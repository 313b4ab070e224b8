// What attention does with rows of queries and a chunk of tokens, whichever way the products of whole numbers are made.
#pragma once
#include <algorithm>
#include <cmath>

#include "hadamard.h"
#include "kv_tile.h"

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

struct Weights {
    float before, now;  // factors of the sums so far and of this chunk's whole numbers
    alignas(64) int8_t high[CHUNK], low[CHUNK];
};

inline float total(Floats* parts) {  // by halves
    for (int half = TILES / 2; half; half /= 2) {
        for (int t = 0; t < half; ++t) parts[t] += parts[t + half];
    }
    return sum(parts[0]);
}

inline float greatest(const Floats* parts) {
    Floats most[2] = {parts[0], parts[1]};
    for (int t = 2; t < TILES; ++t) most[t % 2] = larger(most[t % 2], parts[t]);
    return largest(larger(most[0], most[1]));
}

// A row's products to its scores, in powers of two.
inline void to_scores(const Row& row, const Chunk& chunk, int64_t first_token, Floats* x) {
    const Floats query_sum = all(row.query_sum), factor = all(row.factor);
    for (int t = 0; t < TILES; ++t) {
        x[t] = (x[t] * chunk.parameters[0][t] + query_sum * chunk.parameters[1][t]) * factor;
    }
    if (row.first_seen <= first_token && row.last_seen >= first_token + CHUNK - 1) return;
    const Ints first = all((int32_t)std::clamp<int64_t>(row.first_seen - first_token, 0, CHUNK));
    const Ints last = all((int32_t)std::clamp<int64_t>(row.last_seen - first_token, -1, CHUNK));
    for (int t = 0; t < TILES; ++t) {
        const Ints index = lane_index() + t * LANES;
        x[t] = ((index >= first) & (index <= last)) ? x[t] : all(-INFINITY);
    }
}

// Rows' products to the weights of the chunk's values; x holds what is between. One step for all rows after another:
// a row's own steps wait for each other.
template <int R>
void softmax(Row* rows, const Chunk& chunk, int64_t first_token, Floats (&x)[R][TILES], Weights* weights) {
    float exponents[R], bounds[R];
    Floats scaled[R][TILES];  // weights times the values' scales
    for (int r = 0; r < R; ++r) {
        to_scores(rows[r], chunk, first_token, x[r]);
        exponents[r] = nearest(all(greatest(x[r])))[0];
    }
    for (int r = 0; r < R; ++r) {
        const Floats exponent = all(exponents[r]);
        for (int t = 0; t < TILES; ++t) {
            const Floats whole = nearest(x[r][t]);
            x[r][t] = times_power(fraction_power(x[r][t] - whole), whole - exponent);
            scaled[r][t] = x[r][t] * chunk.parameters[2][t];
        }
        bounds[r] = std::max(greatest(scaled[r]), TINY);
    }
    for (int r = 0; r < R; ++r) {
        Row& row = rows[r];
        const Floats factor = all(LEVELS / bounds[r]);
        for (int t = 0; t < TILES; t += SPLIT / LANES) {
            split_integers(scaled[r] + t, factor, weights[r].high + t * LANES, weights[r].low + t * LANES);
        }
        Floats zeros[TILES];
        for (int t = 0; t < TILES; ++t) zeros[t] = x[r][t] * chunk.parameters[3][t];
        const float before = row.largest;
        row.largest = std::max(before, exponents[r]);
        weights[r].before = power(before - row.largest);
        const float now = power(exponents[r] - row.largest);
        weights[r].now = bounds[r] / LEVELS * now;
        row.sum = row.sum * weights[r].before + total(x[r]) * now;
        row.zero = row.zero * weights[r].before + total(zeros) * now;
    }
}

}  // namespace attention
