// Exact product of quantized inputs and packed weights; semantics: kernels/reference/quantized_linear.py.
//
// Weights are read as unsigned codes w (signed ones come with 8 or 128 added), inputs as signed bytes x:
// a 4-bit code less its zero point z, or an 8-bit code less 128, of which r = z - 128 is left. Within a group
//     sum (code - z) (w - zero) = sum x w - r sum w - zero sum (code - z)
// in 32-bit integers. Weights lie in panels of 32 channels (see quantized_linear.py): a line of a panel
// holds four features of all its channels, so that sums run within lanes and never across.
#include <omp.h>

#include <array>
#include <utility>

#include "gemm/amx_product.h"
#include "gemm/packed_product.h"

namespace {

using namespace infoquant;
using namespace infoquant::product;

constexpr int PARTS = HALF / LANES;
constexpr int MAX_ROWS = LANES == 16 ? 12 : 4;  // of a tile: two accumulators each, without spilling
constexpr int64_t SCRATCH = 3 << 19;            // bytes of inputs at a time, for them to stay in the L2 cache
constexpr int64_t RESULTS = 4 << 20;            // and of outputs
constexpr int64_t PARALLEL = 1 << 19;           // multiplications below which threads cost more than they gain
constexpr int64_t AHEAD = 2048, AHEAD_WORDS = 192;  // bytes of weights and words of inputs to prefetch
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int HIGH_SHIFT = 4;  // high nibbles are multiplied in place, as 16 w
constexpr int UNPACK_TILES = 5;  // from this number on a panel is unpacked once for all
#else
constexpr int HIGH_SHIFT = 0;  // 16 w would exceed what maddubs holds
constexpr int UNPACK_TILES = 1 << 30;  // and so would unpacked weights with 8-bit inputs
#endif

// Four features of LANES channels, and of LANES channels HALF further.
template <int WEIGHT_BITS>
INLINE void load_line(const uint8_t* line, Bytes (&weights)[2]) {
    const Bytes bytes = load<Bytes>(line);
    weights[0] = WEIGHT_BITS == 8 ? bytes : bytes & 15;
    weights[1] = WEIGHT_BITS == 8 ? load<Bytes>(line + 4 * HALF) : HIGH_SHIFT ? bytes & 0xF0 : bytes >> 4;
}

// Adds sum x w of one group to dots, for all rows of a tile in several panels, and sum w to sums where inputs have
// 8 bits; those of high nibbles times 2^HIGH_SHIFT.
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
                sums[p][0] = dot(sums[p][0], weights[0], Ints{} + 0x01010101, false);
                sums[p][1] = dot(sums[p][1], weights[1], Ints{} + 0x01010101, false);
            }
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                const Ints x = Ints{} + words[s * ROWS + r];
                dots[p][r][0] = dot(dots[p][r][0], weights[0], x, WEIGHT_BITS == 8 && BITS == 8);
                dots[p][r][1] = dot(dots[p][r][1], weights[1], x, WEIGHT_BITS == 8 && BITS == 8);
            }
        }
    }
}

// LANES channels from `channel` on and as many from channel + HALF on, for a tile's tokens; in PANELS panels that
// lie `apart` panels from each other, since memory serves several streams faster than one.
template <int WEIGHT_BITS, int BITS, int ROWS, int PANELS>
void multiply(const Problem& problem, const Tile& tile, const uint8_t* weight, int64_t channel, int64_t apart) {
    const Problem p = problem;
    const int64_t group_bytes = p.steps * 16 * WEIGHT_BITS;
    Floats out[PANELS][ROWS][2] = {};
    for (int64_t g = 0; g < p.groups; g++) {
        const int32_t* const start = tile.start + g * ROWS;
        Ints dots[PANELS][ROWS][2], sums[PANELS][2] = {};
#pragma GCC unroll 4
        for (int q = 0; q < PANELS; q++) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const int shift = h && WEIGHT_BITS == 4 ? HIGH_SHIFT : 0;
                const int64_t first = channel + q * apart * PANEL + h * HALF;
                const Ints zero = zero_points(p, g, first) << shift;
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) dots[q][r][h] = zero * start[r];
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
                    if (BITS == 8) exact -= sums[q][h] * tile.rest[g * ROWS + r];
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

// All tiles in one panel.
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

// Tiles of a few rows, that are multiplied in registers.
struct Registers {
    static constexpr int ROWS = MAX_ROWS, WIDTH = 1, UNIT = 1;
    static constexpr int BLOCK = 64;  // words, for what they are strewn over to stay in the L1 cache

    template <int BITS>
    static bool needs_sums(const Problem&) {
        return true;
    }

    static void write_words(const uint8_t* codes, int64_t size, uint8_t taken, int64_t count, int64_t room,
                            int32_t* to) {
        int8_t bytes[4 * BLOCK] = {};
        for (int64_t i = 0; i < size; i++) bytes[i] = static_cast<int8_t>(codes[i] - taken);
        for (int64_t i = 0; i < count; i++) memcpy(to + i * room, bytes + 4 * i, 4);
    }

    // All tiles in all panels; runs in every thread of a parallel region.
    template <int WEIGHT_BITS, int BITS>
    static void multiply_panels(const Problem& p, const Tile* tiles, int64_t count);
};

template <int WEIGHT_BITS, int BITS>
void Registers::multiply_panels(const Problem& p, const Tile* tiles, int64_t count) {
    constexpr int STREAMS = 4, FEW = LANES == 16 ? 2 : 1;  // rows whose sums in all streams fit into registers
    const int64_t apart = p.panels / STREAMS;
    const bool streams = count == 1 && tiles[0].rows <= FEW;
    if (streams) {
        const Multiply multiply_streams =
            tiles[0].rows == 1 ? multiply<WEIGHT_BITS, BITS, 1, STREAMS> : multiply<WEIGHT_BITS, BITS, FEW, STREAMS>;
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

// Part i of `parts` of `count` begins there, at a multiple of `unit`; as even as possible: 16 rows are 8 and 8.
int64_t part(int64_t i, int64_t parts, int64_t count, int64_t unit) {
    return std::min(count, round_up(i * count / parts, unit));
}

template <typename Way, int WEIGHT_BITS, int BITS>
void run(const Problem& p) {
    const int64_t words = row_words(p, Way::WIDTH);
    const int64_t fit = std::min(SCRATCH / (4 * words), RESULTS / (2 * p.channels));
    const int64_t most = std::max<int64_t>(fit / Way::ROWS, 1) * Way::ROWS;
    const int64_t chunks = (p.tokens + most - 1) / most;
    static thread_local Buffer<int32_t> scratch;
    static thread_local std::vector<Tile> tiles;
    const auto make = Way::template needs_sums<BITS>(p) ? make_tile<BITS, Way, true> : make_tile<BITS, Way, false>;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t start = part(chunk, chunks, p.tokens, Way::UNIT);
        const int64_t tokens = part(chunk + 1, chunks, p.tokens, Way::UNIT) - start;
        const int64_t count = (tokens + Way::ROWS - 1) / Way::ROWS, room = round_up(tokens, Way::UNIT);
        if (static_cast<int64_t>(tiles.size()) < count) tiles.resize(count);
        int32_t* const to = scratch.reserve(room * words);
        Tile* const made = tiles.data();
#pragma omp parallel if (tokens * p.features * p.channels >= PARALLEL)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) {
                const int64_t first = part(i, count, tokens, Way::UNIT);
                const int64_t rows = part(i + 1, count, tokens, Way::UNIT) - first;
                made[i] = make(p, start + first, rows, round_up(rows, Way::UNIT), to + first * words);
            }
            Way::template multiply_panels<WEIGHT_BITS, BITS>(p, made, count);
        }
    }
}

template <int WEIGHT_BITS, int BITS>
void run(const Problem& p) {
#ifdef __AMX_INT8__
    if (p.tokens >= MatrixTiles::FROM) return run<MatrixTiles, WEIGHT_BITS, BITS>(p);
#endif
    run<Registers, WEIGHT_BITS, BITS>(p);
}

}  // namespace

void infoquant::quantized_linear(const Quantized& x, int64_t tokens, int64_t features, int64_t input_groups,
                                 int64_t num_bits, const Weight& weight, const float* bias, void* out,
                                 int64_t out_type) {
    const int64_t offset = 1 << (weight.num_bits - 1);
    const Problem p{x.codes, x.scale, x.zero,   weight.lines,    weight.scale, weight.zero,   bias,
                    out,     tokens,  features, weight.channels, input_groups, weight.groups, out_type, offset};
    if (weight.num_bits == 4) return num_bits == 4 ? run<4, 4>(p) : run<4, 8>(p);
    return num_bits == 4 ? run<8, 4>(p) : run<8, 8>(p);
}
