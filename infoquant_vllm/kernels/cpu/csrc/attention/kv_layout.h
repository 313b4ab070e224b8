// The layout of the KV cache; kernels/torch/kv_cache.py describes it. A tile holds 16 tokens of one KV head.
#pragma once

#include "simd/simd.h"

namespace infoquant::kv {

constexpr int TOKENS = LANES16;  // tokens of a tile
constexpr int MAX_HEAD_SIZE = 512;

// A tile in bytes: keys, values, then float16 key scales, key zeros, value scales and value zeros.
struct Layout {
    int64_t head_size, key_bits, value_bits;
    int64_t keys() const { return TOKENS * head_size * key_bits / 8; }
    int64_t values() const { return TOKENS * head_size * value_bits / 8; }
    int64_t qparams() const { return keys() + values(); }
    int64_t bytes() const { return qparams() + 4 * TOKENS * 2; }
    // The values of four tokens.
    int64_t quad() const { return values() / 4; }
};

struct Pair {
    Bytes16 first, second;
};

// Two vectors of codes: the low and the high nibbles of 64 bytes, or 64 bytes at each of two places.
template <int BITS>
inline Pair load_pair(const uint8_t* first, int64_t second) {
    const Bytes16 bytes = load<Bytes16>(first);
    if (BITS == 4) return {bytes & 15, bytes >> 4};
    return {bytes, load<Bytes16>(first + second)};
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

}  // namespace infoquant::kv
