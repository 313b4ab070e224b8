// What the two ways to multiply quantized inputs with packed weights share: words of inputs, zero points and scales.
// quantized_linear.cpp says what is computed.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "simd.h"

namespace infoquant {
namespace product {

constexpr int PANEL = 32;        // channels
constexpr int HALF = PANEL / 2;  // channels in the low nibbles of a line; the others are in the high ones
constexpr int LINE = 4 * HALF;   // bytes of 4-bit weights: four features of a panel

struct Problem {
    const uint8_t* codes;        // [tokens, features]
    const float* scale;          // [tokens, input_groups]
    const int32_t* zero;         // [tokens, input_groups]
    const uint8_t* weight;       // [panels, groups * steps, line]
    const float* weight_scale;   // [weight_groups, channels]
    const uint8_t* weight_zero;  // [weight_groups, channels], or null: `offset`
    const float* bias;           // [channels] or null
    void* out;                   // [tokens, channels]
    int64_t tokens, features, channels, input_groups, weight_groups, out_type, offset;
    int64_t groups = std::max(input_groups, weight_groups), group_size = features / groups;
    int64_t steps = (group_size + 3) / 4;  // of four features, in a group
    int64_t panels = (channels + PANEL - 1) / PANEL;
};

// A few tokens' inputs. WIDTH words of a row lie next to each other; zeros fill the features of a group.
struct Tile {
    int64_t first, rows;   // tokens
    const int32_t* words;  // [groups, steps / WIDTH, rows, WIDTH]: x, four signed bytes
    const int32_t* start;  // [groups, rows]: - sum (code - z), where SUMMED
    const int32_t* rest;   // [groups, rows]: r
    const float* scale;    // [groups, rows]
};

// Of 32 bits, that `make_tile` writes for each row.
inline int64_t row_words(const Problem& p, int64_t width) { return p.groups * (round_up(p.steps, width) + 3); }

// `rows` of them from `first` on; `room` rows of words are kept for them, which Way::write_words writes.
template <int BITS, typename Way, bool SUMMED>
Tile make_tile(const Problem& p, int64_t first, int64_t rows, int64_t room, int32_t* words) {
    const int64_t steps = round_up(p.steps, Way::WIDTH), cells = p.groups * rows, ratio = p.groups / p.input_groups;
    int32_t *const start = words + p.groups * steps * room, *const rest = start + cells;
    float* const scale = reinterpret_cast<float*>(rest + cells);
    for (int64_t g = 0; g < p.groups; g++) {
        const int64_t range = first * p.input_groups + g / ratio, cell = g * rows;
        for (int64_t r = 0; r < rows; r++) {
            const int32_t zero = p.zero[range + r * p.input_groups];
            start[cell + r] = zero * static_cast<int32_t>(p.group_size);
            rest[cell + r] = zero - 128;
            scale[cell + r] = p.scale[range + r * p.input_groups];
        }
        for (int64_t s = 0; s < steps; s += Way::BLOCK) {
            const int64_t block = std::min<int64_t>(Way::BLOCK, steps - s);
            const int64_t size = std::min(4 * block, p.group_size - 4 * s);
            for (int64_t r = 0; r < rows; r++) {
                const uint8_t* const codes = p.codes + (first + r) * p.features + g * p.group_size + 4 * s;
                const uint8_t taken = BITS == 8 ? 128 : rest[cell + r] + 128;
                if (SUMMED) start[cell + r] -= std::accumulate(codes, codes + size, int32_t{0});
                Way::write_words(codes, size, taken, block, room, words + (g * steps + s) * room + r * Way::WIDTH);
            }
        }
    }
    return {first, rows, words, start, rest, scale};
}

// The zero points of a group, for LANES channels from `first` on.
INLINE Ints zero_points(const Problem& p, int64_t group, int64_t first) {
    typedef uint8_t Zeros __attribute__((vector_size(LANES)));
    if (!p.weight_zero) return Ints{} + static_cast<int32_t>(p.offset);
    if (first >= p.channels) return Ints{};
    const uint8_t* const zeros = p.weight_zero + group * p.weight_groups / p.groups * p.channels;
    return __builtin_convertvector(load_some<Zeros>(zeros + first, p.channels - first), Ints);
}

// Scales of the weights of a group, for LANES channels from `first` on.
INLINE Floats weight_scales(const Problem& p, int64_t group, int64_t first) {
    if (first >= p.channels) return Floats{};
    const float* const scales = p.weight_scale + group * p.weight_groups / p.groups * p.channels;
    return load_some<Floats>(scales + first, p.channels - first);
}

INLINE void store(const Problem& p, int64_t token, int64_t channel, Floats x) {
    const int64_t left = p.channels - channel, at = token * p.channels + channel;
    if (p.out_type == BFLOAT16) return store_part<BFLOAT16>(p.out, at, left, x);
    if (p.out_type == FLOAT16) return store_part<FLOAT16>(p.out, at, left, x);
    store_part<FLOAT32>(p.out, at, left, x);
}

// By what to multiply a group's sums before those of groups are added: where all groups share the scale of a channel,
// it is left to `finish`.
INLINE Floats group_scales(const Problem& p, int64_t group, int64_t first) {
    return p.weight_groups > 1 ? weight_scales(p, group, first) : Floats{} + 1;
}

// A channel's scale where all groups share it.
INLINE Floats channel_scales(const Problem& p, int64_t first) {
    return p.weight_groups == 1 ? weight_scales(p, 0, first) : Floats{} + 1;
}

// Sums over the groups, of LANES channels from `first` on, to `out`.
INLINE void finish(const Problem& p, int64_t token, int64_t first, Floats sum, Floats scale, Floats bias) {
    if (p.weight_groups == 1) sum *= scale;
    if (p.bias) sum += bias;
    store(p, token, first, sum);
}

INLINE Floats biases(const Problem& p, int64_t first) {
    return p.bias && first < p.channels ? load_some<Floats>(p.bias + first, p.channels - first) : Floats{};
}

// Lines of 4-bit weights as lines of 8-bit ones, less `zero` each.
INLINE void unpack(const uint8_t* from, int64_t lines, uint8_t* to, uint8_t zero = 0) {
    for (int64_t i = 0; i < LINE * lines; i += sizeof(Bytes)) {
        const Bytes line = load<Bytes>(from + i), low = (line & 15) - zero, high = (line >> 4) - zero;
        const int64_t at = i + i / LINE * LINE;
        memcpy(to + at, &low, sizeof low);
        memcpy(to + at + LINE, &high, sizeof high);
    }
}

}  // namespace product
}  // namespace infoquant
