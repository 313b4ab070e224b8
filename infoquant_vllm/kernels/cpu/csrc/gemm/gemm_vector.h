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
constexpr bool VNNI = true;
constexpr int UNPACK_TILES = 5;  // for as many tiles a panel is unpacked once for all
#else
constexpr bool VNNI = false;
constexpr int UNPACK_TILES = 1 << 30;  // never: bytes need the slower exact `dot`
#endif

// What lines hold: 4-bit codes of rows, 4-bit codes of groups, whose multipliers are applied as they are unpacked or to
// sums of their products, or bytes.
enum Kind { CODES, SCALED, SUMMED, BYTES };
constexpr int64_t line_bytes(Kind kind) { return kind == BYTES ? 2 * LINE : LINE; }

// Products of high nibbles are 2^high_shift too large: these are multiplied where they are.
constexpr int high_shift(Kind kind) { return VNNI && (kind == CODES || kind == SUMMED) ? 4 : 0; }

constexpr int32_t UNPACKED_ZERO = 128;  // of SCALED weights that are unpacked

// Lines of a weight group and a segment, in PANELS panels.
struct Run {
    const uint8_t* weight;
    int64_t next_panel;    // bytes
    const int32_t* words;  // [steps, rows]
    int64_t steps, group, channel, next_channel;
};

template <Kind KIND>
INLINE const uint8_t* prefetched_line(const Run& run, int64_t step, int panel) {
    const uint8_t* const line = run.weight + panel * run.next_panel + step * line_bytes(KIND);
    _mm_prefetch(line + AHEAD, _MM_HINT_T0);
    if (KIND == BYTES) _mm_prefetch(line + AHEAD + LINE, _MM_HINT_T0);
    return line;
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// Adds sum x w to sums, for all rows of a tile in several panels.
template <Kind KIND, int ROWS, int PANELS>
INLINE void add_products(const Problem& p, const Run& run, Ints (&sums)[PANELS][ROWS][2]) {
    std::array<Unpacker, PANELS> unpackers;
    for (int q = 0; KIND == SCALED && q < PANELS; q++) {
        unpackers[q] = Unpacker(p, run.group, run.channel + q * run.next_channel, UNPACKED_ZERO);
    }
    for (int64_t s = 0; s < run.steps; s++) {
        _mm_prefetch(run.words + s * ROWS + AHEAD_WORDS, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int q = 0; q < PANELS; q++) {
            const uint8_t* const line = prefetched_line<KIND>(run, s, q);
            Bytes weights[2] = {load<Bytes>(line), load<Bytes>(line + (KIND == BYTES ? LINE : 0))};
            if (high_shift(KIND)) weights[0] &= 15, weights[1] &= 0xF0;
            if (KIND == SCALED) unpackers[q](weights[0], weights);
#pragma GCC unroll 13
            for (int r = 0; r < ROWS; r++) {
                const Ints x = splat(run.words[s * ROWS + r]);
                sums[q][r][0] = dot(sums[q][r][0], weights[0], x, true);
                sums[q][r][1] = dot(sums[q][r][1], weights[1], x, true);
            }
        }
    }
}

// Adds sum x w times the multipliers to dots, for all rows of a tile in several panels.
template <Kind KIND, int ROWS, int PANELS>
INLINE void multiply_run(const Problem& p, const Run& run, Ints (&dots)[PANELS][ROWS][2]) {
    if constexpr (KIND != SUMMED) return add_products<KIND>(p, run, dots);
    Ints sums[PANELS][ROWS][2] = {};
    asm("" : "+m"(dots));  // in memory: GCC would rather keep these in registers than what the loop adds to
    add_products<KIND>(p, run, sums);
#pragma GCC unroll 4
    for (int q = 0; q < PANELS; q++) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const Ints multiplier = multipliers(p, run.group, run.channel + q * run.next_channel + h * HALF);
#pragma GCC unroll 13
            for (int r = 0; r < ROWS; r++) dots[q][r][h] += (sums[q][r][h] >> (h ? high_shift(KIND) : 0)) * multiplier;
        }
    }
}
#else
// Adds sum x w to dots, for all rows of a tile in several panels. Sums of a few products of 4-bit codes fit 16 bits;
// they are multiplied as they are widened.
template <Kind KIND, int ROWS, int PANELS>
INLINE void multiply_run(const Problem& p, const Run& run, Ints (&dots)[PANELS][ROWS][2]) {
    constexpr int64_t CHAIN = 8;  // 8 * 2 * 15 * 128 < 2^15
    for (int64_t begin = 0; begin < run.steps; begin += CHAIN) {
        const int64_t end = std::min(begin + CHAIN, run.steps);
#pragma GCC unroll 4
        for (int q = 0; q < PANELS; q++) {
            Words sums[ROWS][2] = {};
            for (int64_t s = begin; s < end; s++) {
                const uint8_t* const line = prefetched_line<KIND>(run, s, q);
                Bytes weights[2] = {load<Bytes>(line), load<Bytes>(line + (KIND == BYTES ? LINE : 0))};
                if (KIND != BYTES) weights[1] = weights[1] >> 4, weights[0] &= 15;
#pragma GCC unroll 5
                for (int r = 0; r < ROWS; r++) {
                    const Ints x = splat(run.words[s * ROWS + r]);
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        if (KIND == BYTES) dots[q][r][h] = dot(dots[q][r][h], weights[h], x, true);
                        if (KIND != BYTES) sums[r][h] += dot_pairs(weights[h], x);
                    }
                }
            }
            if (KIND == BYTES) continue;
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const int64_t first = run.channel + q * run.next_channel + h * HALF;
                const Ints multiplier = KIND == SUMMED ? both_halves(multipliers(p, run.group, first)) : splat(0x10001);
#pragma GCC unroll 5
                for (int r = 0; r < ROWS; r++) dots[q][r][h] += dot_pairs(sums[r][h], multiplier);
            }
        }
    }
}
#endif

// What a unit of a value counts beside the products: minus that of the zero-point.
template <Kind KIND>
INLINE Ints counted_zero_points(const Problem& p, int64_t group, int64_t first) {
    if (KIND == SCALED) return splat(UNPACKED_ZERO);
    const Ints zero_point = zero_points(p, group, first);
    return KIND == SUMMED ? zero_point * multipliers(p, group, first) : zero_point;
}

// Adds sum x (w - zero_point) over a segment to dots.
template <Kind KIND, int ROWS, int PANELS>
INLINE void multiply_segment(const Problem& p, const int32_t* minus_sum, Run run, int64_t line, int64_t end,
                             Ints (&dots)[PANELS][ROWS][2]) {
    for (int64_t summed = line; line < end; line += p.run) {
        run.group = weight_group(p, line);
        if (line == summed) {
#pragma GCC unroll 4
            for (int q = 0; q < PANELS; q++) {
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const int64_t first = run.channel + q * run.next_channel + h * HALF;
                    const int shift = h && KIND == CODES ? high_shift(KIND) : 0;
                    const Ints zero_point = counted_zero_points<KIND>(p, run.group, first) << shift;
#pragma GCC unroll 13
                    for (int r = 0; r < ROWS; r++) dots[q][r][h] += zero_point * minus_sum[r];
                }
            }
            minus_sum += ROWS, summed += p.sum_steps;
        }
        multiply_run<KIND, ROWS, PANELS>(p, run, dots);
        run.weight += run.steps * line_bytes(KIND), run.words += run.steps * ROWS;
    }
}

// The results of a tile in LANES channels from `channel` on and as many from channel + HALF on; in PANELS panels that
// are `apart` panels from each other, since memory serves several streams faster than one.
template <Kind KIND, bool OFFSET, int ROWS, int PANELS>
void multiply(const Problem& problem, const Tile& tile, const uint8_t* weight, int64_t channel, int64_t apart) {
    const Problem p = problem;
    constexpr int WORDS = ROWS + OFFSET;  // the last row is of ones
    const int64_t bytes = line_bytes(KIND), next_channel = apart * PANEL, segment_sums = p.steps / p.sum_steps * WORDS;
    Floats out[PANELS][ROWS][2] = {};
    for (int64_t segment = 0; segment < p.segments; segment++) {
        const int64_t line = segment * p.steps;
        const Run run{weight + line * bytes, apart * p.lines * bytes, tile.words + line * WORDS, p.run, 0, channel,
                      next_channel};
        Ints dots[PANELS][WORDS][2] = {};
        multiply_segment<KIND, WORDS, PANELS>(p, tile.minus_sum + segment * segment_sums, run, line, line + p.steps,
                                              dots);
#pragma GCC unroll 4
        for (int q = 0; q < PANELS; q++) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) {
                    const int64_t cell = segment * ROWS + r;
                    Ints exact = dots[q][r][h];
                    if (OFFSET) exact -= dots[q][WORDS - 1][h] * tile.offset[cell];
                    exact >>= h && KIND == CODES ? high_shift(KIND) : 0;
                    out[q][r][h] += __builtin_convertvector(exact, Floats) * tile.scale[cell];
                }
            }
        }
    }
    for (int q = 0; q < PANELS; q++) {
        for (int h = 0; h < 2; h++) {
            const int64_t first = channel + q * next_channel + h * HALF;
            if (first >= p.channels) continue;
            const Floats scale = channel_floats(p, p.weight_scale, first), bias = channel_floats(p, p.bias, first);
            for (int r = 0; r < ROWS; r++) {
                const int64_t at = (tile.first + r) * p.channels + first;
                const Floats result = out[q][r][h] * scale + bias;
                with_dtype(p.out_dtype, [&](auto dtype) { store_part<dtype>(p.out, at, p.channels - first, result); });
            }
        }
    }
}

using Multiply = void (*)(const Problem&, const Tile&, const uint8_t*, int64_t, int64_t);

template <Kind KIND, bool OFFSET, int... ROWS>
constexpr std::array<Multiply, sizeof...(ROWS)> multiply_by_rows(std::integer_sequence<int, ROWS...>) {
    return {multiply<KIND, OFFSET, ROWS + 1, 1>...};
}

// Rows of a tile that is multiplied in several streams: the sums of all fit in the registers.
constexpr int MAX_STREAM_ROWS = LANES == 16 ? 2 : 1;

// Most rows of a tile of a kind. With VNNI, unpacking scaled weights takes longer than SUMMED for the fewest rows only.
constexpr int max_rows(Kind kind) { return VNNI && kind == SUMMED ? MAX_STREAM_ROWS : MAX_ROWS; }

template <Kind KIND, bool OFFSET>
constexpr auto BY_ROWS = multiply_by_rows<KIND, OFFSET>(std::make_integer_sequence<int, max_rows(KIND)>());

// Whether 4-bit panels are unpacked to bytes once for all tiles.
inline bool unpacks_panels(const Problem&, int64_t tiles) { return tiles >= UNPACK_TILES; }

// Unpacks a panel to bytes around UNPACKED_ZERO.
inline void unpack_panel(const Problem& p, const uint8_t* from, int64_t channel, uint8_t* to) {
    for (int64_t group = 0; group < p.weight_groups; group++) {
        for (int part = 0; part < PARTS; part++) {
            const Unpacker unpack(p, group, channel + part * LANES, UNPACKED_ZERO);
            for (int64_t i = group * p.group_steps; i < (group + 1) * p.group_steps; i++) {
                Bytes weights[2];
                unpack(load<Bytes>(from + i * LINE + part * 4 * LANES), weights);
                store(to + 2 * i * LINE + part * 4 * LANES, weights[0]);
                store(to + (2 * i + 1) * LINE + part * 4 * LANES, weights[1]);
            }
        }
    }
}

// Problem `p` with weights that are unpacked to bytes.
inline Problem unpacked(Problem p) {
    p.multiplier = p.zero_point = nullptr;
    p.middle = UNPACKED_ZERO;
    p.run = p.steps;
    return p;
}

// Multiplies all tiles by one panel.
template <Kind KIND, bool OFFSET>
void multiply_panel(const Problem& p, const Tile* tiles, int64_t count, int64_t panel) {
    const auto multiply = [&](const auto& by_rows, const Problem& problem, const uint8_t* weight) {
        for (int64_t i = 0; i < count; i++) {
            for (int part = 0; part < PARTS; part++) {
                by_rows[tiles[i].rows - 1](problem, tiles[i], weight + part * 4 * LANES, panel * PANEL + part * LANES, 0);
            }
        }
    };
    const uint8_t* const weight = p.weight + panel * p.lines * line_bytes(KIND);
    if (KIND == BYTES || !unpacks_panels(p, count)) return multiply(BY_ROWS<KIND, OFFSET>, p, weight);
    static thread_local Buffer<uint8_t> kept;
    uint8_t* const bytes = kept.reserve(p.lines * 2 * LINE);
    unpack_panel(p, weight, panel * PANEL, bytes);
    multiply(BY_ROWS<BYTES, OFFSET>, unpacked(p), bytes);
}

// Tiles of a few rows, whose sums stay in vector registers.
struct VectorKernel {
    static constexpr int ROWS = MAX_ROWS, WIDTH = 1, UNIT = 1;
    static constexpr int BLOCK = 64;  // words of a row at a time: what they are scattered to stays in the L1 cache
    static constexpr bool ONES_ROW = true;

    static bool needs_sums(const Problem&) { return true; }

    static Kind kind(const Problem& p, int64_t tokens) {
        const bool grouped = p.weight_groups > 1 || p.multiplier;
        return !grouped ? CODES : tokens <= max_rows(SUMMED) || !VNNI ? SUMMED : SCALED;
    }

    // Lines of an entry of Tile::minus_sum.
    static int64_t sum_steps(const Problem& p, int64_t tokens) { return kind(p, tokens) == SUMMED ? p.run : p.steps; }

    static void write_words(const int8_t* values, int64_t size, int64_t count, int64_t padded_rows, int32_t* to) {
        const int64_t whole = std::min(size / 4, count);
        for (int64_t i = 0; i < whole; i++) memcpy(to + i * padded_rows, values + 4 * i, 4);
        if (whole == count) return;
        to[whole * padded_rows] = 0;
        memcpy(to + whole * padded_rows, values + 4 * whole, size - 4 * whole);
    }

    // Multiplies all tiles by all panels; called by every thread of a parallel region.
    template <int WEIGHT_BITS, bool OFFSET>
    static void multiply_panels(const Problem& p, const Tile* tiles, int64_t count);
};

template <Kind KIND, bool OFFSET>
void multiply_all(const Problem& p, const Tile* tiles, int64_t count) {
    constexpr int STREAMS = 4;
    const int64_t apart = p.panels / STREAMS;
    const bool streams = count == 1 && tiles[0].rows <= MAX_STREAM_ROWS;
    if (streams) {
        const Multiply multiply_streams = tiles[0].rows == 1 ? multiply<KIND, OFFSET, 1, STREAMS>
                                                             : multiply<KIND, OFFSET, MAX_STREAM_ROWS, STREAMS>;
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < apart; panel++) {
            for (int part = 0; part < PARTS; part++) {
                multiply_streams(p, tiles[0], p.weight + panel * p.lines * line_bytes(KIND) + part * 4 * LANES,
                                 panel * PANEL + part * LANES, apart);
            }
        }
    }
#pragma omp for schedule(static)
    for (int64_t panel = streams ? apart * STREAMS : 0; panel < p.panels; panel++) {
        multiply_panel<KIND, OFFSET>(p, tiles, count, panel);
    }
}

template <int WEIGHT_BITS, bool OFFSET>
void VectorKernel::multiply_panels(const Problem& p, const Tile* tiles, int64_t count) {
    if (WEIGHT_BITS == 8) return multiply_all<BYTES, OFFSET>(p, tiles, count);
    const Kind found = kind(p, count > 1 ? MAX_ROWS + 1 : tiles[0].rows);
    if (found == CODES) return multiply_all<CODES, OFFSET>(p, tiles, count);
    if (VNNI && found == SCALED) return multiply_all<SCALED, OFFSET>(p, tiles, count);
    multiply_all<SUMMED, OFFSET>(p, tiles, count);
}

}  // namespace infoquant::gemm
