// What the two kernels of the quantized GEMM share: tiles of the input, zero-points, scales and the output.
// quantized_linear.cpp says what is computed.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace infoquant::gemm {

constexpr int PANEL = 32;        // channels of a panel
constexpr int HALF = PANEL / 2;  // channels in the low nibbles of a line; the other half is in the high ones
constexpr int LINE = 4 * HALF;   // bytes of a line of 4-bit weights: four features of a panel

struct Problem {
    const uint8_t* codes;              // [tokens, features]
    const float* scale;                // [tokens, input_groups]
    const int32_t* zero_point;         // [tokens, input_groups]
    const uint8_t* weight;             // [panels, groups * steps, line]
    const float* weight_scale;         // [weight_groups, channels]
    const uint8_t* weight_zero_point;  // [weight_groups, channels]; null: `offset` for all
    const float* bias;                 // [channels] or null
    void* out;                         // [tokens, channels]
    Dtype out_dtype;
    int64_t tokens, features, channels, input_groups, weight_groups, offset;
    int64_t groups = std::max(input_groups, weight_groups), group_size = features / groups;
    int64_t steps = div_up(group_size, 4);  // lines of a group, of four features each
    int64_t panels = div_up(channels, PANEL);
};

// Inputs of a few tokens. WIDTH words of a row lie next to each other; groups are padded with zeros.
struct Tile {
    int64_t first, rows;       // tokens first .. first + rows
    const int32_t* words;      // [groups, steps / WIDTH, padded rows, WIDTH]: x, four signed bytes
    const int32_t* minus_sum;  // [groups, rows]: -sum (code - z), where SUMMED
    const int32_t* zp_offset;  // [groups, rows]: r
    const float* scale;        // [groups, rows]
};

// 32-bit words that `make_tile` writes for a row.
inline int64_t row_words(const Problem& p, int64_t width) { return p.groups * (round_up(p.steps, width) + 3); }

// The tile of tokens first .. first + rows, in memory for padded_rows. Kernel::write_words lays out the words.
template <int BITS, typename Kernel, bool SUMMED>
Tile make_tile(const Problem& p, int64_t first, int64_t rows, int64_t padded_rows, int32_t* words) {
    const int64_t steps = round_up(p.steps, Kernel::WIDTH), cells = p.groups * rows, ratio = p.groups / p.input_groups;
    int32_t *const minus_sum = words + p.groups * steps * padded_rows, *const zp_offset = minus_sum + cells;
    float* const scale = reinterpret_cast<float*>(zp_offset + cells);
    for (int64_t g = 0; g < p.groups; g++) {
        const int64_t range = first * p.input_groups + g / ratio, cell = g * rows;
        for (int64_t r = 0; r < rows; r++) {
            const int32_t zero_point = p.zero_point[range + r * p.input_groups];
            minus_sum[cell + r] = zero_point * static_cast<int32_t>(p.group_size);
            zp_offset[cell + r] = zero_point - 128;
            scale[cell + r] = p.scale[range + r * p.input_groups];
        }
        for (int64_t s = 0; s < steps; s += Kernel::BLOCK) {
            const int64_t block = std::min<int64_t>(Kernel::BLOCK, steps - s);
            const int64_t size = std::min(4 * block, p.group_size - 4 * s);
            for (int64_t r = 0; r < rows; r++) {
                const uint8_t* const codes = p.codes + (first + r) * p.features + g * p.group_size + 4 * s;
                const uint8_t zero_point = BITS == 8 ? 128 : zp_offset[cell + r] + 128;
                if (SUMMED) minus_sum[cell + r] -= std::accumulate(codes, codes + size, int32_t{0});
                int32_t* const to = words + (g * steps + s) * padded_rows + r * Kernel::WIDTH;
                Kernel::write_words(codes, size, zero_point, block, padded_rows, to);
            }
        }
    }
    return {first, rows, words, minus_sum, zp_offset, scale};
}

// Zero-points of a weight group, of LANES channels from `first` on.
INLINE Ints zero_points(const Problem& p, int64_t group, int64_t first) {
    typedef uint8_t ZeroPoints __attribute__((vector_size(LANES)));
    if (!p.weight_zero_point) return splat(static_cast<int32_t>(p.offset));
    if (first >= p.channels) return Ints{};
    const uint8_t* const zero_points = p.weight_zero_point + group * p.weight_groups / p.groups * p.channels;
    return __builtin_convertvector(load_some<ZeroPoints>(zero_points + first, p.channels - first), Ints);
}

// Scales of a weight group, of LANES channels from `first` on.
INLINE Floats weight_scales(const Problem& p, int64_t group, int64_t first) {
    if (first >= p.channels) return Floats{};
    const float* const scales = p.weight_scale + group * p.weight_groups / p.groups * p.channels;
    return load_some<Floats>(scales + first, p.channels - first);
}

INLINE void store_channels(const Problem& p, int64_t token, int64_t channel, Floats x) {
    const int64_t left = p.channels - channel, at = token * p.channels + channel;
    with_dtype(p.out_dtype, [&](auto dtype) { store_part<dtype>(p.out, at, left, x); });
}

// Factors of a group's sums before the groups are added. Where all groups share a channel's scale, `finish` applies it.
INLINE Floats group_scales(const Problem& p, int64_t group, int64_t first) {
    return p.weight_groups > 1 ? weight_scales(p, group, first) : splat(1.0f);
}

// Scales of channels that all groups share.
INLINE Floats channel_scales(const Problem& p, int64_t first) {
    return p.weight_groups == 1 ? weight_scales(p, 0, first) : splat(1.0f);
}

// Writes the sums over the groups, of LANES channels from `first` on.
INLINE void finish(const Problem& p, int64_t token, int64_t first, Floats sum, Floats scale, Floats bias) {
    if (p.weight_groups == 1) sum *= scale;
    if (p.bias) sum += bias;
    store_channels(p, token, first, sum);
}

INLINE Floats biases(const Problem& p, int64_t first) {
    return p.bias && first < p.channels ? load_some<Floats>(p.bias + first, p.channels - first) : Floats{};
}

// Lines of 4-bit codes to lines of bytes, code - zero_point.
INLINE void unpack(const uint8_t* from, int64_t lines, uint8_t* to, uint8_t zero_point = 0) {
    for (int64_t i = 0; i < LINE * lines; i += sizeof(Bytes)) {
        const Bytes line = load<Bytes>(from + i), low = (line & 15) - zero_point, high = (line >> 4) - zero_point;
        const int64_t at = i + i / LINE * LINE;
        store(to + at, low);
        store(to + at + LINE, high);
    }
}

}  // namespace infoquant::gemm
