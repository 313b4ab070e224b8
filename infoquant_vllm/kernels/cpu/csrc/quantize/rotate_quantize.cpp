// Input transforms and the activation quantizer; bit for bit kernels/torch/quantize.py.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "quantize/hadamard.h"
#include "quantize/matmul_f64.h"

namespace infoquant {
namespace {

constexpr int64_t MATRIX_TOKENS = 12;  // tokens that share one read of a matrix from memory
constexpr int64_t SERIAL_WORK = 1 << 16;  // operations; fewer are done before other threads have started

bool multiplies(const Input& t) { return t.kind == Transform::BLOCKS || t.kind == Transform::KRONECKER; }

// Scratch memory of a thread.
struct Scratch {
    float *rows, *left_product;
    double *rows_f64, *left_f64;

    Scratch(int64_t elements, const Input& t) {
        thread_local Buffer<float> rows_buffer, left_product_buffer;
        thread_local Buffer<double> rows_f64_buffer, left_f64_buffer;
        rows = rows_buffer.reserve(elements);
        if (!multiplies(t)) return;
        rows_f64 = rows_f64_buffer.reserve(elements);
        if (t.kind != Transform::KRONECKER) return;
        left_product = left_product_buffer.reserve(elements);
        left_f64 = left_f64_buffer.reserve(t.left_size * t.left_size);
        std::copy_n(t.left, t.left_size * t.left_size, left_f64);
    }
};

void multiply_blocks(const Input& t, int64_t tokens, const Scratch& scratch) {
    const int64_t size = t.right_size;
    for (int64_t block = 0; block * size < t.features; ++block) {
        float* rows = scratch.rows + block * size;
        for (int64_t token = 0; token < tokens; ++token) {
            std::copy_n(rows + token * t.features, size, scratch.rows_f64 + token * size);
        }
        matmul_f64({scratch.rows_f64, size, 1}, t.right + block * size * size, tokens, size, size, rows, t.features);
    }
}

// Each row is a matrix X [left_size, right_size] and becomes left^T X right.
void multiply_kronecker(const Input& t, int64_t tokens, const Scratch& scratch) {
    const int64_t a = t.left_size, b = t.right_size;
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t first = token * t.features;
        matmul_f64({scratch.left_f64, 1, a}, scratch.rows + first, a, b, a, scratch.left_product + first, b);
    }
    std::copy_n(scratch.left_product, tokens * t.features, scratch.rows_f64);
    matmul_f64({scratch.rows_f64, b, 1}, t.right, tokens * a, b, b, scratch.rows, b);
}

// Loads and transforms tokens first .. first + tokens into scratch.rows.
void transform_rows(const Input& t, int64_t first, int64_t tokens, const Scratch& scratch) {
    const int64_t count = tokens * t.features;
    load_rows(t.x, t.dtype, first * t.features, count, scratch.rows);
    if (t.kind == Transform::HADAMARD) {
        for (int64_t i = 0; i < count; i += t.right_size) {
            hadamard(scratch.rows + i, t.right_size, t.left, t.left_size);
        }
    } else if (t.kind == Transform::BLOCKS) {
        multiply_blocks(t, tokens, scratch);
    } else if (t.kind == Transform::KRONECKER) {
        multiply_kronecker(t, tokens, scratch);
    }
}

struct MinMax {
    float low, high;
};

// Minimum and maximum of a group, both with zero.
MinMax min_max(const float* y, int64_t size) {
    constexpr int CHAINS = 4;  // independent minima hide the latency of one
    Floats low[CHAINS] = {}, high[CHAINS] = {};
    int64_t i = 0;
    for (; i + CHAINS * LANES <= size; i += CHAINS * LANES) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; ++chain) {
            const Floats v = load(y + i + chain * LANES);
            low[chain] = min(low[chain], v);
            high[chain] = max(high[chain], v);
        }
    }
    for (; i < size; i += LANES) {
        const Floats v = load_some(y + i, size - i);  // padding with zeros changes nothing
        low[0] = min(low[0], v);
        high[0] = max(high[0], v);
    }
    for (int chain = 1; chain < CHAINS; ++chain) {
        low[0] = min(low[0], low[chain]);
        high[0] = max(high[0], high[chain]);
    }
    return {hmin(low[0]), hmax(high[0])};
}

void quantize_group(const float* y, int64_t size, const InputQuant& quant, const float* clip, uint8_t* codes,
                    float* scale, int32_t* zero_point) {
    const MinMax range = min_max(y, size);
    const float low = range.low * clip[0], high = range.high * clip[1];
    const float largest = static_cast<float>((1 << quant.num_bits) - 1);
    const float half = static_cast<float>(1 << (quant.num_bits - 1));
    const float step = std::max(quant.symmetric ? std::max(-low, high) / (half - 1) : (high - low) / largest, 1e-12f);
    const float inverse = 1 / step, middle = quant.symmetric ? half : std::nearbyint(-low * inverse);
    const int32_t offset = static_cast<int32_t>(middle);
    *scale = step;
    *zero_point = offset;
    const float highest = largest - middle;  // an integer, so clamping may come before rounding
    const auto integers = [&](int64_t i) { return round_to_int(min(load(y + i) * inverse, splat(highest))); };
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
        store_codes(codes + i, integers(i), integers(i + LANES), integers(i + 2 * LANES), integers(i + 3 * LANES),
                    offset);
    }
    for (; i < size; ++i) {
        const float code = std::nearbyint(std::min(y[i] * inverse, highest)) + middle;
        codes[i] = static_cast<uint8_t>(std::max(code, 0.0f));
    }
}

// int16 codes of a token, 256 * (high - 128) + low: a row of high bytes, then a row of low bytes.
void quantize_wide(const float* y, int64_t size, uint8_t* codes, float* scale, int32_t* zero_point) {
    typedef uint8_t Codes __attribute__((vector_size(LANES)));
    const MinMax range = min_max(y, size);
    const float step = std::max(std::max(-range.low, range.high) / 32767, 1e-12f), inverse = 1 / step;
    scale[0] = 256 * step;
    scale[1] = step;
    zero_point[0] = 128;
    zero_point[1] = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, size - i);
        const Ints code = round_to_int(load_some(y + i, count) * inverse) + 32768;
        const Codes high = __builtin_convertvector(code >> 8, Codes), low = __builtin_convertvector(code & 255, Codes);
        std::memcpy(codes + i, &high, count);
        std::memcpy(codes + size + i, &low, count);
    }
}

// Transforms all tokens, some at a time, and calls each(first, tokens, rows) for them; on several threads if worth it.
template <typename Each>
void for_tiles(const Input& t, Each each) {
    const int64_t tokens = t.tokens;
    const int64_t per_value = !multiplies(t) ? 1 : t.left_size + t.right_size;
    const int64_t threads = tokens * t.features * per_value > SERIAL_WORK ? omp_get_max_threads() : 1;
    const int64_t tile = !multiplies(t) ? 1 : std::clamp<int64_t>((tokens + threads - 1) / threads, 1, MATRIX_TOKENS);
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

void rotate_quantize(const Input& input, const InputQuant& quant, const Quantized& to) {
    const int64_t groups = quant.groups, size = input.features / groups;
    for_tiles(input, [=](int64_t first, int64_t count, const float* y) {
        for (int64_t i = 0; i < count * groups; ++i) {
            const int64_t at = first * groups + i;
            quantize_group(y + i * size, size, quant, quant.clip + 2 * (i % groups), to.codes + at * size,
                           to.scale + at, to.zero_point + at);
        }
    });
}

void rotate_quantize_wide(const Input& input, const Quantized& to) {
    const int64_t features = input.features;
    for_tiles(input, [=](int64_t first, int64_t count, const float* y) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = 2 * (first + i);
            quantize_wide(y + i * features, features, to.codes + row * features, to.scale + row, to.zero_point + row);
        }
    });
}

void rotate(const Input& input, float* y) {
    for_tiles(input, [=](int64_t first, int64_t count, const float* rows) {
        std::copy_n(rows, count * input.features, y + first * input.features);
    });
}

}  // namespace infoquant
