// Products of many rows by AMX: four of its registers hold sums of 32 tokens and 32 channels.
#pragma once
#ifdef __AMX_INT8__
#include "amx.h"
#include "gemm/packed_product.h"

namespace infoquant {
namespace product {

struct MatrixTiles {
    static constexpr int ROWS = 32, WIDTH = 16, UNIT = 16;  // of tokens; words side by side; tokens of a register
    static constexpr int FROM = 13;  // tokens: fewer are one tile of the other way, which reads weights faster
    static constexpr int BLOCK = 1 << 20;  // words of a row that are written at a time: all

    // Weights whose zero points are all alike are multiplied less those.
    template <int BITS>
    static bool needs_sums(const Problem& p) {
        return BITS == 8 || p.weight_zero;
    }

    static void write_words(const uint8_t* codes, int64_t size, uint8_t taken, int64_t count, int64_t room,
                            int32_t* to) {
        const __m512i less = _mm512_set1_epi8(taken);
        for (int64_t i = 0; i < count; i += WIDTH, codes += 64, size -= 64) {
            const __mmask64 some = size >= 64 ? ~0ull : (1ull << size) - 1;
            const __m512i line = _mm512_maskz_loadu_epi8(some, codes);
            _mm512_storeu_si512(to + i * room, _mm512_maskz_sub_epi8(some, line, less));
        }
    }

    template <int WEIGHT_BITS, int BITS>
    static void multiply_panels(const Problem& p, const Tile* tiles, int64_t count);
};

// Of registers, which the compiler wants as literals: inputs are signed, and so are weights where SIGNED.
#define MULTIPLY(sums, inputs, weights)             \
    if (SIGNED) {                                   \
        _tile_dpbssd(sums, inputs, weights);        \
    } else {                                        \
        _tile_dpbsud(sums, inputs, weights);        \
    }

// Adds the products of a tile and some registers of a panel to dots [ROWS, PANEL], or begins them.
// MANY: more than 16 tokens. Behind each register's products comes meanwhile(register), which they do not wait for.
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

// Sums of a tile's tokens and a panel's channels.
struct Sums {
    Ints dots[MatrixTiles::ROWS][2];   // of a group
    Floats out[MatrixTiles::ROWS][2];  // over the groups
};

// A group of a panel's channels.
struct Group {
    Ints zero[2], sums[2];  // zero points; sum w, where inputs have 8 bits
    Floats scale[2];        // where groups have their own
};

// Some lines of weights in 8 bits, less than half of the L1 cache.
struct Lines {
    static constexpr int64_t MOST = 144, OF_GROUPS = 80;  // of one group, and of several in a block
    // A group's last register may reach beyond it, times zeros.
    alignas(64) uint8_t bytes[(MOST + MatrixTiles::WIDTH) * 2 * LINE];
    Group groups[OF_GROUPS];
};

// Less `zero` each.
template <int WEIGHT_BITS>
void read_lines(Lines& lines, const uint8_t* from, int64_t count, uint8_t zero) {
    if (WEIGHT_BITS == 4) return unpack(from, count, lines.bytes, zero);
    for (int64_t i = 0; i < count * 2 * LINE; i += sizeof(Bytes)) {
        const Bytes line = load<Bytes>(from + i) - zero;
        memcpy(lines.bytes + i, &line, sizeof line);
    }
}

template <bool SIGNED, bool GROUPED>
INLINE void begin_group(const Problem& p, int64_t index, int64_t channel, Group& group) {
    for (int64_t h = 0; h < 2; h++) {
        group.sums[h] = Ints{};
        if (!SIGNED) group.zero[h] = zero_points(p, index, channel + h * HALF);
        if (GROUPED) group.scale[h] = weight_scales(p, index, channel + h * HALF);
    }
}

// Adds `count` lines to a group's sum w.
INLINE void sum_weights(Group& group, const uint8_t* lines, int64_t count) {
    Ints sums[2] = {group.sums[0], group.sums[1]};
    for (int64_t i = 0; i < 2 * count; i++) {
        sums[i % 2] = dot(sums[i % 2], load<Bytes>(lines + i * LINE), Ints{} + 0x01010101, false);
    }
    group.sums[0] = sums[0], group.sums[1] = sums[1];
}

// What is to be done with the sums of a tile and a group of a panel.
struct Part {
    const Tile* tile;
    int64_t group, channel;
    const Ints (*dots)[2];  // [ROWS]
    const Group* weights;
    Floats (*out)[2];  // [ROWS]: the terms of the groups before it
};

// use(row, first half, second half) with what the group adds to the result, for some rows.
template <int BITS, bool SIGNED, bool GROUPED, typename Use>
INLINE void terms(const Part& part, int64_t first, int64_t last, const Use& use) {
    const Ints zero[2] = {part.weights->zero[0], part.weights->zero[1]};
    const Ints weight_sums[2] = {part.weights->sums[0], part.weights->sums[1]};
    const Floats weight_scale[2] = {part.weights->scale[0], part.weights->scale[1]};
    const int64_t cell = part.group * part.tile->rows;
    const int32_t *const start = part.tile->start + cell, *const rest = part.tile->rest + cell;
    const float* const scale = part.tile->scale + cell;
    const Ints(*const dots)[2] = part.dots;
    for (int64_t r = first; r < last; r++) {
        Floats term[2];
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            Ints exact = dots[r][h];
            if (!SIGNED) exact += zero[h] * start[r];
            if (BITS == 8) exact -= weight_sums[h] * rest[r];
            const Floats sum = __builtin_convertvector(exact, Floats);
            term[h] = (GROUPED ? sum * weight_scale[h] : sum) * scale[r];
        }
        use(r, term[0], term[1]);
    }
}

// The results of some rows from their last group.
template <int BITS, bool SIGNED, bool GROUPED, int64_t TYPE>
INLINE void write(const Problem& p, const Part& part, int64_t first, int64_t last) {
    const int64_t channel = part.channel, left = p.channels - channel, to = part.tile->first * p.channels + channel;
    const Floats scale[2] = {channel_scales(p, channel), channel_scales(p, channel + HALF)};
    const Floats bias[2] = {biases(p, channel), biases(p, channel + HALF)};
    const Floats(*const before)[2] = part.out;
    const bool only = part.group == 0;
    void* const out = p.out;
    const int64_t channels = p.channels;
    terms<BITS, SIGNED, GROUPED>(part, first, last, [&](int64_t r, Floats low, Floats high) {
        if (!only) low = before[r][0] + low, high = before[r][1] + high;
        low = low * scale[0] + bias[0], high = high * scale[1] + bias[1];
        const int64_t row = to + r * channels;
        if (left >= PANEL) {
            store_part<TYPE>(out, row, LANES, low);
            store_part<TYPE>(out, row + HALF, LANES, high);
        } else {
            store_part<TYPE>(out, row, left, low);
            if (left > HALF) store_part<TYPE>(out, row + HALF, left - HALF, high);
        }
    });
}

// Adds the terms of some rows to those of the groups before, or writes the results where the group is the last.
template <int BITS, bool SIGNED, bool GROUPED>
INLINE void add_rows(const Problem& p, const Part& part, int64_t first, int64_t last) {
    if (part.group == p.groups - 1) {
        if (p.out_type == BFLOAT16) return write<BITS, SIGNED, GROUPED, BFLOAT16>(p, part, first, last);
        if (p.out_type == FLOAT16) return write<BITS, SIGNED, GROUPED, FLOAT16>(p, part, first, last);
        return write<BITS, SIGNED, GROUPED, FLOAT32>(p, part, first, last);
    }
    Floats(*const out)[2] = part.out;
    if (part.group == 0) {
        return terms<BITS, SIGNED, GROUPED>(part, first, last, [&](int64_t r, Floats low, Floats high) {
            out[r][0] = low, out[r][1] = high;
        });
    }
    terms<BITS, SIGNED, GROUPED>(part, first, last, [&](int64_t r, Floats low, Floats high) {
        out[r][0] += low, out[r][1] += high;
    });
}

// Lines that some rows' results will be written to, which takes longer to begin than to do.
INLINE void fetch_output(const Problem& p, const Tile& tile, int64_t channel, int64_t first, int64_t last) {
    const int64_t bytes = p.out_type == FLOAT32 ? 4 : 2;
    const char* const to = static_cast<const char*>(p.out) + (tile.first * p.channels + channel) * bytes;
    for (int64_t r = first; r < std::min(last, tile.rows); r++) __builtin_prefetch(to + r * p.channels * bytes, 1);
}

// Some lines of a panel: of the groups first .. first + groups, from each group's step on `steps` of its lines.
struct Block {
    int64_t first, groups, step, steps, channel;
    bool last;            // ends its groups
    const uint8_t* next;  // weights of the panel behind these, to be fetched
    int64_t fetched;      // cache lines of them for each register and tile
};

// All tiles meet a block. The sums of a tile and a group are added while the next ones are multiplied, and are all
// added by when those are stored.
template <int BITS, bool SIGNED, bool GROUPED>
void multiply_block(const Problem& p, const Tile* tiles, int64_t count, const Lines& lines, const Block& block,
                    std::vector<Sums>& kept) {
    constexpr int64_t DEPTH = MatrixTiles::WIDTH, ROWS = MatrixTiles::ROWS;
    constexpr int64_t SOME_ROWS = 8;  // fewer are not worth the start
    const int64_t padded = round_up(p.steps, DEPTH), registers = (block.steps + DEPTH - 1) / DEPTH;
    const int64_t some_rows = std::max((ROWS + registers - 1) / registers, SOME_ROWS);
    const uint8_t* ahead = block.next;
    Part before{};  // is added meanwhile, if there is one
    for (int64_t i = 0; i < count; i++) {
        const Tile& tile = tiles[i];
        const int64_t room = round_up(tile.rows, MatrixTiles::UNIT);
        // A tile's own, where it meets a group in parts, or its groups in several blocks.
        Sums& sums = kept[block.last && block.step == 0 ? 0 : i];
        Floats(*const out)[2] = kept[block.groups == p.groups ? 0 : i].out;
        for (int64_t g = 0; g < block.groups; g++) {
            const int64_t group = block.first + g;
            const bool results = block.last && group == p.groups - 1;
            const int64_t rows = before.tile ? before.tile->rows : 0;
            const auto meanwhile = [&](int64_t i) {
                for (int64_t line = 0; line < block.fetched; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
                if (results) fetch_output(p, tile, block.channel, i * some_rows, (i + 1) * some_rows);
                const int64_t from = i * some_rows, to = std::min(rows, from + some_rows);
                if (from < to) add_rows<BITS, SIGNED, GROUPED>(p, before, from, to);
            };
            const auto multiply = [&](auto many) {
                multiply_registers<SIGNED, decltype(many)::value>(
                    reinterpret_cast<const int8_t*>(tile.words + (group * padded + block.step) * room),
                    lines.bytes + g * block.steps * 2 * LINE, registers, block.step == 0,
                    reinterpret_cast<int32_t*>(sums.dots), meanwhile);
            };
            if (room > MatrixTiles::UNIT) {
                multiply(std::true_type{});
            } else {
                multiply(std::false_type{});
            }
            if (block.last) before = {&tile, group, block.channel, sums.dots, &lines.groups[g], out};
        }
    }
    if (block.last) add_rows<BITS, SIGNED, GROUPED>(p, before, 0, before.tile->rows);
}

// All tiles in one panel, block by block.
template <int WEIGHT_BITS, int BITS, bool SIGNED, bool GROUPED>
void multiply_panel(const Problem& problem, const Tile* tiles, int64_t count, const uint8_t* weights, int64_t channel) {
    const Problem p = problem;
    constexpr int64_t DEPTH = MatrixTiles::WIDTH, CACHE_LINES = DEPTH * WEIGHT_BITS / 4;  // of a register's weights
    static thread_local Lines lines;
    static thread_local std::vector<Sums> kept;
    const int64_t some = std::clamp<int64_t>(Lines::OF_GROUPS / p.steps, 1, p.groups);
    const int64_t pieces = (p.steps + Lines::MOST - 1) / Lines::MOST;  // of a group
    const int64_t most = round_up((p.steps + pieces - 1) / pieces, DEPTH);
    if (static_cast<int64_t>(kept.size()) < count) kept.resize(count);
    for (int64_t first = 0; first < p.groups; first += some) {
        const int64_t groups = std::min(some, p.groups - first);
        for (int64_t step = 0; step < p.steps; step += most) {
            const int64_t steps = std::min(most, p.steps - step);
            read_lines<WEIGHT_BITS>(lines, weights, groups * steps, SIGNED ? p.offset : 0);
            weights += groups * steps * LINE * WEIGHT_BITS / 4;
            for (int64_t g = 0; g < groups; g++) {
                if (step == 0) begin_group<SIGNED, GROUPED>(p, first + g, channel, lines.groups[g]);
                if (BITS == 8) sum_weights(lines.groups[g], lines.bytes + g * steps * 2 * LINE, steps);
            }
            const bool last = step + steps == p.steps;
            const Block block{first, groups, step, steps, channel, last, weights, (CACHE_LINES + count - 1) / count};
            multiply_block<BITS, SIGNED, GROUPED>(p, tiles, count, lines, block, kept);
        }
    }
}

template <int WEIGHT_BITS, int BITS>
void MatrixTiles::multiply_panels(const Problem& p, const Tile* tiles, int64_t count) {
    const amx::Shapes shapes;
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

}  // namespace product
}  // namespace infoquant
#endif
