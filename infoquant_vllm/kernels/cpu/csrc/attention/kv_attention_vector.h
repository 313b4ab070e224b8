// Attention of a few rows of queries to a chunk of tokens by dot products of bytes within lanes.
#pragma once
#include "attention/online_softmax.h"

namespace infoquant::attention {

inline Ints16 broadcast(const int8_t* four) { return splat16(load<int32_t>(four)); }

// Codes of 4 bits leave room in 16 bits for the sum of two products.
template <int BITS>
INLINE void add_dot(Ints16& sum, const Bytes16& codes, const Ints16& x) {
    sum = dot(sum, codes, x, BITS == 8);
}

// products[row][tile] = q . k in codes, for the tiles first .. last, two at a time.
template <int R, int BITS>
inline void score(const Row* rows, const Chunk& chunk, int first, int last, int64_t head_size,
                  Floats16 products[R][TILES]) {
    const int64_t key_bytes = head_size * kv::TOKENS * BITS / 8;
    for (int t = first & ~1; t <= last; t += 2) {
        Ints16 high[R][2] = {}, low[R][2] = {};
        const uint8_t *left = chunk.tiles[t], *right = chunk.tiles[t + 1];
        constexpr int64_t STEP = BITS == 4 ? 64 : 128;  // bytes of eight features
        for (int64_t i = 0; i < head_size; i += 8, left += STEP, right += STEP) {
            const kv::Pair a = kv::load_pair<BITS>(left, 64), b = kv::load_pair<BITS>(right, 64);
            __builtin_prefetch(left + key_bytes);  // the values of the same tokens
            __builtin_prefetch(right + key_bytes);
            for (int r = 0; r < R; ++r) {
                const Ints16 h = broadcast(rows[r].high + i), l = broadcast(rows[r].low + i);
                add_dot<BITS>(high[r][0], a.first, h), add_dot<BITS>(high[r][1], b.first, h);
                add_dot<BITS>(low[r][0], a.first, l), add_dot<BITS>(low[r][1], b.first, l);
                const Ints16 h2 = broadcast(rows[r].high + i + 4), l2 = broadcast(rows[r].low + i + 4);
                add_dot<BITS>(high[r][0], a.second, h2), add_dot<BITS>(high[r][1], b.second, h2);
                add_dot<BITS>(low[r][0], a.second, l2), add_dot<BITS>(low[r][1], b.second, l2);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int each = 0; each < 2; ++each) {
                const Floats16 h = __builtin_convertvector(high[r][each], Floats16);
                products[r][t + each] = h * 256.0f + __builtin_convertvector(low[r][each], Floats16);
            }
        }
    }
}

// Adds weight * value of the tiles first .. last to the rows' sums, 32 features at a time.
template <int R, int BITS>
inline void add_values(Row* rows, const Chunk& chunk, int first, int last, const Weights<R>& weights,
                       kv::Layout layout) {
    const int64_t half = half_width(layout.head_size), keys = layout.keys(), quad = layout.quad();
    for (int64_t i = 0; i < half; i += LANES16) {
        Ints16 high[R][2] = {}, low[R][2] = {};
        for (int t = first; t <= last; ++t) {
            const uint8_t* values = chunk.tiles[t] + keys + 4 * i;
            for (int j = 0; j < 4; ++j) {
                const kv::Pair a = kv::load_pair<BITS>(values + j * quad, quad / 2);
                for (int r = 0; r < R; ++r) {
                    const Ints16 h = broadcast(weights.high[r] + t * LANES16 + 4 * j);
                    const Ints16 l = broadcast(weights.low[r] + t * LANES16 + 4 * j);
                    add_dot<BITS>(high[r][0], a.first, h), add_dot<BITS>(high[r][1], a.second, h);
                    add_dot<BITS>(low[r][0], a.first, l), add_dot<BITS>(low[r][1], a.second, l);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int each = 0; each < 2; ++each) {
                float* to = rows[r].values + i + each * half;
                const Floats16 h = __builtin_convertvector(high[r][each], Floats16);
                const Floats16 sum = h * 256.0f + __builtin_convertvector(low[r][each], Floats16);
                store(to, load<Floats16>(to) * weights.old_factor[r] + sum * weights.new_factor[r]);
            }
        }
    }
}

template <int R, int KEY_BITS, int VALUE_BITS>
inline void attend(Row* rows, const Chunk& chunk, int64_t first_token, kv::Layout layout) {
    const TileRange seen(rows, R, first_token);
    if (seen.first > seen.last) return;
    Floats16 products[R][TILES] = {};
    score<R, KEY_BITS>(rows, chunk, seen.first, seen.last, layout.head_size, products);
    Weights<R> weights;
    for (int r = 0; r < R; ++r) {
        to_scores(rows[r], chunk, first_token, 0, TILES - 1, [&](int t) { return products[r][t]; }, products[r]);
    }
    softmax(rows, chunk, products, weights);
    add_values<R, VALUE_BITS>(rows, chunk, seen.first, seen.last, weights, layout);
}

}  // namespace infoquant::attention
