// What the two kernels of the quantized GEMM share: tiles of the input, weights that are unpacked, and the output.
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
    const int8_t* values;       // [tokens, features]
    const float* scale;         // [tokens, segments]
    const int32_t* offset;      // [tokens, segments], or null
    const uint8_t* weight;      // [panels, lines, line]
    const float* weight_scale;  // [channels]
    const uint8_t* multiplier;  // [panels, weight_groups, PANEL]; null: 1
    const uint8_t* zero_point;  // [panels, weight_groups, PANEL]; null: `middle` for all
    const float* bias;          // [channels] or null
    void* out;                  // [tokens, channels]
    Dtype out_dtype;
    int64_t tokens, features, channels, segments, weight_groups, middle;
    int64_t lines = div_up(features, 4), panels = div_up(channels, PANEL);
    int64_t steps = lines / segments, group_steps = lines / weight_groups;  // lines of a segment, of a weight group
    int64_t run = std::gcd(steps, group_steps);                            // lines within one of each
    int64_t sum_steps = steps;                                             // lines of an entry of Tile::minus_sum
};

// Inputs of a few tokens. WIDTH words of a row lie next to each other; segments are padded with zeros to whole ones.
// A kernel with ONES_ROW has one more row where the inputs have offsets: of ones, whose products are sums of weights.
struct Tile {
    int64_t first, rows;       // tokens first .. first + rows
    const int32_t* words;      // [segments, steps / WIDTH, padded rows, WIDTH]: four values each
    const int32_t* minus_sum;  // [segments * steps / sum_steps, rows]: minus the sum of the values, where SUMMED
    const int32_t* offset;     // [segments, rows]
    const float* scale;        // [segments, rows]
};

// 32-bit words that `make_tile` writes for a row.
inline int64_t row_words(const Problem& p, int64_t width) {
    return p.segments * (round_up(p.steps, width) + p.steps / p.sum_steps + 2);
}

INLINE int32_t sum_of(const int8_t* values, int64_t count) { return std::accumulate(values, values + count, int32_t{0}); }

// The tile of tokens first .. first + rows, in memory for padded_rows. Kernel::write_words lays out the words.
template <typename Kernel, bool SUMMED>
Tile make_tile(const Problem& p, int64_t first, int64_t rows, bool ones, int64_t padded_rows, int32_t* words) {
    const int64_t steps = round_up(p.steps, Kernel::WIDTH), cells = p.segments * padded_rows;
    const int64_t sums = p.steps / p.sum_steps;
    int32_t *const minus_sum = words + steps * cells, *const offset = minus_sum + sums * cells;
    float* const scale = reinterpret_cast<float*>(offset + cells);
    const std::vector<int8_t> all_ones(ones ? p.features : 0, 1);
    for (int64_t segment = 0; segment < p.segments; segment++) {
        const int64_t begin = 4 * p.steps * segment, size = std::min(4 * p.steps, p.features - begin);
        const auto row = [&](int64_t r) {
            return (r < rows ? p.values + (first + r) * p.features : all_ones.data()) + begin;
        };
        for (int64_t r = 0; r < rows; r++) {
            const int64_t at = (first + r) * p.segments + segment;
            offset[segment * rows + r] = p.offset ? p.offset[at] : 0;
            scale[segment * rows + r] = p.scale[at];
        }
        for (int64_t i = 0; SUMMED && i < sums; i++) {
            const int64_t from = 4 * p.sum_steps * i, count = std::min(4 * p.sum_steps, size - from);
            int32_t* const to = minus_sum + (segment * sums + i) * (rows + ones);
            for (int64_t r = 0; r < rows + ones; r++) to[r] = -sum_of(row(r) + from, count);
        }
        for (int64_t s = 0; s < steps; s += Kernel::BLOCK) {
            const int64_t block = std::min<int64_t>(Kernel::BLOCK, steps - s);
            for (int64_t r = 0; r < rows + ones; r++) {
                Kernel::write_words(row(r) + 4 * s, std::min(4 * block, size - 4 * s), block, padded_rows,
                                    words + (segment * steps + s) * padded_rows + r * Kernel::WIDTH);
            }
        }
    }
    return {first, rows, words, minus_sum, offset, scale};
}

// Zero-points or multipliers of a weight group in LANES channels from `first` on.
INLINE Ints weight_qparams(const Problem& p, const uint8_t* qparams, int64_t group, int64_t first) {
    constexpr int64_t AHEAD = 512;
    const uint8_t* const from = qparams + (first / PANEL * p.weight_groups + group) * PANEL + first % PANEL;
    _mm_prefetch(from + AHEAD, _MM_HINT_T0);
    return widen_bytes(from);
}

INLINE Ints zero_points(const Problem& p, int64_t group, int64_t first) {
    return p.zero_point ? weight_qparams(p, p.zero_point, group, first) : splat(static_cast<int32_t>(p.middle));
}

INLINE Ints multipliers(const Problem& p, int64_t group, int64_t first) {
    return p.multiplier ? weight_qparams(p, p.multiplier, group, first) : splat(1);
}

// The weight group that a line belongs to; 32-bit divisions are faster.
INLINE int64_t weight_group(const Problem& p, int64_t line) {
    return static_cast<uint32_t>(line) / static_cast<uint32_t>(p.group_steps);
}

// Both 16-bit halves of each lane.
INLINE Ints both_halves(Ints v) { return v | v << 16; }

// Unpacks lines of LANES channels, and of as many that are HALF further, to bytes (code - zero_point) * multiplier +
// `added`. A 16-bit product holds those of two codes, since 15 * 15 has 8 bits.
class Unpacker {
  public:
    Unpacker() = default;

    // For a weight group, in channels from `first` on.
    Unpacker(const Problem& p, int64_t group, int64_t first, int32_t added) {
        for (int h = 0; h < 2; h++) {
            const Ints multiplier = multipliers(p, group, first + h * HALF);
            const Ints add = (added - zero_points(p, group, first + h * HALF) * multiplier) & 255;
            add_[h] = (Bytes)(add * 0x01010101);
            multiplier_[h] = (Words)(both_halves(multiplier) << (h ? 12 : 0));
        }
    }

    // The high nibbles are multiplied where they are, times 16, and the multiplier is times 2^12.
    INLINE_MEMBER void operator()(Bytes bytes, Bytes (&weights)[2]) const {
        weights[0] = (Bytes)((Words)(bytes & 15) * multiplier_[0]) + add_[0];
        weights[1] = (Bytes)multiply_high((Words)(bytes & 0xF0), multiplier_[1]) + add_[1];
    }

  private:
    Bytes add_[2];
    Words multiplier_[2];
};

// Scales or biases of LANES channels from `first` on; 0 where there are none.
INLINE Floats channel_floats(const Problem& p, const float* floats, int64_t first) {
    return floats && first < p.channels ? load_some<Floats>(floats + first, p.channels - first) : Floats{};
}

}  // namespace infoquant::gemm
