// The GEMM of many tokens by AMX: four tile registers hold the sums of 32 tokens and 32 channels.
#pragma once
#ifdef __AMX_INT8__
#include "gemm/gemm_packed.h"
#include "simd/amx.h"

namespace infoquant::gemm {

struct AmxKernel {
    static constexpr int ROWS = 32;         // tokens of a tile
    static constexpr int WIDTH = 16;        // words of a row that lie side by side
    static constexpr int UNIT = 16;         // tokens of a tile register
    static constexpr int MIN_TOKENS = 13;   // VectorKernel reads weights faster for the one tile of fewer tokens
    static constexpr int BLOCK = 1 << 20;   // words of a row that are written at a time: all

    // Where all weights have one zero-point, it is subtracted as they are unpacked, and needs no sums of inputs.
    template <int BITS>
    static bool needs_sums(const Problem& p) {
        return BITS == 8 || p.weight_zero_point;
    }

    static void write_words(const uint8_t* codes, int64_t size, uint8_t zero_point, int64_t count, int64_t padded_rows,
                            int32_t* to) {
        const __m512i zero_points = _mm512_set1_epi8(zero_point);
        for (int64_t i = 0; i < count; i += WIDTH, codes += 64, size -= 64) {
            const __mmask64 mask = size >= 64 ? ~0ull : (1ull << size) - 1;
            const __m512i line = _mm512_maskz_loadu_epi8(mask, codes);
            _mm512_storeu_si512(to + i * padded_rows, _mm512_maskz_sub_epi8(mask, line, zero_points));
        }
    }

    template <int WEIGHT_BITS, int BITS>
    static void multiply_panels(const Problem& p, const Tile* tiles, int64_t count);
};

// A macro because the intrinsics take register numbers as literals. Inputs are signed; weights are if SIGNED.
#define MULTIPLY(sums, inputs, weights)             \
    if (SIGNED) {                                   \
        _tile_dpbssd(sums, inputs, weights);        \
    } else {                                        \
        _tile_dpbsud(sums, inputs, weights);        \
    }

// Adds the products of a tile and some registers of a panel to dots [ROWS, PANEL], or sets them if `begin`.
// MANY: more than 16 tokens. meanwhile(i) is called after the products of register i, and runs while AMX computes them.
template <bool SIGNED, bool MANY, typename Meanwhile>
INLINE void multiply_registers(const int8_t* inputs, const uint8_t* weights, int64_t registers, bool begin,
                               int32_t* dots, const Meanwhile& meanwhile) {
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
        _tile_loadd(6, w, ROW);
        _tile_loadd(4, x, 64);
        MULTIPLY(0, 4, 6)
        _tile_loadd(7, w + LINE, ROW);
        MULTIPLY(1, 4, 7)
        if (MANY) {
            _tile_loadd(5, x + TILE, 64);
            MULTIPLY(2, 5, 6)
            MULTIPLY(3, 5, 7)
        }
        meanwhile(i);
    }
    _tile_stored(0, dots, 4 * PANEL);
    _tile_stored(1, dots + HALF, 4 * PANEL);
    if (MANY) _tile_stored(2, dots + BELOW, 4 * PANEL);
    if (MANY) _tile_stored(3, dots + BELOW + HALF, 4 * PANEL);
}

#undef MULTIPLY

// Sums of the tokens of a tile and the channels of a panel.
struct Sums {
    Ints dots[AmxKernel::ROWS][2];   // of one group
    Floats out[AmxKernel::ROWS][2];  // over the groups so far
};

// Qparams of a weight group, of a panel's channels.
struct Group {
    Ints zero_point[2];
    Ints sums[2];     // sum w, where inputs have 8 bits
    Floats scale[2];  // where each group has its own
};

// Unpacked lines of weights; they take less than half of the L1 cache.
struct Lines {
    static constexpr int64_t MAX_LINES = 144;         // of one group
    static constexpr int64_t MAX_GROUPED_LINES = 80;  // of several groups
    // The last register of a group may read beyond it: the inputs there are zeros.
    alignas(64) uint8_t bytes[(MAX_LINES + AmxKernel::WIDTH) * 2 * LINE];
    Group groups[MAX_GROUPED_LINES];
};

// Unpacks `count` lines, code - zero_point.
template <int WEIGHT_BITS>
void read_lines(Lines& lines, const uint8_t* from, int64_t count, uint8_t zero_point) {
    if (WEIGHT_BITS == 4) return unpack(from, count, lines.bytes, zero_point);
    for (int64_t i = 0; i < count * 2 * LINE; i += sizeof(Bytes)) {
        store(lines.bytes + i, load<Bytes>(from + i) - zero_point);
    }
}

template <bool SIGNED, bool GROUPED>
INLINE void begin_group(const Problem& p, int64_t index, int64_t channel, Group& group) {
    for (int64_t h = 0; h < 2; h++) {
        group.sums[h] = Ints{};
        if (!SIGNED) group.zero_point[h] = zero_points(p, index, channel + h * HALF);
        if (GROUPED) group.scale[h] = weight_scales(p, index, channel + h * HALF);
    }
}

// Adds `count` lines to sum w of a group.
INLINE void sum_weights(Group& group, const uint8_t* lines, int64_t count) {
    Ints sums[2] = {group.sums[0], group.sums[1]};
    for (int64_t i = 0; i < 2 * count; i++) {
        sums[i % 2] = dot(sums[i % 2], load<Bytes>(lines + i * LINE), splat(0x01010101), false);
    }
    group.sums[0] = sums[0], group.sums[1] = sums[1];
}

// The epilogue of a tile and a group of a panel: integer sums to float32, over the groups, to the output.
struct Epilogue {
    const Tile* tile;
    int64_t group, channel;
    const Ints (*dots)[2];  // [ROWS]
    const Group* weights;
    Floats (*out)[2];  // [ROWS]: sums of the terms of earlier groups
};

// Calls use(row, first half, second half) with the terms that the group adds to the results of rows first .. last.
template <int BITS, bool SIGNED, bool GROUPED, typename Use>
INLINE void group_terms(const Epilogue& part, int64_t first, int64_t last, const Use& use) {
    const Ints zero_point[2] = {part.weights->zero_point[0], part.weights->zero_point[1]};
    const Ints weight_sums[2] = {part.weights->sums[0], part.weights->sums[1]};
    const Floats weight_scale[2] = {part.weights->scale[0], part.weights->scale[1]};
    const int64_t cell = part.group * part.tile->rows;
    const int32_t *const minus_sum = part.tile->minus_sum + cell, *const zp_offset = part.tile->zp_offset + cell;
    const float* const scale = part.tile->scale + cell;
    const Ints(*const dots)[2] = part.dots;
    for (int64_t r = first; r < last; r++) {
        Floats term[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            Ints exact = dots[r][h];
            if (!SIGNED) exact += zero_point[h] * minus_sum[r];
            if (BITS == 8) exact -= weight_sums[h] * zp_offset[r];
            const Floats sum = __builtin_convertvector(exact, Floats);
            term[h] = (GROUPED ? sum * weight_scale[h] : sum) * scale[r];
        }
        use(r, term[0], term[1]);
    }
}

// Writes the results of some rows after their last group.
template <int BITS, bool SIGNED, bool GROUPED, Dtype DTYPE>
INLINE void write(const Problem& p, const Epilogue& part, int64_t first, int64_t last) {
    const int64_t channel = part.channel, left = p.channels - channel, to = part.tile->first * p.channels + channel;
    const Floats scale[2] = {channel_scales(p, channel), channel_scales(p, channel + HALF)};
    const Floats bias[2] = {biases(p, channel), biases(p, channel + HALF)};
    const Floats(*const earlier)[2] = part.out;
    const bool only = part.group == 0;
    void* const out = p.out;
    const int64_t channels = p.channels;
    group_terms<BITS, SIGNED, GROUPED>(part, first, last, [&](int64_t r, Floats low, Floats high) {
        if (!only) low = earlier[r][0] + low, high = earlier[r][1] + high;
        low = low * scale[0] + bias[0], high = high * scale[1] + bias[1];
        const int64_t row = to + r * channels;
        if (left >= PANEL) {
            store_part<DTYPE>(out, row, LANES, low);
            store_part<DTYPE>(out, row + HALF, LANES, high);
        } else {
            store_part<DTYPE>(out, row, left, low);
            if (left > HALF) store_part<DTYPE>(out, row + HALF, left - HALF, high);
        }
    });
}

// Adds the terms of some rows to those of earlier groups, or writes the results where the group is the last.
template <int BITS, bool SIGNED, bool GROUPED>
INLINE void add_rows(const Problem& p, const Epilogue& part, int64_t first, int64_t last) {
    if (part.group == p.groups - 1) {
        return with_dtype(p.out_dtype, [&](auto dtype) { write<BITS, SIGNED, GROUPED, dtype>(p, part, first, last); });
    }
    Floats(*const out)[2] = part.out;
    if (part.group == 0) {
        return group_terms<BITS, SIGNED, GROUPED>(part, first, last, [&](int64_t r, Floats low, Floats high) {
            out[r][0] = low, out[r][1] = high;
        });
    }
    group_terms<BITS, SIGNED, GROUPED>(part, first, last, [&](int64_t r, Floats low, Floats high) {
        out[r][0] += low, out[r][1] += high;
    });
}

// Prefetches the cache lines that the results of some rows will be written to.
INLINE void prefetch_output(const Problem& p, const Tile& tile, int64_t channel, int64_t first, int64_t last) {
    const int64_t bytes = element_bytes(p.out_dtype);
    const char* const to = static_cast<const char*>(p.out) + (tile.first * p.channels + channel) * bytes;
    for (int64_t r = first; r < std::min(last, tile.rows); r++) __builtin_prefetch(to + r * p.channels * bytes, 1);
}

// Lines step .. step + steps of each of the groups first .. first + groups of a panel.
struct Block {
    int64_t first, groups, step, steps, channel;
    bool last;            // these are the last lines of the groups
    const uint8_t* next;  // the weights after these, to prefetch
    int64_t prefetched;   // cache lines of them per register and tile
};

// Multiplies all tiles by a block. The epilogue of a tile and a group runs while AMX computes the next ones, and ends
// before their sums are stored.
template <int BITS, bool SIGNED, bool GROUPED>
void multiply_block(const Problem& p, const Tile* tiles, int64_t count, const Lines& lines, const Block& block,
                    std::vector<Sums>& kept) {
    constexpr int64_t DEPTH = AmxKernel::WIDTH, ROWS = AmxKernel::ROWS;
    constexpr int64_t MIN_ROWS = 8;  // fewer cost more to start than to do
    const int64_t padded = round_up(p.steps, DEPTH), registers = div_up(block.steps, DEPTH);
    const int64_t rows_each = std::max(div_up(ROWS, registers), MIN_ROWS);
    const uint8_t* ahead = block.next;
    Epilogue pending{};  // of the tile and group before, if any
    for (int64_t i = 0; i < count; i++) {
        const Tile& tile = tiles[i];
        const int64_t padded_rows = round_up(tile.rows, AmxKernel::UNIT);
        // Each tile needs its own sums where a group has several blocks, or the groups are in several blocks.
        Sums& sums = kept[block.last && block.step == 0 ? 0 : i];
        Floats(*const out)[2] = kept[block.groups == p.groups ? 0 : i].out;
        for (int64_t g = 0; g < block.groups; g++) {
            const int64_t group = block.first + g;
            const bool results = block.last && group == p.groups - 1;
            const int64_t rows = pending.tile ? pending.tile->rows : 0;
            const auto meanwhile = [&](int64_t i) {
                for (int64_t line = 0; line < block.prefetched; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
                if (results) prefetch_output(p, tile, block.channel, i * rows_each, (i + 1) * rows_each);
                const int64_t from = i * rows_each, to = std::min(rows, from + rows_each);
                if (from < to) add_rows<BITS, SIGNED, GROUPED>(p, pending, from, to);
            };
            const auto multiply = [&](auto many) {
                multiply_registers<SIGNED, decltype(many)::value>(
                    reinterpret_cast<const int8_t*>(tile.words + (group * padded + block.step) * padded_rows),
                    lines.bytes + g * block.steps * 2 * LINE, registers, block.step == 0,
                    reinterpret_cast<int32_t*>(sums.dots), meanwhile);
            };
            if (padded_rows > AmxKernel::UNIT) {
                multiply(std::true_type{});
            } else {
                multiply(std::false_type{});
            }
            if (block.last) pending = {&tile, group, block.channel, sums.dots, &lines.groups[g], out};
        }
    }
    if (block.last) add_rows<BITS, SIGNED, GROUPED>(p, pending, 0, pending.tile->rows);
}

// Multiplies all tiles by one panel, block by block.
template <int WEIGHT_BITS, int BITS, bool SIGNED, bool GROUPED>
void multiply_panel(const Problem& problem, const Tile* tiles, int64_t count, const uint8_t* weights, int64_t channel) {
    const Problem p = problem;
    constexpr int64_t DEPTH = AmxKernel::WIDTH, CACHE_LINES = DEPTH * WEIGHT_BITS / 4;  // of the weights of a register
    static thread_local Lines lines;
    static thread_local std::vector<Sums> kept;
    const int64_t groups_each = std::clamp<int64_t>(Lines::MAX_GROUPED_LINES / p.steps, 1, p.groups);
    const int64_t blocks = div_up(p.steps, Lines::MAX_LINES);  // of a group
    const int64_t max_steps = round_up(div_up(p.steps, blocks), DEPTH);
    if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
    for (int64_t first = 0; first < p.groups; first += groups_each) {
        const int64_t groups = std::min(groups_each, p.groups - first);
        for (int64_t step = 0; step < p.steps; step += max_steps) {
            const int64_t steps = std::min(max_steps, p.steps - step);
            read_lines<WEIGHT_BITS>(lines, weights, groups * steps, SIGNED ? p.offset : 0);
            weights += groups * steps * LINE * WEIGHT_BITS / 4;
            for (int64_t g = 0; g < groups; g++) {
                if (step == 0) begin_group<SIGNED, GROUPED>(p, first + g, channel, lines.groups[g]);
                if (BITS == 8) sum_weights(lines.groups[g], lines.bytes + g * steps * 2 * LINE, steps);
            }
            const bool last = step + steps == p.steps;
            const Block block{first, groups, step, steps, channel, last, weights, div_up(CACHE_LINES, count)};
            multiply_block<BITS, SIGNED, GROUPED>(p, tiles, count, lines, block, kept);
        }
    }
}

template <int WEIGHT_BITS, int BITS>
void AmxKernel::multiply_panels(const Problem& p, const Tile* tiles, int64_t count) {
    const amx::TileConfig config;
    const bool is_signed = !needs_sums<BITS>(p);
    const auto multiply = p.weight_groups > 1 ? is_signed ? multiply_panel<WEIGHT_BITS, BITS, BITS == 4, true>
                                                          : multiply_panel<WEIGHT_BITS, BITS, false, true>
                          : is_signed         ? multiply_panel<WEIGHT_BITS, BITS, BITS == 4, false>
                                              : multiply_panel<WEIGHT_BITS, BITS, false, false>;
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < p.panels; panel++) {
        const uint8_t* const lines = p.weight + panel * p.groups * p.steps * LINE * WEIGHT_BITS / 4;
        multiply(p, tiles, count, lines, panel * PANEL);
    }
}

}  // namespace infoquant::gemm
#endif
