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

// y [size] -= mean [size].
void subtract(float* y, const float* mean, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(y + i, load(y + i) - load(mean + i));
    for (; i < size; ++i) y[i] -= mean[i];
}

// Minima and maxima, both with zero, in each lane.
struct Extremes {
    Floats low, high;
};

// Of a group: the lanes are of every LANES-th value.
INLINE Extremes lane_extremes(const float* y, int64_t size) {
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
    const auto least = [](Floats a, Floats b) { return min(a, b); };
    const auto largest = [](Floats a, Floats b) { return max(a, b); };
    return {least(least(low[0], low[1]), least(low[2], low[3])),
            largest(largest(high[0], high[1]), largest(high[2], high[3]))};
}

struct MinMax {
    float low, high;
};

// Minimum and maximum of a group, both with zero.
MinMax min_max(const float* y, int64_t size) {
    const Extremes found = lane_extremes(y, size);
    return {hmin(found.low), hmax(found.high)};
}

// Of up to LANES groups: a lane is a group.
Extremes group_extremes(const float* y, int64_t size, int64_t groups) {
    Floats low[LANES] = {}, high[LANES] = {};
    for (int64_t g = 0; g < groups; ++g) {
        const Extremes found = lane_extremes(y + g * size, size);
        low[g] = found.low, high[g] = found.high;
    }
    return {reduce_each(low, [](Floats a, Floats b) { return min(a, b); }),
            reduce_each(high, [](Floats a, Floats b) { return max(a, b); })};
}

// Row `row` of `to`: values [features], scales and offsets [segments].
struct Row {
    int8_t* values;
    float* scale;
    int32_t* offset;

    Row(const Quantized& to, int64_t row)
        : values(to.values + row * to.features), scale(to.scale + row * to.segments),
          offset(to.offset ? to.offset + row * to.segments : nullptr) {}
};

// How the values of a group are made of y: rounded (y * inverse), within low .. high, which are integers.
struct Rounding {
    float inverse, low, high;
    INLINE_MEMBER Floats clamped(Floats y) const { return max(min(y * inverse, splat(high)), splat(low)); }
};

// values [size] = to_integers(y).
template <typename ToIntegers>
INLINE void store_values(const float* y, int64_t size, int8_t* values, const ToIntegers& to_integers) {
    typedef int8_t Values __attribute__((vector_size(LANES)));
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
        store_bytes(values + i, to_integers(load(y + i)), to_integers(load(y + i + LANES)),
                    to_integers(load(y + i + 2 * LANES)), to_integers(load(y + i + 3 * LANES)));
    }
    for (; i + LANES <= size; i += LANES) {
        store(values + i, __builtin_convertvector(to_integers(load(y + i)), Values));
    }
    if (i == size) return;
    const Values last = __builtin_convertvector(to_integers(load_some(y + i, size - i)), Values);
    std::memcpy(values + i, &last, size - i);
}

// A segment of one group.
void quantize_segment(const float* y, int64_t size, const InputQuant& quant, const float* clip, int8_t* values,
                      float* scale, int32_t* offset) {
    const MinMax range = min_max(y, size);
    const float low = range.low * clip[0], high = range.high * clip[1];
    const float largest = static_cast<float>((1 << quant.num_bits) - 1);
    const float half = static_cast<float>(1 << (quant.num_bits - 1));
    const float step = std::max(quant.symmetric ? std::max(-low, high) / (half - 1) : (high - low) / largest, 1e-12f);
    const float inverse = 1 / step, zero_point = quant.symmetric ? half : std::nearbyint(-low * inverse);
    const int32_t added = quant.has_offset() ? static_cast<int32_t>(zero_point) - 128 : 0;
    *scale = step;
    if (offset) *offset = added;
    const Rounding rounding{inverse, -zero_point, largest - zero_point};
    store_values(y, size, values, [=](Floats v) { return round_to_int(rounding.clamped(v)) + added; });
}

// Scratch memory of the groups of a segment, padded to whole vectors.
struct Groups {
    float *step, *zero_point, *inverse;

    explicit Groups(int64_t groups) {
        thread_local Buffer<float> buffer;
        const int64_t padded = round_up(groups, LANES);
        step = buffer.reserve(3 * padded);
        zero_point = step + padded, inverse = zero_point + padded;
    }
};

// A segment of several groups of 4 bits, whose values share a scale: see `quantize_groups` in kernels/torch/quantize.py.
void quantize_groups(const float* y, int64_t size, int64_t groups, const InputQuant& quant, const float* clip,
                     int8_t* values, float* scale) {
    constexpr float MAX_CODE = 15, MIDDLE = 8, LARGEST_VALUE = 120;
    const Groups found(groups);
    const Ints even = 2 * lane_index() % (2 * LANES);
    Floats largest{};
    for (int64_t g = 0; g < groups; g += LANES) {
        const int64_t count = std::min<int64_t>(LANES, groups - g);
        const Extremes range = group_extremes(y + g * size, size, count);
        const Floats clip_pairs[2] = {load_some(clip + 2 * g, 2 * count),
                                      2 * count > LANES ? load_some(clip + 2 * g + LANES, 2 * count - LANES) : Floats{}};
        const Floats low = range.low * __builtin_shuffle(clip_pairs[0], clip_pairs[1], even);
        const Floats high = range.high * __builtin_shuffle(clip_pairs[0], clip_pairs[1], even + 1);
        const Floats step =
            max(quant.symmetric ? max(-low, high) / (MIDDLE - 1) : (high - low) / MAX_CODE, splat(1e-12f));
        const Floats inverse = 1 / step, zero_point = quant.symmetric ? splat(MIDDLE) : round(-low * inverse);
        store(found.step + g, step);
        store(found.inverse + g, inverse);
        store(found.zero_point + g, zero_point);
        const Floats reached = step * max(zero_point, MAX_CODE - zero_point);
        largest = max(largest, load_some(reinterpret_cast<const float*>(&reached), count));
    }
    *scale = hmax(largest) / LARGEST_VALUE;
    const float inverse_scale = 1 / *scale;
    for (int64_t g = 0; g < groups; ++g) {
        const float ratio = found.step[g] * inverse_scale, zero_point = found.zero_point[g];
        const Rounding rounding{found.inverse[g], -zero_point, MAX_CODE - zero_point};
        store_values(y + g * size, size, values + g * size,
                     [=](Floats v) { return round_to_int(round(rounding.clamped(v)) * ratio); });
    }
}

// int16 codes of a token, 256 * high byte + low byte: a row of each, less 128.
void quantize_int16(const float* y, int64_t size, const Row& high_row, const Row& low_row) {
    typedef int8_t Values __attribute__((vector_size(LANES)));
    const MinMax range = min_max(y, size);
    const float step = std::max(std::max(-range.low, range.high) / 32767, 1e-12f), inverse = 1 / step;
    *high_row.scale = 256 * step, *high_row.offset = 0;
    *low_row.scale = step, *low_row.offset = -128;
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, size - i);
        const Ints code = round_to_int(load_some(y + i, count) * inverse);
        const Values high = __builtin_convertvector(code >> 8, Values);
        const Values low = __builtin_convertvector((code & 255) - 128, Values);
        std::memcpy(high_row.values + i, &high, count);
        std::memcpy(low_row.values + i, &low, count);
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
    const int64_t features = input.features, segments = quant.segments, size = features / segments;
    const int64_t groups = quant.groups / segments;  // of a segment
    for_tiles(input, [=](int64_t first, int64_t count, float* rows) {
        for (int64_t i = 0; i < count; ++i) {
            float* const y = rows + i * features;
            if (quant.mean) subtract(y, quant.mean, features);
            const Row row(to, quant.rows_each() * (first + i));
            if (!quant.clip) {
                quantize_int16(y, features, row, Row(to, 2 * (first + i) + 1));
                continue;
            }
            for (int64_t s = 0; s < segments; ++s) {
                const float* const clip = quant.clip + 2 * s * groups;
                if (groups == 1) {
                    quantize_segment(y + s * size, size, quant, clip, row.values + s * size, row.scale + s,
                                     row.offset ? row.offset + s : nullptr);
                } else {
                    quantize_groups(y + s * size, size / groups, groups, quant, clip, row.values + s * size,
                                    row.scale + s);
                }
            }
        }
    });
}

void rotate(const Input& input, float* y) {
    for_tiles(input, [=](int64_t first, int64_t count, const float* rows) {
        std::copy_n(rows, count * input.features, y + first * input.features);
    });
}

}  // namespace infoquant
