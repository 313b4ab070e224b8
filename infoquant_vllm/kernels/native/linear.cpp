// A quantised linear in one call: transform and codes of the input, then the product. Both parts' own files say how.
#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" {
void infoquant_rotate_quantize(const void* x, int64_t dtype, int64_t tokens, int64_t features, int64_t kind,
                               const float* left, int64_t left_size, const float* right, int64_t right_size,
                               const float* clip, int64_t groups, int64_t num_bits, int64_t symmetric, uint8_t* codes,
                               float* scale, int32_t* zero);
void infoquant_quantized_linear(const uint8_t* codes, const float* scale, const int32_t* zero, const uint8_t* weight,
                                const float* weight_scale, const uint8_t* weight_zero, const float* bias, void* out,
                                int64_t tokens, int64_t features, int64_t channels, int64_t input_groups,
                                int64_t weight_groups, int64_t weight_bits, int64_t num_bits, int64_t out_type);
}

// x [tokens, features] to out [tokens, channels] of the same dtype.
extern "C" void infoquant_linear(const void* x, int64_t dtype, int64_t tokens, int64_t features, int64_t kind,
                                 const float* left, int64_t left_size, const float* right, int64_t right_size,
                                 const float* clip, int64_t groups, int64_t num_bits, int64_t symmetric,
                                 const uint8_t* weight, const float* weight_scale, const uint8_t* weight_zero,
                                 const float* bias, void* out, int64_t channels, int64_t weight_groups,
                                 int64_t weight_bits) {
    constexpr int64_t SCRATCH = 1 << 22;  // codes at a time, so that they stay in a cache and memory stays small
    static thread_local std::vector<uint8_t> codes;
    static thread_local std::vector<float> scale;
    static thread_local std::vector<int32_t> zero;
    const int64_t most = std::clamp<int64_t>(SCRATCH / features, 1, std::max<int64_t>(tokens, 1));
    const int64_t bytes = dtype == 0 ? 4 : 2, ranges = most * groups;
    if (static_cast<int64_t>(codes.size()) < most * features) codes.resize(most * features);
    if (static_cast<int64_t>(scale.size()) < ranges) scale.resize(ranges), zero.resize(ranges);
    for (int64_t first = 0; first < tokens; first += most) {
        const int64_t count = std::min(most, tokens - first);
        infoquant_rotate_quantize(static_cast<const char*>(x) + first * features * bytes, dtype, count, features, kind,
                                  left, left_size, right, right_size, clip, groups, num_bits, symmetric, codes.data(),
                                  scale.data(), zero.data());
        infoquant_quantized_linear(codes.data(), scale.data(), zero.data(), weight, weight_scale, weight_zero, bias,
                                   static_cast<char*>(out) + first * channels * bytes, count, features, channels,
                                   groups, weight_groups, weight_bits, num_bits, dtype);
    }
}
