// Products of many rows by AMX: four of its registers hold sums of 32 tokens and 32 channels.
#pragma once
#ifdef __AMX_INT8__
#include "amx.h"
#include "packed_product.h"

namespace infoquant {
namespace product {

struct MatrixTiles {
    static constexpr int ROWS = 32, WIDTH = 16, UNIT = 16;  // of tokens; words side by side; tokens of a register
    static constexpr int FROM = 13;  // tokens: fewer are one tile of the other way, which reads weights faster

    template <int WEIGHT_BITS, int BITS>
    static void multiply_panels(const Problem& p, const Tile* tiles, int64_t count);
};

// Adds the products of a tile and some registers of a panel to dots [ROWS, PANEL], or begins them.
// MANY: more than 16 tokens. Meanwhile some cache lines from `ahead` on are fetched for each register.
template <bool MANY>
INLINE void multiply_registers(const int8_t* inputs, const uint8_t* weights, int64_t registers, bool begin,
                               int32_t* dots, const uint8_t* ahead, int64_t fetched) {
    constexpr int64_t ROW = 2 * LINE, TILE = 16 * 64, BELOW = 16 * PANEL;
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        if (MANY) _tile_zero(2);
        if (MANY) _tile_zero(3);
    } else {
        _tile_loadd(0, dots, 4 * PANEL);
        _tile_loadd(1, dots + HALF, 4 * PANEL);
        if (MANY) _tile_loadd(2, dots + BELOW, 4 * PANEL);
        if (MANY) _tile_loadd(3, dots + BELOW + HALF, 4 * PANEL);
    }
    for (int64_t i = 0; i < registers; i++) {
        const int8_t* const x = inputs + i * (MANY ? 2 : 1) * TILE;
        const uint8_t* const w = weights + i * 16 * ROW;
        for (int64_t line = 0; line < fetched; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        _tile_loadd(6, w, ROW);
        _tile_loadd(4, x, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, w + LINE, ROW);
        _tile_dpbsud(1, 4, 7);
        if (MANY) {
            _tile_loadd(5, x + TILE, 64);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, dots, 4 * PANEL);
    _tile_stored(1, dots + HALF, 4 * PANEL);
    if (MANY) _tile_stored(2, dots + BELOW, 4 * PANEL);
    if (MANY) _tile_stored(3, dots + BELOW + HALF, 4 * PANEL);
}

// Sums of a tile's tokens and a panel's channels.
struct Sums {
    Ints dots[2][MatrixTiles::ROWS][2];  // of a group, and of the one before it
    Floats out[MatrixTiles::ROWS][2];    // over the groups

    int32_t* of(int64_t group) { return reinterpret_cast<int32_t*>(dots[group % 2]); }
};

// Some lines of weights in 8 bits, a third of the L1 cache.
struct Lines {
    static constexpr int64_t MOST = 128;
    // A group's last register may reach beyond it, times zeros.
    alignas(64) uint8_t bytes[(MOST + MatrixTiles::WIDTH) * 2 * LINE];
    Ints sums[MOST][2];  // sum w of each group, where inputs have 8 bits
};

template <int WEIGHT_BITS>
void read_lines(Lines& lines, const uint8_t* from, int64_t count) {
    if (WEIGHT_BITS == 4) {
        unpack(from, count, lines.bytes);
    } else {
        memcpy(lines.bytes, from, count * 2 * LINE);
    }
}

// Adds lines first .. first + count to a group's sum w.
INLINE void sum_weights(Lines& lines, int64_t group, int64_t first, int64_t count) {
    Ints sums[2] = {lines.sums[group][0], lines.sums[group][1]};
    for (int64_t i = 2 * first; i < 2 * (first + count); i++) {
        sums[i % 2] = dot(sums[i % 2], load<Bytes>(lines.bytes + i * LINE), Ints{} + 0x01010101, false);
    }
    lines.sums[group][0] = sums[0], lines.sums[group][1] = sums[1];
}

// Adds a group's sums to those over the groups.
template <int BITS>
INLINE void add_group(const Problem& p, const Tile& tile, int64_t group, const Ints (&weight_sums)[2], int64_t channel,
                      Sums& sums) {
    const Ints zero[2] = {zero_points(p, group, channel), zero_points(p, group, channel + HALF)};
    const Floats scale[2] = {group_scales(p, group, channel), group_scales(p, group, channel + HALF)};
    const int32_t *const start = tile.start + group * tile.rows, *const rest = tile.rest + group * tile.rows;
    const float* const input_scale = tile.scale + group * tile.rows;
    for (int64_t r = 0; r < tile.rows; r++) {
        for (int h = 0; h < 2; h++) {
            Ints exact = sums.dots[group % 2][r][h] + zero[h] * start[r];
            if (BITS == 8) exact -= weight_sums[h] * rest[r];
            sums.out[r][h] += __builtin_convertvector(exact, Floats) * scale[h] * input_scale[r];
        }
    }
}

INLINE void finish(const Problem& p, const Tile& tile, int64_t channel, const Sums& sums) {
    const int64_t second = channel + HALF;
    const Floats scale[2] = {weight_scales(p, 0, channel), weight_scales(p, 0, second)};
    const Floats bias[2] = {biases(p, channel), biases(p, second)};
    for (int64_t r = 0; r < tile.rows; r++) {
        finish(p, tile.first + r, channel, sums.out[r][0], scale[0], bias[0]);
        if (second < p.channels) finish(p, tile.first + r, second, sums.out[r][1], scale[1], bias[1]);
    }
}

// All tiles in one panel: a few lines of it at a time, of some groups or of a part of one, meet all tokens.
template <int WEIGHT_BITS, int BITS>
void multiply_panel(const Problem& p, const Tile* tiles, int64_t count, const uint8_t* weights, int64_t channel) {
    constexpr int64_t DEPTH = MatrixTiles::WIDTH, CACHE_LINES = DEPTH * WEIGHT_BITS / 4;  // of a register's weights
    static thread_local Lines lines;
    static thread_local std::vector<Sums> kept;
    const int64_t padded = round_up(p.steps, DEPTH), some = std::clamp<int64_t>(Lines::MOST / p.steps, 1, p.groups);
    const int64_t apart = p.groups * p.steps <= Lines::MOST ? 0 : 1;  // 0: all lines at once
    if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
    const int64_t fetched = (CACHE_LINES + count - 1) / count;
    for (int64_t first = 0; first < p.groups; first += some) {
        const int64_t groups = std::min(some, p.groups - first);
        for (int64_t step = 0; step < p.steps; step += Lines::MOST) {
            const int64_t steps = std::min(Lines::MOST, p.steps - step), registers = (steps + DEPTH - 1) / DEPTH;
            const bool last = step + steps == p.steps;
            read_lines<WEIGHT_BITS>(lines, weights, groups * steps);
            weights += groups * steps * LINE * WEIGHT_BITS / 4;
            for (int64_t g = 0; BITS == 8 && g < groups; g++) {
                if (step == 0) lines.sums[g][0] = lines.sums[g][1] = Ints{};
                sum_weights(lines, g, g * steps, steps);
            }
            const uint8_t* ahead = weights;
            for (int64_t i = 0; i < count; i++) {
                const int64_t room = round_up(tiles[i].rows, MatrixTiles::UNIT);
                Sums& sums = kept[i * apart];
                if (first == 0 && step == 0) std::fill_n(&sums.out[0][0], 2 * tiles[i].rows, Floats{});
                for (int64_t g = 0; g <= groups; g++) {  // a group's sums are added while the next one is multiplied
                    if (g < groups) {
                        const int32_t* const x = tiles[i].words + ((first + g) * padded + step) * room;
                        const auto multiply = room > 16 ? multiply_registers<true> : multiply_registers<false>;
                        multiply(reinterpret_cast<const int8_t*>(x), lines.bytes + g * steps * 2 * LINE, registers,
                                 step == 0, sums.of(first + g), ahead, fetched);
                        ahead += registers * fetched * 64;
                    }
                    if (g > 0 && last) add_group<BITS>(p, tiles[i], first + g - 1, lines.sums[g - 1], channel, sums);
                }
                if (last && first + groups == p.groups) finish(p, tiles[i], channel, sums);
            }
        }
    }
}

template <int WEIGHT_BITS, int BITS>
void MatrixTiles::multiply_panels(const Problem& p, const Tile* tiles, int64_t count) {
    const amx::Shapes shapes;
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < p.panels; panel++) {
        const uint8_t* const lines = p.weight + panel * p.groups * p.steps * LINE * WEIGHT_BITS / 4;
        multiply_panel<WEIGHT_BITS, BITS>(p, tiles, count, lines, panel * PANEL);
    }
}

}  // namespace product
}  // namespace infoquant
#endif
