// A tile: what the KV cache holds of sixteen tokens and one kv-head (see kernels/reference/kv_cache.py).
#pragma once

#include "vectors.h"

namespace kv {

using vectors::Bytes;
using vectors::Floats;
using vectors::LANES;

constexpr int TOKENS = 16;  // of a tile
constexpr int MAX_HEAD_SIZE = 512;

// Bytes of a tile, part by part: keys, values, then float16 key scales, key zeros, value scales, value zeros.
struct Layout {
    int64_t head_size, key_bits, value_bits;
    int64_t keys() const { return TOKENS * head_size * key_bits / 8; }
    int64_t values() const { return TOKENS * head_size * value_bits / 8; }
    int64_t parameters() const { return keys() + values(); }
    int64_t bytes() const { return parameters() + 4 * TOKENS * 2; }
    // Of four tokens' values.
    int64_t quad() const { return values() / 4; }
};

struct Pair {
    Bytes first, second;
};

// Sixteen lanes of four codes, twice: the low and the high nibbles of 64 bytes, or the bytes at two places.
template <int BITS>
inline Pair load_pair(const uint8_t* first, int64_t second) {
    const Bytes bytes = vectors::load<Bytes>(first);
    if (BITS == 4) return {bytes & 15, bytes >> 4};
    return {bytes, vectors::load<Bytes>(first + second)};
}

// Pages of a layer's cache, [blocks, kv_heads, block_size / 16 tiles].
struct Pages {
    uint8_t* cache;
    int64_t block_stride, head_stride, block_size;
    Layout layout;
    uint8_t* tile(int64_t block, int64_t kv_head, int64_t token) const {
        return cache + block * block_stride + kv_head * head_stride + token / TOKENS * layout.bytes();
    }
};

}  // namespace kv
