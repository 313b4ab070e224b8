// The GEMM of a few tokens by dot products of bytes within lanes, by VNNI where the CPU has it.
#pragma once
#include <array>
#include <utility>

#include "gemm/gemm_packed.h"

namespace infoquant::gemm {

constexpr int PARTS = HALF / LANES;
constexpr int MAX_ROWS = LANES == 16 ? 12 : 4;  // rows of a tile: two accumulators each fit in the registers
constexpr int64_t AHEAD = 2048, AHEAD_WORDS = 192;  // bytes of weights and words of inputs to prefetch
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int HIGH_SHIFT = 4;    // high nibbles are multiplied in place, as 16 w
constexpr int UNPACK_TILES = 5;  // for as many tiles a panel is unpacked once for all
#else
constexpr int HIGH_SHIFT = 0;          // 16 w could overflow the 16 bits of maddubs
constexpr int UNPACK_TILES = 1 << 30;  // never: bytes need the slower exact `dot`
#endif

// Loads four features of LANES channels, and of the LANES channels that are HALF further.
template <int WEIGHT_BITS>
INLINE void load_line(const uint8_t* line, Bytes (&weights)[2]) {
    const Bytes bytes = load<Bytes>(line);
    weights[0] = WEIGHT_BITS == 8 ? bytes : bytes & 15;
    weights[1] = WEIGHT_BITS == 8 ? load<Bytes>(line + 4 * HALF) : HIGH_SHIFT ? bytes & 0xF0 : bytes >> 4;
}

// Adds sum x w of one group to dots, for all rows of a tile in several panels, and sum w to sums where inputs have
// 8 bits. Sums of high nibbles are multiplied by 2^HIGH_SHIFT.
template <int WEIGHT_BITS, int BITS, int ROWS, int PANELS>
INLINE void multiply_group(const uint8_t* weight, int64_t next_panel, const int32_t* words, int64_t steps,
                           Ints (&dots)[PANELS][ROWS][2], Ints (&sums)[PANELS][2]) {
    for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) {
            const uint8_t* const line = weight + p * next_panel + s * 16 * WEIGHT_BITS;
            _mm_prefetch(line + AHEAD, _MM_HINT_T0);
            if (WEIGHT_BITS == 8) _mm_prefetch(line + AHEAD + 4 * HALF, _MM_HINT_T0);
            if (p == 0) _mm_prefetch(words + s * ROWS + AHEAD_WORDS, _MM_HINT_T0);
            Bytes weights[2];
            load_line<WEIGHT_BITS>(line, weights);
            if (BITS == 8) {
                sums[p][0] = dot(sums[p][0], weights[0], splat(0x01010101), false);
                sums[p][1] = dot(sums[p][1], weights[1], splat(0x01010101), false);
            }
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                const Ints x = splat(words[s * ROWS + r]);
                dots[p][r][0] = dot(dots[p][r][0], weights[0], x, WEIGHT_BITS == 8 && BITS == 8);
                dots[p][r][1] = dot(dots[p][r][1], weights[1], x, WEIGHT_BITS == 8 && BITS == 8);
            }
        }
    }
}

// The results of a tile in LANES channels from `channel` on and as many from channel + HALF on; in PANELS panels that
// are `apart` panels from each other, since memory serves several streams faster than one.
template <int WEIGHT_BITS, int BITS, int ROWS, int PANELS>
void multiply(const Problem& problem, const Tile& tile, const uint8_t* weight, int64_t channel, int64_t apart) {
    const Problem p = problem;
    const int64_t group_bytes = p.steps * 16 * WEIGHT_BITS;
    Floats out[PANELS][ROWS][2] = {};
    for (int64_t g = 0; g < p.groups; g++) {
        const int32_t* const minus_sum = tile.minus_sum + g * ROWS;
        Ints dots[PANELS][ROWS][2], sums[PANELS][2] = {};
#pragma GCC unroll 4
        for (int q = 0; q < PANELS; q++) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const int shift = h && WEIGHT_BITS == 4 ? HIGH_SHIFT : 0;
                const int64_t first = channel + q * apart * PANEL + h * HALF;
                const Ints zero_point = zero_points(p, g, first) << shift;
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) dots[q][r][h] = zero_point * minus_sum[r];
            }
        }
        multiply_group<WEIGHT_BITS, BITS, ROWS, PANELS>(weight + g * group_bytes, apart * p.groups * group_bytes,
                                                        tile.words + g * p.steps * ROWS, p.steps, dots, sums);
#pragma GCC unroll 4
        for (int q = 0; q < PANELS; q++) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const int shift = h && WEIGHT_BITS == 4 ? HIGH_SHIFT : 0;
                const int64_t first = channel + q * apart * PANEL + h * HALF;
                const Floats scale = group_scales(p, g, first);
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) {
                    Ints exact = dots[q][r][h];
                    if (BITS == 8) exact -= sums[q][h] * tile.zp_offset[g * ROWS + r];
                    out[q][r][h] += __builtin_convertvector(exact >> shift, Floats) * scale * tile.scale[g * ROWS + r];
                }
            }
        }
    }
    for (int q = 0; q < PANELS; q++) {
        for (int h = 0; h < 2; h++) {
            const int64_t first = channel + q * apart * PANEL + h * HALF;
            if (first >= p.channels) continue;
            const Floats scale = weight_scales(p, 0, first), bias = biases(p, first);
            for (int r = 0; r < ROWS; r++) finish(p, tile.first + r, first, out[q][r][h], scale, bias);
        }
    }
}

using Multiply = void (*)(const Problem&, const Tile&, const uint8_t*, int64_t, int64_t);

template <int WEIGHT_BITS, int BITS, int... ROWS>
constexpr std::array<Multiply, sizeof...(ROWS)> multiply_by_rows(std::integer_sequence<int, ROWS...>) {
    return {multiply<WEIGHT_BITS, BITS, ROWS + 1, 1>...};
}

template <int WEIGHT_BITS, int BITS>
constexpr auto BY_ROWS = multiply_by_rows<WEIGHT_BITS, BITS>(std::make_integer_sequence<int, MAX_ROWS>());

// Multiplies all tiles by one panel.
template <int WEIGHT_BITS, int BITS>
void multiply_panel(const Problem& p, const Tile* tiles, int64_t count, int64_t panel) {
    const uint8_t* weight = p.weight + panel * p.groups * p.steps * 16 * WEIGHT_BITS;
    const bool unpacked = WEIGHT_BITS == 4 && count >= UNPACK_TILES;
    if (unpacked) {
        static thread_local Buffer<uint8_t> kept;
        uint8_t* const to = kept.reserve(p.groups * p.steps * 2 * LINE);
        unpack(weight, p.groups * p.steps, to);
        weight = to;
    }
    const auto& by_rows = unpacked ? BY_ROWS<8, BITS> : BY_ROWS<WEIGHT_BITS, BITS>;
    for (int64_t i = 0; i < count; i++) {
        for (int part = 0; part < PARTS; part++) {
            by_rows[tiles[i].rows - 1](p, tiles[i], weight + part * 4 * LANES, panel * PANEL + part * LANES, 0);
        }
    }
}

// Tiles of a few rows, whose sums stay in vector registers.
struct VectorKernel {
    static constexpr int ROWS = MAX_ROWS, WIDTH = 1, UNIT = 1;
    static constexpr int BLOCK = 64;  // words of a row at a time: what they are scattered to stays in the L1 cache

    template <int BITS>
    static bool needs_sums(const Problem&) {
        return true;
    }

    static void write_words(const uint8_t* codes, int64_t size, uint8_t zero_point, int64_t count, int64_t padded_rows,
                            int32_t* to) {
        int8_t bytes[4 * BLOCK] = {};
        for (int64_t i = 0; i < size; i++) bytes[i] = static_cast<int8_t>(codes[i] - zero_point);
        for (int64_t i = 0; i < count; i++) memcpy(to + i * padded_rows, bytes + 4 * i, 4);
    }

    // Multiplies all tiles by all panels; called by every thread of a parallel region.
    template <int WEIGHT_BITS, int BITS>
    static void multiply_panels(const Problem& p, const Tile* tiles, int64_t count);
};

template <int WEIGHT_BITS, int BITS>
void VectorKernel::multiply_panels(const Problem& p, const Tile* tiles, int64_t count) {
    constexpr int STREAMS = 4, MAX_STREAM_ROWS = LANES == 16 ? 2 : 1;  // sums of all streams fit in the registers
    const int64_t apart = p.panels / STREAMS;
    const bool streams = count == 1 && tiles[0].rows <= MAX_STREAM_ROWS;
    if (streams) {
        const Multiply multiply_streams =
            tiles[0].rows == 1 ? multiply<WEIGHT_BITS, BITS, 1, STREAMS>
                               : multiply<WEIGHT_BITS, BITS, MAX_STREAM_ROWS, STREAMS>;
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < apart; panel++) {
            for (int part = 0; part < PARTS; part++) {
                multiply_streams(p, tiles[0],
                                 p.weight + panel * p.groups * p.steps * 16 * WEIGHT_BITS + part * 4 * LANES,
                                 panel * PANEL + part * LANES, apart);
            }
        }
    }
#pragma omp for schedule(static)
    for (int64_t panel = streams ? apart * STREAMS : 0; panel < p.panels; panel++) {
        multiply_panel<WEIGHT_BITS, BITS>(p, tiles, count, panel);
    }
}

}  // namespace infoquant::gemm
