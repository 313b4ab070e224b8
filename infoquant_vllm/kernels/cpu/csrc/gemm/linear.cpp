// A quantized linear in one call: rotate_quantize.cpp, then quantized_linear.cpp.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace infoquant {
namespace {

constexpr int64_t SCRATCH = 1 << 22;  // codes or sums at a time; bounds the memory that is kept between calls

// halves [2 * tokens, channels], the results of high and low bytes, to their sum plus bias in out [tokens, channels].
void add_halves(const float* halves, int64_t tokens, int64_t channels, const float* bias, void* out, Dtype dtype) {
    std::vector<float> sum(channels);
    for (int64_t token = 0; token < tokens; ++token) {
        const float *const high = halves + 2 * token * channels, *const low = high + channels;
        for (int64_t c = 0; c < channels; ++c) sum[c] = bias ? high[c] + low[c] + bias[c] : high[c] + low[c];
        store_rows(sum.data(), token * channels, channels, out, dtype);
    }
}

}  // namespace

void linear(const Input& input, const InputQuant& quant, const Weight& weight, const float* bias, void* out) {
    static thread_local Buffer<int8_t> values;
    static thread_local Buffer<float> scale, halves;
    static thread_local Buffer<int32_t> offset;
    const bool int16 = quant.clip == nullptr;
    const int64_t features = input.features, channels = weight.channels, segments = quant.segments;
    const int64_t widest = int16 ? std::max(features, channels) : features;
    const int64_t max_tokens = std::clamp<int64_t>(SCRATCH / widest, 1, std::max<int64_t>(input.tokens, 1));
    const int64_t max_rows = quant.rows_each() * max_tokens;
    Quantized quantized{values.reserve(max_rows * features), scale.reserve(max_rows * segments),
                        quant.has_offset() ? offset.reserve(max_rows * segments) : nullptr, 0, features, segments};
    float* const sums = int16 ? halves.reserve(max_rows * channels) : nullptr;
    Input part = input;
    for (int64_t first = 0; first < input.tokens; first += max_tokens) {
        part.tokens = std::min(max_tokens, input.tokens - first);
        part.x = element(input.x, input.dtype, first * features);
        quantized.rows = quant.rows_each() * part.tokens;
        void* const to = element(out, input.dtype, first * channels);
        rotate_quantize(part, quant, quantized);
        if (int16) {
            quantized_linear(quantized, weight, nullptr, sums, FLOAT32);
            add_halves(sums, part.tokens, channels, bias, to, input.dtype);
        } else {
            quantized_linear(quantized, weight, bias, to, input.dtype);
        }
    }
}

}  // namespace infoquant
