// Attention of sixteen rows of queries to a chunk of tokens by AMX. Once nibbles are unpacked, the cache's tiles have
// the layout of its registers. Products are integers and exact, so the results have the bits of kv_attention_vector.h.
#pragma once
#ifdef __AMX_INT8__
#include "attention/online_softmax.h"
#include "simd/amx.h"

namespace infoquant::attention {

constexpr int AMX_ROWS = 16;
constexpr int AMX_MAX_HEAD_SIZE = 256;  // a dot product of so many codes up to LEVELS fits 32 bits
constexpr int DEPTH = 64;  // bytes of a row of a tile register

// A chunk's codes in bytes, as tile registers [16, 16, 4].
struct Codes {
    static constexpr int REGISTER = 16 * DEPTH;
    alignas(64) uint8_t keys[CHUNK * AMX_MAX_HEAD_SIZE];    // [tiles, features / 4, tokens, 4]
    alignas(64) uint8_t values[CHUNK * AMX_MAX_HEAD_SIZE];  // [features / 16, tokens / 4, features, 4]

    static int64_t blocks(int64_t head_size) { return (head_size + DEPTH - 1) / DEPTH; }
    const uint8_t* key(int tile, int64_t block, int64_t head_size) const {
        return keys + (tile * blocks(head_size) + block) * REGISTER;
    }
    const uint8_t* value(int64_t part, int64_t block) const { return values + part * CHUNK * 16 + block * REGISTER; }
};

template <int KEY_BITS, int VALUE_BITS>
void unpack(Codes& codes, const Chunk& chunk, int first, int last, kv::Layout layout) {
    const int64_t half = half_width(layout.head_size), quad = layout.quad();
    for (int t = first; t <= last; ++t) {
        uint8_t* key = codes.keys + t * Codes::blocks(layout.head_size) * Codes::REGISTER;
        const uint8_t* from = chunk.tiles[t];
        for (int64_t i = 0; i < layout.head_size; i += 8, from += 16 * KEY_BITS, key += 128) {
            const kv::Pair pair = kv::load_pair<KEY_BITS>(from, 64);
            store(key, pair.first);
            store(key + 64, pair.second);
        }
        for (int64_t i = 0; i < half; i += LANES16) {
            for (int j = 0; j < 4; ++j) {
                const uint8_t* const line = chunk.tiles[t] + layout.keys() + j * quad + 4 * i;
                const kv::Pair pair = kv::load_pair<VALUE_BITS>(line, quad / 2);
                uint8_t* const value = codes.values + i * CHUNK + (4 * t + j) * 64;
                store(value, pair.first);
                store(value + half * CHUNK, pair.second);
            }
        }
    }
}

// Integer products of sixteen rows with two registers, of the rows' high bytes and of their low bytes.
struct Products {
    alignas(64) int32_t high[AMX_ROWS][2 * LANES16], low[AMX_ROWS][2 * LANES16];

    Floats16 sum(int row, int part) const {
        const Ints16 h = load<Ints16>(high[row] + part * LANES16), l = load<Ints16>(low[row] + part * LANES16);
        return __builtin_convertvector((h << 8) + l, Floats16);
    }
};

// Rows of bytes `high` and `low`, `stride` apart, times the registers at left(b) and right(b), summed over b.
template <typename Left, typename Right>
inline void multiply(const int8_t* high, const int8_t* low, int64_t stride, int64_t first, int64_t last, Left left,
                     Right right, Products& products) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t b = first; b <= last; ++b) {
        _tile_loadd(4, high + b * DEPTH, stride);
        _tile_loadd(6, left(b), DEPTH);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, right(b), DEPTH);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, low + b * DEPTH, stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, products.high, sizeof products.high[0]);
    _tile_stored(1, &products.high[0][LANES16], sizeof products.high[0]);
    _tile_stored(2, products.low, sizeof products.low[0]);
    _tile_stored(3, &products.low[0][LANES16], sizeof products.low[0]);
}

// Scores of one pair of tiles are computed while AMX makes the products of the next pair.
inline void score(const Row* rows, const Chunk& chunk, const Codes& codes, int64_t first_token, TileRange seen,
                  int64_t head_size, Products (&products)[2], Floats16 (&scores)[AMX_ROWS][TILES]) {
    const int first = seen.first / 2, last = seen.last / 2;
    for (int pair = 0; pair <= TILES / 2; ++pair) {
        if (pair >= first && pair <= last) {
            const auto key = [&](int tile) { return [&, tile](int64_t b) { return codes.key(tile, b, head_size); }; };
            multiply(rows->high, rows->low, sizeof(Row), 0, Codes::blocks(head_size) - 1, key(2 * pair),
                     key(2 * pair + 1), products[pair % 2]);
        }
        const int before = pair - 1;
        for (int r = 0; r < AMX_ROWS && before >= 0; ++r) {
            if (before < first || before > last) {
                scores[r][2 * before] = scores[r][2 * before + 1] = splat16(-INFINITY);
                continue;
            }
            const auto product = [&](int t) { return products[before % 2].sum(r, t % 2); };
            to_scores(rows[r], chunk, first_token, 2 * before, 2 * before + 1, product, scores[r]);
        }
    }
}

inline void add_values(Row* rows, const Weights<AMX_ROWS>& weights, const Products& sums, int64_t pair) {
    for (int r = 0; r < AMX_ROWS; ++r) {
        const Floats16 before = splat16(weights.old_factor[r]), now = splat16(weights.new_factor[r]);
        for (int each = 0; each < 2; ++each) {
            float* const to = rows[r].values + (2 * pair + each) * LANES16;
            store(to, load<Floats16>(to) * before + sums.sum(r, each) * now);
        }
    }
}

inline void attend_amx(Row* rows, const Chunk& chunk, const Codes& codes, int64_t first_token, int64_t head_size) {
    const TileRange seen(rows, AMX_ROWS, first_token);
    if (seen.first > seen.last) return;
    Floats16 scores[AMX_ROWS][TILES];
    Weights<AMX_ROWS> weights;
    Products products[2];
    score(rows, chunk, codes, first_token, seen, head_size, products, scores);
    softmax(rows, chunk, scores, weights);
    const int64_t pairs = half_width(head_size) / LANES16;
    for (int64_t pair = 0; pair <= pairs; ++pair) {  // sums are added while AMX makes the next ones
        if (pair < pairs) {
            const auto value = [&](int64_t part) { return [&, part](int64_t b) { return codes.value(part, b); }; };
            multiply(weights.high[0], weights.low[0], CHUNK, seen.first / 4, seen.last / 4, value(2 * pair),
                     value(2 * pair + 1), products[pair % 2]);
        }
        if (pair > 0) add_values(rows, weights, products[(pair - 1) % 2], pair - 1);
    }
}

}  // namespace infoquant::attention
#endif
