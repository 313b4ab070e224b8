// Input transform and activation quantizer; semantics: kernels/reference/rotate_quantize.py, bit by bit.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "quantize/hadamard.h"
#include "kernels.h"
#include "quantize/matrix_product.h"
#include "rows.h"

using namespace infoquant;

namespace {

constexpr int64_t MATRIX_TOKENS = 12;  // multiplied at a time, so that a matrix is read from memory once for them
constexpr int64_t SERIAL_WORK = 1 << 16;  // operations that are done sooner than other threads are called

// What a thread works in.
struct Scratch {
    float *rows, *halfway;
    double *wide, *left;

    Scratch(int64_t elements, const Input& t) {
        thread_local Buffer<float> rows_buffer, halfway_buffer;
        thread_local Buffer<double> wide_buffer, left_buffer;
        rows = rows_buffer.reserve(elements);
        if (t.kind < BLOCKS) return;
        wide = wide_buffer.reserve(elements);
        if (t.kind != KRONECKER) return;
        halfway = halfway_buffer.reserve(elements);
        left = left_buffer.reserve(t.left_size * t.left_size);
        std::copy_n(t.left, t.left_size * t.left_size, left);
    }
};

void multiply_blocks(const Input& t, int64_t tokens, const Scratch& scratch) {
    const int64_t size = t.right_size;
    for (int64_t block = 0; block * size < t.features; ++block) {
        float* rows = scratch.rows + block * size;
        for (int64_t token = 0; token < tokens; ++token) {
            std::copy_n(rows + token * t.features, size, scratch.wide + token * size);
        }
        product({scratch.wide, size, 1}, t.right + block * size * size, tokens, size, size, rows, t.features);
    }
}

// Each row is a matrix X [left_size, right_size] and becomes left^T X right.
void multiply_kronecker(const Input& t, int64_t tokens, const Scratch& scratch) {
    const int64_t a = t.left_size, b = t.right_size;
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t first = token * t.features;
        product({scratch.left, 1, a}, scratch.rows + first, a, b, a, scratch.halfway + first, b);
    }
    std::copy_n(scratch.halfway, tokens * t.features, scratch.wide);
    product({scratch.wide, b, 1}, t.right, tokens * a, b, b, scratch.rows, b);
}

// Rows first .. first + tokens, transformed, into scratch.rows.
void transform_rows(const Input& t, int64_t first, int64_t tokens, const Scratch& scratch) {
    const int64_t count = tokens * t.features;
    load_rows(t.x, t.dtype, first * t.features, count, scratch.rows);
    if (t.kind == HADAMARD) {
        for (int64_t i = 0; i < count; i += t.right_size) {
            hadamard(scratch.rows + i, t.right_size, t.left, t.left_size);
        }
    } else if (t.kind == BLOCKS) {
        multiply_blocks(t, tokens, scratch);
    } else if (t.kind == KRONECKER) {
        multiply_kronecker(t, tokens, scratch);
    }
}

struct Range {
    float low, high;
};

// Minimum and maximum of a group and of zero.
Range range(const float* y, int64_t size) {
    constexpr int CHAINS = 4;  // a minimum takes several cycles, but more than one can be under way
    Floats low[CHAINS] = {}, high[CHAINS] = {};
    int64_t i = 0;
    for (; i + CHAINS * LANES <= size; i += CHAINS * LANES) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; ++chain) {
            const Floats v = load(y + i + chain * LANES);
            low[chain] = smaller(low[chain], v);
            high[chain] = larger(high[chain], v);
        }
    }
    for (; i < size; i += LANES) {
        const Floats v = load_some(y + i, size - i);  // the zeros that may fill it do not count
        low[0] = smaller(low[0], v);
        high[0] = larger(high[0], v);
    }
    for (int chain = 1; chain < CHAINS; ++chain) {
        low[0] = smaller(low[0], low[chain]);
        high[0] = larger(high[0], high[chain]);
    }
    return {smallest(low[0]), -smallest(-high[0])};
}

void quantize_group(const float* y, int64_t size, const float* clip, int64_t num_bits, bool symmetric, uint8_t* codes,
                    float* scale, int32_t* zero) {
    const Range ends = range(y, size);
    const float low = ends.low * clip[0], high = ends.high * clip[1];
    const float largest = static_cast<float>((1 << num_bits) - 1), half = static_cast<float>(1 << (num_bits - 1));
    const float step = std::max(symmetric ? std::max(-low, high) / (half - 1) : (high - low) / largest, 1e-12f);
    const float inverse = 1 / step, middle = symmetric ? half : std::nearbyint(-low * inverse);
    const int32_t offset = static_cast<int32_t>(middle);
    *scale = step;
    *zero = offset;
    const float highest = largest - middle;  // an integer, so that the bound may come before the rounding
    const auto integers = [&](int64_t i) { return nearest(smaller(load(y + i) * inverse, splat(highest))); };
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
        store_codes(codes + i, integers(i), integers(i + LANES), integers(i + 2 * LANES), integers(i + 3 * LANES), offset);
    }
    for (; i < size; ++i) {
        const float code = std::nearbyint(std::min(y[i] * inverse, highest)) + middle;
        codes[i] = static_cast<uint8_t>(std::max(code, 0.0f));
    }
}

// 16-bit codes of a token: a row of high bytes, and behind it one of low bytes.
void quantize_wide(const float* y, int64_t size, uint8_t* codes, float* scale, int32_t* zero) {
    typedef uint8_t Codes __attribute__((vector_size(LANES)));
    const Range ends = range(y, size);
    const float step = std::max(std::max(-ends.low, ends.high) / 32767, 1e-12f), inverse = 1 / step;
    scale[0] = 256 * step;
    scale[1] = step;
    zero[0] = 128;
    zero[1] = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, size - i);
        const Ints code = nearest(load_some(y + i, count) * inverse) + 32768;
        const Codes high = __builtin_convertvector(code >> 8, Codes), low = __builtin_convertvector(code & 255, Codes);
        std::memcpy(codes + i, &high, count);
        std::memcpy(codes + size + i, &low, count);
    }
}

// Calls `each(first, tokens, rows)` for all rows in tiles, by several threads where that is worth it.
template <typename Each>
void for_tiles(const Input& t, Each each) {
    const int64_t tokens = t.tokens;
    const int64_t per_value = t.kind < BLOCKS ? 1 : t.left_size + t.right_size;
    const int64_t threads = tokens * t.features * per_value > SERIAL_WORK ? omp_get_max_threads() : 1;
    const int64_t tile = t.kind < BLOCKS ? 1 : std::clamp<int64_t>((tokens + threads - 1) / threads, 1, MATRIX_TOKENS);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Scratch scratch(tile * t.features, t);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < tokens; first += tile) {
            const int64_t count = std::min(tile, tokens - first);
            transform_rows(t, first, count, scratch);
            each(first, count, scratch.rows);
        }
    }
}

}  // namespace

void infoquant::rotate_quantize(const Input& input, const float* clip, int64_t groups, int64_t num_bits,
                                bool symmetric, const Quantized& to) {
    const int64_t size = input.features / groups;
    for_tiles(input, [=](int64_t first, int64_t count, const float* y) {
        for (int64_t i = 0; i < count * groups; ++i) {
            const int64_t place = first * groups + i;
            quantize_group(y + i * size, size, clip + 2 * (i % groups), num_bits, symmetric, to.codes + place * size,
                           to.scale + place, to.zero + place);
        }
    });
}

void infoquant::rotate_quantize_wide(const Input& input, const Quantized& to) {
    const int64_t features = input.features;
    for_tiles(input, [=](int64_t first, int64_t count, const float* y) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = 2 * (first + i);
            quantize_wide(y + i * features, features, to.codes + row * features, to.scale + row, to.zero + row);
        }
    });
}

void infoquant::rotate(const Input& input, float* y) {
    for_tiles(input, [=](int64_t first, int64_t count, const float* rows) {
        std::copy_n(rows, count * input.features, y + first * input.features);
    });
}
