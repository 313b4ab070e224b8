// The online softmax of attention: scores of a chunk of tokens to weights, and the running sums of a row of queries.
// The integer products around it are made in kv_attention.cpp, or by AMX in kv_attention_amx.h.
#pragma once
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace infoquant::attention {

constexpr int CHUNK = 128;  // tokens whose softmax weights share a scale; chunks begin at multiples of it
constexpr int TILES = CHUNK / kv::TOKENS;
constexpr float LEVELS = 32512;  // 127 * 256: int16 up to it is 256 * high + low with signed bytes
constexpr float TINY = 0x1p-100f;  // lower bound of a scale, against division by zero
constexpr float CUT = -64;  // weights below 2^CUT times the largest are zero
constexpr float FLAT = 60;  // tanh(x) is 1 in float32 where 2^FLAT is below e^(2x)
constexpr int MAX_WIDTH = kv::MAX_HEAD_SIZE + 2 * LANES16;

// One head of one query: int16 codes of the query, and the sums over the tokens so far.
struct Row {
    int64_t first_seen, last_seen;
    float factor, query_sum;  // a score is factor * (key scale * q . k + key zero * query_sum), both sums of codes
    float soft_cap;           // bound of the scores, 0: none
    float exponent;           // weights are relative to 2^exponent
    float sum, zero;          // sums of weight and of weight * value zero
    alignas(64) int8_t high[kv::MAX_HEAD_SIZE], low[kv::MAX_HEAD_SIZE];
    // Sums of weight * value scale * code: the first half of the features, then, after padding, the second half.
    alignas(64) float values[MAX_WIDTH];
};

struct Chunk {
    const uint8_t* tiles[TILES];
    Floats16 qparams[4][TILES];  // key scale, key zero, value scale, value zero; zero beyond the sequence
};

// The tiles of a chunk with tokens that any of the rows sees; none if first > last.
struct TileRange {
    int first = TILES, last = -1;

    TileRange(const Row* rows, int64_t count, int64_t first_token) {
        int64_t from = rows[0].first_seen, to = rows[0].last_seen;
        for (int64_t r = 1; r < count; ++r) {
            from = std::min(from, rows[r].first_seen);
            to = std::max(to, rows[r].last_seen);
        }
        from = std::max(from - first_token, int64_t{0}), to = std::min(to - first_token, int64_t{CHUNK - 1});
        first = from > to ? TILES : static_cast<int>(from / kv::TOKENS);
        last = from > to ? -1 : static_cast<int>(to / kv::TOKENS);
    }
};

// Half a head, padded to whole vectors.
inline int64_t half_width(int64_t head_size) { return round_up(head_size / 2, LANES16); }

// x times 2^k for integers k <= 0, and 0 below 2^CUT or where k is NaN.
inline Floats16 scale_exp2(Floats16 x, Floats16 k) {
#if defined(__AVX512F__)
    const __mmask16 kept = _mm512_cmp_ps_mask((__m512)k, _mm512_set1_ps(CUT), _CMP_GE_OQ);
    return (Floats16)_mm512_maskz_scalef_ps(kept, (__m512)x, (__m512)k);
#else
    const auto kept = k >= splat16(CUT);
    const Ints16 exponent = round_to_int(kept ? k : splat16(0.0f));
    return kept ? x * (Floats16)((exponent + 127) << 23) : splat16(0.0f);
#endif
}

inline float exp2_integer(float k) { return scale_exp2(splat16(1.0f), splat16(k))[0]; }

// 2^f for f in [-1/2, 1/2], to 3e-6.
inline Floats16 exp2_fraction(Floats16 f) {
    Floats16 y = f * 0.009600395f + 0.055916894f;
    y = y * f + 0.24023719f;
    y = y * f + 0.69312197f;
    return y * f + 1.0f;
}

// cap * tanh(x / cap), as cap - 2 cap / (e^(2 x / cap) + 1). NaN stays NaN.
inline Floats16 soft_capped(Floats16 x, float cap) {
    const Floats16 one = splat16(1.0f), high = splat16(FLAT);
    const Floats16 exponent = max(-high, min(high, x * splat16(static_cast<float>(2 * M_LOG2E) / cap)));
    const Floats16 integer = round(exponent);
    const Floats16 power = exp2_fraction(exponent - integer) * (Floats16)((round_to_int(integer) + 127) << 23);
    return splat16(cap) - one / (power + one) * splat16(2 * cap);
}

constexpr int SPLIT = 4 * LANES16;

// x * scale of SPLIT lanes, rounded to integers in +-LEVELS, as 256 * high + low.
inline void split_integers(const Floats16* x, Floats16 scale, int8_t* high, int8_t* low) {
#if defined(__AVX512BW__)
    // Packing interleaves its operands by quarters of a register; `order` undoes that at the end.
    const auto pair = [&](int i) {
        return _mm512_packs_epi32((__m512i)round_to_int(x[i] * scale), (__m512i)round_to_int(x[i + 1] * scale));
    };
    const __m512i first = pair(0), second = pair(2), half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const auto above = [&](__m512i v) { return _mm512_srai_epi16(_mm512_add_epi16(v, half), 8); };
    const __m512i highs = _mm512_packs_epi16(above(first), above(second));
    const __m512i lows = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte));
    store(high, _mm512_permutexvar_epi32(order, highs));
    store(low, _mm512_permutexvar_epi32(order, lows));
#else
    for (int i = 0; i < SPLIT / LANES16; ++i) {
        const Ints16 code = round_to_int(x[i] * scale);
        store(high + i * LANES16, __builtin_convertvector((code + 128) >> 8, Int8s16));
        store(low + i * LANES16, __builtin_convertvector(code, Int8s16));
    }
#endif
}

inline void start(Row& row, int64_t width) {
    row.exponent = -INFINITY;
    row.sum = row.zero = 0;
    std::fill(row.values, row.values + width, 0.0f);
}

// Softmax weights of R rows in a chunk, as int16 codes. In vectors lane r belongs to row r.
template <int R>
struct Weights {
    Floats16 old_factor, new_factor;  // of the running sums and of this chunk's integer sums
    alignas(64) int8_t high[R][CHUNK], low[R][CHUNK];
};

constexpr auto maximum = [](Floats16 a, Floats16 b) { return max(a, b); };
constexpr auto add = [](Floats16 a, Floats16 b) { return a + b; };

// Reduces the TILES vectors of a row to one, by halves.
template <typename Operation>
inline Floats16 reduce_tiles(const Floats16* parts, const Operation& of) {
    Floats16 four[TILES / 2];
    for (int t = 0; t < TILES / 2; ++t) four[t] = of(parts[t], parts[t + TILES / 2]);
    return of(of(four[0], four[2]), of(four[1], four[3]));
}

#if defined(__AVX512F__)
// Lane r of the result reduces the lanes of v[r], by halves: lanes 8 apart first, then 4, 2 and 1. Each step packs two
// rows into one vector, which takes a quarter of the shuffles that rows one by one take.
template <typename Operation>
inline Floats16 reduce_lanes(const Floats16 (&v)[16], const Operation& of) {
    const auto shuffle = [](Floats16 a, Floats16 b, auto which) {
        return (Floats16)_mm512_shuffle_f32x4((__m512)a, (__m512)b, decltype(which)::value);
    };
    const auto mix = [](Floats16 a, Floats16 b, auto which) {
        return (Floats16)_mm512_shuffle_ps((__m512)a, (__m512)b, decltype(which)::value);
    };
    constexpr std::integral_constant<int, 0x44> low;
    constexpr std::integral_constant<int, 0xEE> high;
    constexpr std::integral_constant<int, 0x88> even;
    constexpr std::integral_constant<int, 0xDD> odd;
    Floats16 eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i) eight[i] = of(shuffle(v[i], v[i + 8], low), shuffle(v[i], v[i + 8], high));
    for (int i = 0; i < 4; ++i) {
        four[i] = of(shuffle(eight[i], eight[i + 4], even), shuffle(eight[i], eight[i + 4], odd));
    }
    for (int i = 0; i < 2; ++i) two[i] = of(mix(four[i], four[i + 2], low), mix(four[i], four[i + 2], high));
    const Floats16 all_rows = of(mix(two[0], two[1], even), mix(two[0], two[1], odd));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return (Floats16)_mm512_permutexvar_ps(order, (__m512)all_rows);
}
#endif

template <int R, typename Operation>
inline Floats16 reduce_lanes(const Floats16 (&v)[R], const Operation& of) {
    Floats16 lanes{};
    for (int r = 0; r < R; ++r) {
        Floats16 x = v[r];
        for (int distance = LANES16 / 2; distance; distance /= 2) x = of(x, xor_shuffle(x, distance));
        lanes[r] = x[0];
    }
    return lanes;
}

// Scores of a row in powers of two, from its integer products product(tile), for the tiles first .. last. Tokens that
// the row does not see get -infinity.
template <typename Product>
inline void to_scores(const Row& row, const Chunk& chunk, int64_t first_token, int first, int last,
                      const Product& product, Floats16* x) {
    const Floats16 query_sum = splat16(row.query_sum), factor = splat16(row.factor);
    for (int t = first; t <= last; ++t) {
        x[t] = (product(t) * chunk.qparams[0][t] + query_sum * chunk.qparams[1][t]) * factor;
    }
    for (int t = first; t <= last && row.soft_cap > 0; ++t) x[t] = soft_capped(x[t], row.soft_cap);
    const int64_t begin = first_token + first * LANES16, end = first_token + last * LANES16 + LANES16 - 1;
    if (row.first_seen <= begin && row.last_seen >= end) return;
    const Ints16 seen_from = splat16(static_cast<int32_t>(std::clamp<int64_t>(row.first_seen - first_token, 0, CHUNK)));
    const Ints16 seen_to = splat16(static_cast<int32_t>(std::clamp<int64_t>(row.last_seen - first_token, -1, CHUNK)));
    for (int t = first; t <= last; ++t) {
        const Ints16 index = lane_index16() + t * LANES16;
        x[t] = ((index >= seen_from) & (index <= seen_to)) ? x[t] : splat16(-INFINITY);
    }
}

// Adds a chunk's sums to the running ones, both scaled to the larger exponent. bounds: the largest weights * scale.
template <int R>
inline void update_sums(Row* rows, Floats16 exponents, Floats16 bounds, Floats16 sums, Floats16 zeros,
                        Weights<R>& weights) {
    Floats16 exponent{}, sum{}, zero{};
    for (int r = 0; r < R; ++r) exponent[r] = rows[r].exponent, sum[r] = rows[r].sum, zero[r] = rows[r].zero;
    const Floats16 before = exponent;
    exponent = max(before, exponents);
    const Floats16 one = splat16(1.0f);
    const Floats16 old = scale_exp2(one, before - exponent), now = scale_exp2(one, exponents - exponent);
    sum = sum * old + sums * now;
    zero = zero * old + zeros * now;
    for (int r = 0; r < R; ++r) rows[r].exponent = exponent[r], rows[r].sum = sum[r], rows[r].zero = zero[r];
    weights.old_factor = old;
    weights.new_factor = bounds / splat16(LEVELS) * now;
}

// Turns scores x into codes of the softmax weights; overwrites x. Each step is done for all rows before the next one,
// since the steps of one row wait for each other.
template <int R>
void softmax(Row* rows, const Chunk& chunk, Floats16 (&x)[R][TILES], Weights<R>& weights) {
    Floats16 parts[R], sums[R], zeros[R];
    for (int r = 0; r < R; ++r) parts[r] = reduce_tiles(x[r], maximum);
    const Floats16 exponents = round(reduce_lanes(parts, maximum));
    for (int r = 0; r < R; ++r) {
        const Floats16 exponent = splat16(exponents[r]);
        Floats16 weight[TILES], zero[TILES], scaled[TILES];
#pragma GCC unroll 8
        for (int t = 0; t < TILES; ++t) {
            const Floats16 integer = round(x[r][t]);
            weight[t] = scale_exp2(exp2_fraction(x[r][t] - integer), integer - exponent);
            zero[t] = weight[t] * chunk.qparams[3][t];
            scaled[t] = weight[t] * chunk.qparams[2][t];
            x[r][t] = scaled[t];
        }
        sums[r] = reduce_tiles(weight, add);
        zeros[r] = reduce_tiles(zero, add);
        parts[r] = reduce_tiles(scaled, maximum);
    }
    const Floats16 bounds = max(splat16(TINY), reduce_lanes(parts, maximum)), factors = splat16(LEVELS) / bounds;
    for (int r = 0; r < R; ++r) {
        const Floats16 factor = splat16(factors[r]);
        for (int t = 0; t < TILES; t += SPLIT / LANES16) {
            split_integers(x[r] + t, factor, weights.high[r] + t * LANES16, weights.low[r] + t * LANES16);
        }
    }
    update_sums(rows, exponents, bounds, reduce_lanes(sums, add), reduce_lanes(zeros, add), weights);
}

}  // namespace infoquant::attention
