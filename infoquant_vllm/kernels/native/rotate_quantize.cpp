// Input transform and activation quantiser; semantics: kernels/reference/rotate_quantize.py, bit by bit.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "hadamard.h"
#include "matrix_product.h"

using namespace infoquant;

namespace {

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Kind { NONE, HADAMARD, BLOCKS, KRONECKER };

constexpr int64_t MATRIX_TOKENS = 12;  // multiplied at a time, so that a matrix is read from memory once for them
constexpr int64_t SERIAL_WORK = 1 << 16;  // operations that are done sooner than other threads are called

// The rows to transform and how. By kind:
// HADAMARD: runs of right_size features, its dense factor is left [left_size, left_size]
// BLOCKS: right [features / right_size, right_size, right_size]
// KRONECKER: left [left_size, left_size] (x) right [right_size, right_size]
struct Transform {
    const void* x;
    int64_t dtype, features, kind;
    const float *left, *right;
    int64_t left_size, right_size;
};

// What a thread works in; kept between calls.
struct Scratch {
    std::vector<float> rows, halfway;
    std::vector<double> wide, left;

    void reserve(int64_t elements, const Transform& t) {
        if ((int64_t)rows.size() < elements) rows.resize(elements);
        if (t.kind < BLOCKS) return;
        if ((int64_t)wide.size() < elements) wide.resize(elements), halfway.resize(elements);
        if (t.kind == KRONECKER) left.assign(t.left, t.left + t.left_size * t.left_size);
    }
};

Floats load_as(const void* source, int64_t dtype) {
    if (dtype == FLOAT32) return load(static_cast<const float*>(source));
    return dtype == BFLOAT16 ? from_bfloat16(static_cast<const uint16_t*>(source))
                             : from_float16(static_cast<const uint16_t*>(source));
}

// x [count] in its dtype to float32.
void load_rows(const Transform& t, int64_t first, int64_t count, float* target) {
    const int64_t bytes = t.dtype == FLOAT32 ? 4 : 2;
    const char* source = static_cast<const char*>(t.x) + first * bytes;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(target + i, load_as(source + i * bytes, t.dtype));
    if (i == count) return;
    char last[4 * LANES] = {};
    std::memcpy(last, source + i * bytes, (count - i) * bytes);
    store_some(target + i, load_as(last, t.dtype), count - i);
}

void multiply_blocks(const Transform& t, int64_t tokens, Scratch& scratch) {
    const int64_t size = t.right_size;
    for (int64_t block = 0; block * size < t.features; ++block) {
        float* rows = scratch.rows.data() + block * size;
        for (int64_t token = 0; token < tokens; ++token) {
            std::copy_n(rows + token * t.features, size, scratch.wide.data() + token * size);
        }
        product({scratch.wide.data(), size, 1}, t.right + block * size * size, tokens, size, size, rows, t.features);
    }
}

// Each row is a matrix X [left_size, right_size] and becomes left^T X right.
void multiply_kronecker(const Transform& t, int64_t tokens, Scratch& scratch) {
    const int64_t a = t.left_size, b = t.right_size;
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t first = token * t.features;
        product({scratch.left.data(), 1, a}, scratch.rows.data() + first, a, b, a, scratch.halfway.data() + first, b);
    }
    std::copy_n(scratch.halfway.data(), tokens * t.features, scratch.wide.data());
    product({scratch.wide.data(), b, 1}, t.right, tokens * a, b, b, scratch.rows.data(), b);
}

// Rows first .. first + tokens, transformed, into scratch.rows.
void transform_rows(const Transform& t, int64_t first, int64_t tokens, Scratch& scratch) {
    const int64_t count = tokens * t.features;
    load_rows(t, first * t.features, count, scratch.rows.data());
    if (t.kind == HADAMARD) {
        for (int64_t i = 0; i < count; i += t.right_size) {
            hadamard(scratch.rows.data() + i, t.right_size, t.left, t.left_size);
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
    Floats low{}, high{};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const Floats v = load(y + i);
        low = smaller(low, v);
        high = larger(high, v);
    }
    const Floats last = load_some(y + i, size - i);  // the zeros that fill it do not count
    low = smaller(low, last);
    high = larger(high, last);
    Range found{0, 0};
    for (int lane = 0; lane < LANES; ++lane) {
        found.low = std::min(found.low, low[lane]);
        found.high = std::max(found.high, high[lane]);
    }
    return found;
}

void quantise_group(const float* y, int64_t size, const float* clip, int64_t num_bits, bool symmetric, uint8_t* codes,
                    float* scale, int32_t* zero) {
    const Range ends = range(y, size);
    const float low = ends.low * clip[0], high = ends.high * clip[1];
    const float largest = static_cast<float>((1 << num_bits) - 1), half = static_cast<float>(1 << (num_bits - 1));
    const float step = std::max(symmetric ? std::max(-low, high) / (half - 1) : (high - low) / largest, 1e-12f);
    const float inverse = 1 / step, middle = symmetric ? half : std::nearbyint(-low * inverse);
    *scale = step;
    *zero = static_cast<int32_t>(middle);
    // Both bounds are integers, so that they may come before the rounding.
    const Floats lowest = splat(-middle), highest = splat(largest - middle);
    const Ints offset = Ints{} + *zero;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        store_bytes(codes + i, nearest(larger(smaller(load(y + i) * inverse, highest), lowest)) + offset);
    }
    for (; i < size; ++i) {
        const float bounded = std::max(std::min(y[i] * inverse, largest - middle), -middle);
        codes[i] = static_cast<uint8_t>(std::nearbyint(bounded) + middle);
    }
}

// Calls `each(first, tokens, scratch)` for all rows in tiles, by several threads where that is worth it.
template <typename Each>
void for_tiles(const Transform& t, int64_t tokens, Each each) {
    const int64_t per_value = t.kind < BLOCKS ? 1 : t.left_size + t.right_size;
    const int64_t threads = tokens * t.features * per_value > SERIAL_WORK ? omp_get_max_threads() : 1;
    const int64_t tile = t.kind < BLOCKS ? 1 : std::clamp<int64_t>((tokens + threads - 1) / threads, 1, MATRIX_TOKENS);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        thread_local Scratch scratch;
        scratch.reserve(tile * t.features, t);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < tokens; first += tile) {
            const int64_t count = std::min(tile, tokens - first);
            transform_rows(t, first, count, scratch);
            each(first, count, scratch.rows.data());
        }
    }
}

}  // namespace

// x [tokens, features] to codes of the same shape, scale and zero [tokens, groups]; clip [groups, 2].
extern "C" void infoquant_rotate_quantize(const void* x, int64_t dtype, int64_t tokens, int64_t features, int64_t kind,
                                          const float* left, int64_t left_size, const float* right,
                                          int64_t right_size, const float* clip, int64_t groups, int64_t num_bits,
                                          int64_t symmetric, uint8_t* codes, float* scale, int32_t* zero) {
    const Transform transform{x, dtype, features, kind, left, right, left_size, right_size};
    const int64_t size = features / groups;
    for_tiles(transform, tokens, [=](int64_t first, int64_t count, const float* y) {
        for (int64_t i = 0; i < count * groups; ++i) {
            const int64_t place = first * groups + i;
            quantise_group(y + i * size, size, clip + 2 * (i % groups), num_bits, symmetric, codes + place * size,
                           scale + place, zero + place);
        }
    });
}

// The transform alone: x [tokens, features] to y of the same shape in float32.
extern "C" void infoquant_rotate(const void* x, int64_t dtype, int64_t tokens, int64_t features, int64_t kind,
                                 const float* left, int64_t left_size, const float* right, int64_t right_size,
                                 float* y) {
    const Transform transform{x, dtype, features, kind, left, right, left_size, right_size};
    for_tiles(transform, tokens, [=](int64_t first, int64_t count, const float* rows) {
        std::copy_n(rows, count * features, y + first * features);
    });
}
