// A linear in one call: transform and codes of the input, then the product. Both parts' own files say how.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace infoquant {
namespace {

constexpr int64_t SCRATCH = 1 << 22;  // codes at a time, so that they stay in a cache and memory stays small

template <typename T>
T* reserve(std::vector<T>& kept, int64_t size) {
    if (static_cast<int64_t>(kept.size()) < size) kept.resize(size);
    return kept.data();
}

void product(const Linear& p, const uint8_t* codes, const float* scale, const int32_t* zero, int64_t rows,
             int64_t input_groups, int64_t num_bits, const float* bias, void* out, int64_t out_type) {
    infoquant_quantized_linear(codes, scale, zero, p.weight, p.weight_scale, p.weight_zero, bias, out, rows,
                               p.features, p.channels, input_groups, p.weight_groups, p.weight_bits, num_bits,
                               out_type);
}

// products [2 * tokens, channels] of high and of low bytes to out [tokens, channels], with the bias.
void add_bytes(const float* products, int64_t tokens, int64_t channels, const float* bias, void* out, int64_t dtype) {
    std::vector<float> sum(channels);
    for (int64_t token = 0; token < tokens; ++token) {
        const float *const high = products + 2 * token * channels, *const low = high + channels;
        for (int64_t c = 0; c < channels; ++c) sum[c] = bias ? high[c] + low[c] + bias[c] : high[c] + low[c];
        store_rows(sum.data(), token * channels, channels, out, dtype);
    }
}

}  // namespace

void linear(const Linear& p) {
    static thread_local std::vector<uint8_t> codes;
    static thread_local std::vector<float> scale, products;
    static thread_local std::vector<int32_t> zero;
    const bool wide = p.clip == nullptr;  // two rows of bytes per token, in one group
    const int64_t most = std::clamp<int64_t>(SCRATCH / p.features, 1, std::max<int64_t>(p.tokens, 1));
    const int64_t bytes = p.dtype == FLOAT32 ? 4 : 2, rows = wide ? 2 * most : most, groups = wide ? 1 : p.input_groups;
    uint8_t* const made = reserve(codes, rows * p.features);
    float* const scales = reserve(scale, rows * groups);
    int32_t* const zeros = reserve(zero, rows * groups);
    float* const halves = wide ? reserve(products, rows * p.channels) : nullptr;
    for (int64_t first = 0; first < p.tokens; first += most) {
        const int64_t count = std::min(most, p.tokens - first);
        const void* const x = static_cast<const char*>(p.x) + first * p.features * bytes;
        void* const out = static_cast<char*>(p.out) + first * p.channels * bytes;
        if (wide) {
            infoquant_rotate_quantize_wide(x, p.dtype, count, p.features, p.kind, p.left, p.left_size, p.right,
                                           p.right_size, made, scales, zeros);
            product(p, made, scales, zeros, 2 * count, 1, 8, nullptr, halves, FLOAT32);
            add_bytes(halves, count, p.channels, p.bias, out, p.dtype);
        } else {
            infoquant_rotate_quantize(x, p.dtype, count, p.features, p.kind, p.left, p.left_size, p.right,
                                      p.right_size, p.clip, groups, p.num_bits, p.symmetric, made, scales, zeros);
            product(p, made, scales, zeros, count, groups, p.num_bits, p.bias, out, p.dtype);
        }
    }
}

}  // namespace infoquant
