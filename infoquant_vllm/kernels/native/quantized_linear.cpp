// Exact product of quantised inputs and packed weights; semantics: kernels/reference/quantized_linear.py.
//
// Weights are read as unsigned codes w (signed ones come with 8 or 128 added), inputs as signed bytes x:
// a 4-bit code less its zero point z, or an 8-bit code less 128, of which r = z - 128 is left. Within a group
//     sum (code - z) (w - zero) = sum x w - r sum w - zero sum (code - z)
// in 32-bit integers. Weights lie in panels of 32 channels (see quantized_linear.py): a line of a panel
// holds four features of all its channels, so that sums run within lanes and never across.
#include <omp.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int PANEL = 32;        // channels
constexpr int HALF = PANEL / 2;  // channels in the low nibbles of a line; the others are in the high ones
constexpr int PARTS = HALF / LANES;
constexpr int MAX_ROWS = LANES == 16 ? 12 : 4;  // of a tile: two accumulators each, without spilling
constexpr int64_t SCRATCH = 3 << 19;            // bytes of inputs at a time, for them to stay in the L2 cache
constexpr int64_t PARALLEL = 1 << 19;           // multiplications below which threads cost more than they gain
constexpr int64_t AHEAD = 2048, AHEAD_WORDS = 192;  // bytes of weights and words of inputs to prefetch
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int HIGH_SHIFT = 4;  // high nibbles are multiplied in place, as 16 w
constexpr int UNPACK_TILES = 5;  // from this number on a panel is unpacked once for all
#else
constexpr int HIGH_SHIFT = 0;  // 16 w would exceed what maddubs holds
constexpr int UNPACK_TILES = 1 << 30;  // and so would unpacked weights with 8-bit inputs
#endif

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

// A few tokens' inputs, in row_words(problem) words of 32 bits per token.
struct Tile {
    int64_t first, rows;   // tokens
    const int32_t* words;  // [groups, steps, rows]: x, four signed bytes
    const int32_t* start;  // [groups, rows]: - sum (code - z)
    const int32_t* rest;   // [groups, rows]: r
    const float* scale;    // [groups, rows]
};

int64_t row_words(const Problem& p) { return p.groups * (p.steps + 3); }

template <int BITS>
Tile make_tile(const Problem& p, int64_t first, int64_t rows, int32_t* words) {
    constexpr int64_t BLOCK = 64;  // words of a row at a time, so that what they are strewn over stays in the L1 cache
    const int64_t cells = p.groups * rows, ratio = p.groups / p.input_groups;
    int32_t *const start = words + cells * p.steps, *const rest = start + cells;
    float* const scale = reinterpret_cast<float*>(rest + cells);
    for (int64_t cell = 0; cell < cells; cell++) {
        const int64_t input = (first + cell % rows) * p.input_groups + cell / rows / ratio;
        start[cell] = p.zero[input] * static_cast<int32_t>(p.group_size);
        rest[cell] = p.zero[input] - 128;
        scale[cell] = p.scale[input];
    }
    for (int64_t g = 0; g < p.groups; g++) {
        for (int64_t s = 0; s < p.steps; s += BLOCK) {
            const int64_t block = std::min(BLOCK, p.steps - s), size = std::min(4 * block, p.group_size - 4 * s);
            for (int64_t r = 0; r < rows; r++) {
                const uint8_t* const codes = p.codes + (first + r) * p.features + g * p.group_size + 4 * s;
                const uint8_t taken = BITS == 8 ? 128 : rest[g * rows + r] + 128;
                int8_t bytes[4 * BLOCK] = {};
                int32_t sum = 0;
                for (int64_t k = 0; k < size; k++) {
                    bytes[k] = static_cast<int8_t>(codes[k] - taken);
                    sum += codes[k];
                }
                start[g * rows + r] -= sum;
                int32_t* const to = words + (g * p.steps + s) * rows + r;
                for (int64_t i = 0; i < block; i++) memcpy(to + i * rows, bytes + 4 * i, 4);
            }
        }
    }
    return {first, rows, words, start, rest, scale};
}

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

INLINE void store(const Problem& p, int64_t token, int64_t channel, Floats x) {
    const int64_t count = std::min<int64_t>(p.channels - channel, LANES), at = token * p.channels + channel;
    if (p.out_type == FLOAT32) {
        memcpy(static_cast<float*>(p.out) + at, &x, count * sizeof(float));
    } else {
        const Halves halves = p.out_type == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
        memcpy(static_cast<uint16_t*>(p.out) + at, &halves, count * sizeof(uint16_t));
    }
}

// LANES channels from `channel` on and as many from channel + HALF on, for a tile's tokens; in PANELS panels that
// lie `apart` panels from each other, since memory serves several streams faster than one.
template <int WEIGHT_BITS, int BITS, int ROWS, int PANELS>
void multiply(const Problem& problem, const Tile& tile, const uint8_t* weight, int64_t channel, int64_t apart) {
    typedef uint8_t Zeros __attribute__((vector_size(LANES)));
    const Problem p = problem;
    const int64_t group_bytes = p.steps * 16 * WEIGHT_BITS, ratio = p.groups / p.weight_groups;
    Floats out[PANELS][ROWS][2] = {};
    for (int64_t g = 0; g < p.groups; g++) {
        const int32_t* const start = tile.start + g * ROWS;
        const int64_t grid = g / ratio * p.channels;
        Ints dots[PANELS][ROWS][2], sums[PANELS][2] = {};
#pragma GCC unroll 4
        for (int q = 0; q < PANELS; q++) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const int shift = h && WEIGHT_BITS == 4 ? HIGH_SHIFT : 0;
                const int64_t first = channel + q * apart * PANEL + h * HALF;
                Ints zero{};
                if (p.weight_zero && first < p.channels) {
                    const Zeros zeros = load_some<Zeros>(p.weight_zero + grid + first, p.channels - first);
                    zero = __builtin_convertvector(zeros, Ints) << shift;
                }
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) {
                    dots[q][r][h] = p.weight_zero ? zero * start[r] : Ints{} + (start[r] * (int32_t)p.offset << shift);
                }
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
                Floats scale{};
                if (p.weight_groups > 1 && first < p.channels) {
                    scale = load_some<Floats>(p.weight_scale + grid + first, p.channels - first);
                }
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) {
                    Ints exact = dots[q][r][h];
                    if (BITS == 8) exact -= sums[q][h] * tile.rest[g * ROWS + r];
                    Floats term = __builtin_convertvector(exact >> shift, Floats);
                    if (p.weight_groups > 1) term *= scale;
                    out[q][r][h] += term * tile.scale[g * ROWS + r];
                }
            }
        }
    }
    for (int q = 0; q < PANELS; q++) {
        for (int h = 0; h < 2; h++) {
            const int64_t first = channel + q * apart * PANEL + h * HALF, left = p.channels - first;
            if (left <= 0) continue;
            const Floats scale = load_some<Floats>(p.weight_scale + first, left);
            const Floats bias = p.bias ? load_some<Floats>(p.bias + first, left) : Floats{};
            for (int r = 0; r < ROWS; r++) {
                Floats x = out[q][r][h];
                if (p.weight_groups == 1) x *= scale;
                if (p.bias) x += bias;
                store(p, tile.first + r, first, x);
            }
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

// One panel of 4-bit weights as a panel of 8-bit ones.
const uint8_t* unpack(const Problem& p, const uint8_t* panel) {
    static thread_local std::vector<uint8_t> unpacked;
    constexpr int64_t LINE = 4 * HALF;
    const int64_t bytes = p.groups * p.steps * LINE;
    if (static_cast<int64_t>(unpacked.size()) < 2 * bytes) unpacked.resize(2 * bytes);
    uint8_t* const to = unpacked.data();
    for (int64_t i = 0; i < bytes; i += sizeof(Bytes)) {
        const Bytes line = load<Bytes>(panel + i), low = line & 15, high = line >> 4;
        const int64_t at = i + i / LINE * LINE;
        memcpy(to + at, &low, sizeof low);
        memcpy(to + at + LINE, &high, sizeof high);
    }
    return to;
}

// All tiles in one panel.
template <int WEIGHT_BITS, int BITS>
void multiply_panel(const Problem& p, const Tile* tiles, int64_t count, int64_t panel) {
    const uint8_t* weight = p.weight + panel * p.groups * p.steps * 16 * WEIGHT_BITS;
    const bool unpacked = WEIGHT_BITS == 4 && count >= UNPACK_TILES;
    if (unpacked) weight = unpack(p, weight);
    const auto& by_rows = unpacked ? BY_ROWS<8, BITS> : BY_ROWS<WEIGHT_BITS, BITS>;
    for (int64_t i = 0; i < count; i++) {
        for (int part = 0; part < PARTS; part++) {
            by_rows[tiles[i].rows - 1](p, tiles[i], weight + part * 4 * LANES, panel * PANEL + part * LANES, 0);
        }
    }
}

// All tiles in all panels; runs in every thread of a parallel region.
template <int WEIGHT_BITS, int BITS>
void multiply_panels(const Problem& p, const Tile* tiles, int64_t count) {
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

template <int WEIGHT_BITS, int BITS>
void run(const Problem& p) {
    const int64_t words = row_words(p), most = std::max<int64_t>(SCRATCH / (4 * words) / MAX_ROWS, 1) * MAX_ROWS;
    const int64_t chunks = (p.tokens + most - 1) / most;
    static thread_local std::vector<int32_t> scratch;
    static thread_local std::vector<Tile> tiles;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t start = chunk * p.tokens / chunks, tokens = (chunk + 1) * p.tokens / chunks - start;
        const int64_t count = (tokens + MAX_ROWS - 1) / MAX_ROWS;
        if (static_cast<int64_t>(scratch.size()) < tokens * words) scratch.resize(tokens * words);
        if (static_cast<int64_t>(tiles.size()) < count) tiles.resize(count);
        int32_t* const to = scratch.data();
        Tile* const made = tiles.data();
#pragma omp parallel if (tokens * p.features * p.channels >= PARALLEL)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) {  // as even as possible: 16 tokens are 8 and 8
                const int64_t first = i * tokens / count, rows = (i + 1) * tokens / count - first;
                made[i] = make_tile<BITS>(p, start + first, rows, to + first * words);
            }
            multiply_panels<WEIGHT_BITS, BITS>(p, made, count);
        }
    }
}

}  // namespace

void infoquant::quantized_linear(const Quantised& x, int64_t tokens, int64_t features, int64_t input_groups,
                                 int64_t num_bits, const Weight& weight, const float* bias, void* out,
                                 int64_t out_type) {
    const int64_t offset = 1 << (weight.num_bits - 1);
    const Problem p{x.codes, x.scale, x.zero,   weight.lines,    weight.scale, weight.zero,   bias,
                    out,     tokens,  features, weight.channels, input_groups, weight.groups, out_type, offset};
    if (weight.num_bits == 4) return num_bits == 4 ? run<4, 4>(p) : run<4, 8>(p);
    return num_bits == 4 ? run<8, 4>(p) : run<8, 8>(p);
}
