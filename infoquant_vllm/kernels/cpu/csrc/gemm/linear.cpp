// A linear in one call: transform and codes of the input, then the product. Both parts' own files say how.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "rows.h"

namespace infoquant {
namespace {

constexpr int64_t SCRATCH = 1 << 22;  // codes or products at a time: what is kept between calls stays small

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

void linear(const Input& input, const float* clip, int64_t groups, int64_t num_bits, bool symmetric,
            const Weight& weight, const float* bias, void* out) {
    static thread_local Buffer<uint8_t> codes;
    static thread_local Buffer<float> scale, products;
    static thread_local Buffer<int32_t> zero;
    const bool wide = clip == nullptr;
    const int64_t features = input.features, channels = weight.channels, bytes = input.dtype == FLOAT32 ? 4 : 2;
    const int64_t widest = wide ? std::max(features, channels) : features;
    const int64_t most = std::clamp<int64_t>(SCRATCH / widest, 1, std::max<int64_t>(input.tokens, 1));
    const int64_t rows = wide ? 2 * most : most, ranges = wide ? rows : rows * groups;
    const Quantized made{codes.reserve(rows * features), scale.reserve(ranges), zero.reserve(ranges)};
    float* const halves = wide ? products.reserve(rows * channels) : nullptr;
    Input part = input;
    for (int64_t first = 0; first < input.tokens; first += most) {
        part.tokens = std::min(most, input.tokens - first);
        part.x = static_cast<const char*>(input.x) + first * features * bytes;
        void* const to = static_cast<char*>(out) + first * channels * bytes;
        if (wide) {
            rotate_quantize_wide(part, made);
            quantized_linear(made, 2 * part.tokens, features, 1, 8, weight, nullptr, halves, FLOAT32);
            add_bytes(halves, part.tokens, channels, bias, to, input.dtype);
        } else {
            rotate_quantize(part, clip, groups, num_bits, symmetric, made);
            quantized_linear(made, part.tokens, features, groups, num_bits, weight, bias, to, input.dtype);
        }
    }
}

}  // namespace infoquant
