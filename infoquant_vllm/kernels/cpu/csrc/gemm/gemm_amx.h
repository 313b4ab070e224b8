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
    static constexpr bool ONES_ROW = false;

    // Zero-points of 4-bit weights are subtracted as these are unpacked, and need no sums of inputs.
    static bool needs_sums(const Problem& p) { return p.middle == 128 && p.zero_point; }

    static int64_t sum_steps(const Problem& p, int64_t) { return p.steps; }

    static void write_words(const int8_t* values, int64_t size, int64_t count, int64_t padded_rows, int32_t* to) {
        for (int64_t i = 0; i < count; i += WIDTH, values += 64, size -= 64) {
            const __mmask64 mask = size >= 64 ? ~0ull : (1ull << size) - 1;
            _mm512_storeu_si512(to + i * padded_rows, _mm512_maskz_loadu_epi8(mask, values));
        }
    }

    template <int WEIGHT_BITS, bool OFFSET>
    static void multiply_panels(const Problem& p, const Tile* tiles, int64_t count);
};

// Adds the products of a tile and some registers of a panel to dots [ROWS, PANEL], or sets them if `begin`.
// MANY: more than 16 tokens. meanwhile(i) is called after the products of register i, and runs while AMX computes them.
template <bool MANY, typename Meanwhile>
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
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, w + LINE, ROW);
        _tile_dpbssd(1, 4, 7);
        if (MANY) {
            _tile_loadd(5, x + TILE, 64);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        meanwhile(i);
    }
    _tile_stored(0, dots, 4 * PANEL);
    _tile_stored(1, dots + HALF, 4 * PANEL);
    if (MANY) _tile_stored(2, dots + BELOW, 4 * PANEL);
    if (MANY) _tile_stored(3, dots + BELOW + HALF, 4 * PANEL);
}

// Sums of the tokens of a tile and the channels of a panel.
struct Sums {
    Ints dots[AmxKernel::ROWS][2];   // of one segment
    Floats out[AmxKernel::ROWS][2];  // over the segments so far
};

// Unpacked lines of a segment of a panel; they take less than half of the L1 cache.
struct Lines {
    static constexpr int64_t MAX_LINES = 144;
    // The last register of a segment may read beyond it: the inputs there are zeros.
    alignas(64) uint8_t bytes[(MAX_LINES + AmxKernel::WIDTH) * 2 * LINE];
    Ints zero_point[2];  // still to be subtracted
    Ints sums[2];        // of weights
};

// Adds sums of the weights that lines hold to `sums`. Those behind the last feature do not count.
INLINE void sum_weights(const Problem& p, const Bytes (&weights)[2], int64_t line, Ints (&sums)[2]) {
    const int64_t features = p.features - 4 * line;
    const Bytes ones = (Bytes)splat(features >= 4 ? 0x01010101 : 0x010101 >> 8 * (3 - features));
    for (int h = 0; h < 2; h++) sums[h] = dot(sums[h], ones, (Ints)weights[h], false);
}

// Unpacks lines begin .. end to signed bytes.
template <int WEIGHT_BITS, bool OFFSET>
void read_lines(const Problem& p, Lines& lines, const uint8_t* panel, int64_t channel, int64_t begin, int64_t end) {
    Ints sums[2] = {lines.sums[0], lines.sums[1]};
    uint8_t* to = lines.bytes;
    const auto write = [&](const Bytes(&weights)[2], int64_t line) {
        store(to, weights[0]);
        store(to + LINE, weights[1]);
        to += 2 * LINE;
        if (OFFSET) sum_weights(p, weights, line, sums);
    };
    if (WEIGHT_BITS == 8) {
        for (int64_t i = begin; i < end; i++) {
            const uint8_t* const from = panel + i * 2 * LINE;
            write({load<Bytes>(from) - 128, load<Bytes>(from + LINE) - 128}, i);
        }
    }
    for (int64_t i = begin; WEIGHT_BITS == 4 && i < end;) {
        const int64_t group = weight_group(p, i), stop = std::min(end, (group + 1) * p.group_steps);
        const Unpacker unpack(p, group, channel, 0);
        for (; i < stop; i++) {
            Bytes weights[2];
            unpack(load<Bytes>(panel + i * LINE), weights);
            write(weights, i);
        }
    }
    lines.sums[0] = sums[0], lines.sums[1] = sums[1];
}

// The epilogue of a tile and a segment of a panel: integer sums to float32, over the segments, to the output.
struct Epilogue {
    const Tile* tile;
    int64_t segment, channel;
    Sums* sums;
    const Lines* lines;
};

// Calls use(row, first half, second half) with the terms that the segment adds to rows first .. last.
template <int WEIGHT_BITS, bool OFFSET, typename Use>
INLINE void segment_terms(const Problem& p, const Epilogue& part, int64_t first, int64_t last, const Use& use) {
    const Ints zero_point[2] = {part.lines->zero_point[0], part.lines->zero_point[1]};
    const Ints weight_sums[2] = {part.lines->sums[0], part.lines->sums[1]};
    const int64_t cell = part.segment * part.tile->rows;
    const int32_t *const minus_sum = part.tile->minus_sum + cell, *const offset = part.tile->offset + cell;
    const float* const scale = part.tile->scale + cell;
    const Ints(*const dots)[2] = part.sums->dots;
    const bool corrected = AmxKernel::needs_sums(p);
    for (int64_t r = first; r < last; r++) {
        Floats term[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            Ints exact = dots[r][h];
            if (WEIGHT_BITS == 8 && corrected) exact += zero_point[h] * minus_sum[r];
            if (OFFSET) exact -= weight_sums[h] * offset[r];
            term[h] = __builtin_convertvector(exact, Floats) * scale[r];
        }
        use(r, term[0], term[1]);
    }
}

// Writes the results of some rows after their last segment.
template <int WEIGHT_BITS, bool OFFSET, Dtype DTYPE>
INLINE void write(const Problem& p, const Epilogue& part, int64_t first, int64_t last) {
    const int64_t channel = part.channel, left = p.channels - channel, to = part.tile->first * p.channels + channel;
    const Floats scale[2] = {channel_floats(p, p.weight_scale, channel),
                             channel_floats(p, p.weight_scale, channel + HALF)};
    const Floats bias[2] = {channel_floats(p, p.bias, channel), channel_floats(p, p.bias, channel + HALF)};
    const Floats(*const earlier)[2] = part.sums->out;
    const bool only = part.segment == 0;
    void* const out = p.out;
    const int64_t channels = p.channels;
    segment_terms<WEIGHT_BITS, OFFSET>(p, part, first, last, [&](int64_t r, Floats low, Floats high) {
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

// Adds the terms of some rows to those of earlier segments, or writes the results where the segment is the last.
template <int WEIGHT_BITS, bool OFFSET>
INLINE void add_rows(const Problem& p, const Epilogue& part, int64_t first, int64_t last) {
    if (part.segment == p.segments - 1) {
        return with_dtype(p.out_dtype, [&](auto dtype) { write<WEIGHT_BITS, OFFSET, dtype>(p, part, first, last); });
    }
    Floats(*const out)[2] = part.sums->out;
    const bool only = part.segment == 0;
    segment_terms<WEIGHT_BITS, OFFSET>(p, part, first, last, [&](int64_t r, Floats low, Floats high) {
        out[r][0] = only ? low : out[r][0] + low, out[r][1] = only ? high : out[r][1] + high;
    });
}

// Prefetches the cache lines that the results of some rows will be written to.
INLINE void prefetch_output(const Problem& p, const Tile& tile, int64_t channel, int64_t first, int64_t last) {
    const int64_t bytes = element_bytes(p.out_dtype);
    const char* const to = static_cast<const char*>(p.out) + (tile.first * p.channels + channel) * bytes;
    for (int64_t r = first; r < std::min(last, tile.rows); r++) __builtin_prefetch(to + r * p.channels * bytes, 1);
}

// Lines step .. step + steps of a segment of a panel.
struct Block {
    int64_t segment, step, steps, channel;
    bool last;            // these are the last lines of the segment
    const uint8_t* next;  // the weights after these, to prefetch
    int64_t prefetched;   // cache lines of them per register and tile
};

// Multiplies all tiles by a block. The epilogue of a tile runs while AMX computes the next one.
template <int WEIGHT_BITS, bool OFFSET>
void multiply_block(const Problem& p, const Tile* tiles, int64_t count, const Lines& lines, const Block& block,
                    std::vector<Sums>& kept) {
    constexpr int64_t DEPTH = AmxKernel::WIDTH, ROWS = AmxKernel::ROWS;
    constexpr int64_t MIN_ROWS = 8;  // fewer cost more to start than to do
    const int64_t padded = round_up(p.steps, DEPTH), registers = div_up(block.steps, DEPTH);
    const int64_t rows_each = std::max(div_up(ROWS, registers), MIN_ROWS);
    const bool results = block.last && block.segment == p.segments - 1;
    const uint8_t* ahead = block.next;
    Epilogue pending{};  // of the tile before, if any
    for (int64_t i = 0; i < count; i++) {
        const Tile& tile = tiles[i];
        const int64_t padded_rows = round_up(tile.rows, AmxKernel::UNIT), rows = pending.tile ? pending.tile->rows : 0;
        Sums& sums = kept[i];
        const auto meanwhile = [&](int64_t register_) {
            for (int64_t line = 0; line < block.prefetched; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
            const int64_t from = register_ * rows_each, to = std::min(rows, from + rows_each);
            if (results) prefetch_output(p, tile, block.channel, from, from + rows_each);
            if (from < to) add_rows<WEIGHT_BITS, OFFSET>(p, pending, from, to);
        };
        const auto multiply = [&](auto many) {
            multiply_registers<decltype(many)::value>(
                reinterpret_cast<const int8_t*>(tile.words + (block.segment * padded + block.step) * padded_rows),
                lines.bytes, registers, block.step == 0, reinterpret_cast<int32_t*>(sums.dots), meanwhile);
        };
        if (padded_rows > AmxKernel::UNIT) {
            multiply(std::true_type{});
        } else {
            multiply(std::false_type{});
        }
        if (block.last) pending = {&tile, block.segment, block.channel, &sums, &lines};
    }
    if (block.last) add_rows<WEIGHT_BITS, OFFSET>(p, pending, 0, pending.tile->rows);
}

// Multiplies all tiles by one panel, block by block.
template <int WEIGHT_BITS, bool OFFSET>
void multiply_panel_amx(const Problem& problem, const Tile* tiles, int64_t count, int64_t panel) {
    const Problem p = problem;
    constexpr int64_t DEPTH = AmxKernel::WIDTH, BYTES_OF_LINE = LINE * WEIGHT_BITS / 4;
    constexpr int64_t CACHE_LINES = DEPTH * BYTES_OF_LINE / 64;  // of the weights of a register
    static thread_local Lines lines;
    static thread_local std::vector<Sums> kept;
    const int64_t blocks = div_up(p.steps, Lines::MAX_LINES), max_steps = round_up(div_up(p.steps, blocks), DEPTH);
    const int64_t channel = panel * PANEL;
    const uint8_t* const weights = p.weight + panel * p.lines * BYTES_OF_LINE;
    if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
    for (int64_t segment = 0; segment < p.segments; segment++) {
        for (int h = 0; h < 2; h++) {
            lines.zero_point[h] = WEIGHT_BITS == 8 ? zero_points(p, 0, channel + h * HALF) - 128 : Ints{};
            lines.sums[h] = -lines.zero_point[h] * static_cast<int32_t>(std::min(4 * p.steps, p.features));
        }
        for (int64_t step = 0; step < p.steps; step += max_steps) {
            const int64_t steps = std::min(max_steps, p.steps - step), begin = segment * p.steps + step;
            read_lines<WEIGHT_BITS, OFFSET>(p, lines, weights, channel, begin, begin + steps);
            const bool last = step + steps == p.steps;
            const uint8_t* const next = weights + (begin + steps) * BYTES_OF_LINE;
            multiply_block<WEIGHT_BITS, OFFSET>(
                p, tiles, count, lines, {segment, step, steps, channel, last, next, div_up(CACHE_LINES, count)}, kept);
        }
    }
}

template <int WEIGHT_BITS, bool OFFSET>
void AmxKernel::multiply_panels(const Problem& p, const Tile* tiles, int64_t count) {
    const amx::TileConfig config;
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < p.panels; panel++) multiply_panel_amx<WEIGHT_BITS, OFFSET>(p, tiles, count, panel);
}

}  // namespace infoquant::gemm
#endif
