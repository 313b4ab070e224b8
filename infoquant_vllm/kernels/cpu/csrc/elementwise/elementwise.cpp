// RMS norm, the products of gated MLPs, and RoPE; semantics: kernels/torch/elementwise.py. Sums, roots and exponentials are
// computed in float64 and rounded to float32 once, so that the result does not depend on the order of operations.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace infoquant {
namespace {

constexpr int64_t SERIAL_VALUES = 1 << 15;  // fewer are done before other threads have started

typedef int64_t Longs __attribute__((vector_size(sizeof(Doubles))));

// e^x to a few units in the last place: 2^n times the Taylor series at the remainder r, |r| < 0.35.
inline Doubles exponential(Doubles x) {
    const Doubles low = splat(-700.0), high = splat(710.0);  // e^710 is infinite
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Doubles magic = splat(0x1.8p52);  // adding it leaves the nearest integer in the last bits
    const Doubles shifted = x * 0x1.71547652b82fep0 + magic, n = shifted - magic;
    const Doubles r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;  // ln 2 in two parts
    constexpr int TERMS = 13;
    constexpr double COEFFICIENTS[TERMS + 1] = {  // 1 / n!
        1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
        1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0, 1.0, 1.0};
    Doubles sum = splat(COEFFICIENTS[0]);
#pragma GCC unroll 13
    for (int n = 1; n <= TERMS; ++n) sum = fma(sum, r, splat(COEFFICIENTS[n]));
    return sum * (Doubles)(((Longs)shifted << 52) + (Longs)splat(1.0));
}

// x sigmoid(x), or x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the approximation of GELU by tanh.
template <Activation ACTIVATION>
Doubles activated(Doubles x) {
    constexpr double SLOPE = 1.5957691216057308, CUBIC = 0.044715;
    return x / (1.0 + exponential(ACTIVATION == SILU ? -x : -SLOPE * (x + CUBIC * (x * x * x))));
}

// Replaces each value by its activation, rounded to float32.
template <Activation ACTIVATION>
void activate(float* values, int64_t count) {
    int64_t i = 0;
    for (; i + DOUBLE_LANES <= count; i += DOUBLE_LANES) narrow(values + i, activated<ACTIVATION>(widen(values + i)));
    if (i == count) return;
    float last[DOUBLE_LANES] = {};
    std::copy_n(values + i, count - i, last);
    narrow(last, activated<ACTIVATION>(widen(last)));
    std::copy_n(last, count - i, values + i);
}

// Activation of every value that the 16-bit dtype holds, rounded to it: looking up is faster than float64 products.
template <Activation ACTIVATION, Dtype DTYPE>
const float* activation_table() {
    static const std::vector<float> table = [] {
        std::vector<uint16_t> bits(1 << 16);
        std::vector<float> values(bits.size());
        std::iota(bits.begin(), bits.end(), uint16_t{0});
        load_rows<DTYPE>(bits.data(), 0, bits.size(), values.data());
        activate<ACTIVATION>(values.data(), values.size());
        for (size_t i = 0; i < values.size(); i += LANES) {
            store(values.data() + i, round_to<DTYPE>(load(values.data() + i)));
        }
        return values;
    }();
    return table.data();
}

constexpr int CHAINS = 4;  // independent sums hide the latency of an addition

// Sum of squares of x [size], which is padded with zeros to a multiple of CHAINS * DOUBLE_LANES.
double sum_of_squares(const float* x, int64_t size) {
    Doubles sums[CHAINS] = {};
    for (int64_t i = 0; i < size; i += CHAINS * DOUBLE_LANES) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; ++chain) {
            const Doubles v = widen(x + i + chain * DOUBLE_LANES);
            sums[chain] += v * v;
        }
    }
    const Doubles sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int lane = 0; lane < DOUBLE_LANES; ++lane) total += sum[lane];
    return total;
}

// Operands are firstprivate below: a shared struct would be read again after every store, which might alias it.

template <Dtype DTYPE, Dtype WEIGHT>
void rms_norm_of(RmsNorm p) {
    const int64_t size = p.size;
#pragma omp parallel firstprivate(p) if (p.tokens * size > SERIAL_VALUES)
    {
        std::vector<float> row(size + CHAINS * DOUBLE_LANES);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < p.tokens; ++token) {
            const int64_t first = token * size;
            for (int64_t i = 0; i < size; i += LANES) {
                Floats v = load_part<DTYPE>(p.x, first + i, size - i);
                if (p.residual) {
                    v += load_part<DTYPE>(p.residual, first + i, size - i);
                    store_part<DTYPE>(p.total, first + i, size - i, v);
                }
                store(row.data() + i, v);
            }
            const double factor = 1 / std::sqrt(sum_of_squares(row.data(), size) / size + p.epsilon);
            for (int64_t i = 0; i < size; i += DOUBLE_LANES) narrow(row.data() + i, widen(row.data() + i) * factor);
            for (int64_t i = 0; i < size; i += LANES) {
                const Floats gain = load_part<WEIGHT>(p.weight, i, size - i);
                store_part<DTYPE>(p.y, first + i, size - i, round_to<WEIGHT>(load(row.data() + i)) * gain);
            }
        }
    }
}

template <Activation ACTIVATION, Dtype DTYPE>
void gated_product_of(const void* x, int64_t tokens, int64_t size, void* out) {
    const float* const table = DTYPE == FLOAT32 ? nullptr : activation_table<ACTIVATION, DTYPE>();
#pragma omp parallel if (tokens * size > SERIAL_VALUES)
    {
        std::vector<float> gate(size + LANES);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t gates = 2 * token * size, ups = gates + size, first = token * size;
            if (DTYPE == FLOAT32) {
                load_rows<DTYPE>(x, gates, size, gate.data());
                activate<ACTIVATION>(gate.data(), size);
            }
            for (int64_t i = 0; i < size; i += LANES) {
                const int64_t count = size - i;
                const uint16_t* bits = static_cast<const uint16_t*>(x) + gates + i;
                uint16_t padded[LANES] = {};
                if (count < LANES) bits = std::copy_n(bits, count, padded) - count;
                const Floats gated = DTYPE == FLOAT32 ? load(gate.data() + i) : gather(table, bits);
                store_part<DTYPE>(out, first + i, count, gated * load_part<DTYPE>(x, ups + i, count));
            }
        }
    }
}

template <Dtype DTYPE>
void rotary_embedding_of(Rotary rotary, Rows<const void*> x, void* out) {
    const int64_t tokens = rotary.tokens, heads = rotary.heads, head_size = rotary.head_size;
    const int64_t rotary_dim = rotary.rotary_dim, half = rotary_dim / 2;
#pragma omp parallel for schedule(static) firstprivate(rotary, x) if (tokens * heads * head_size > SERIAL_VALUES)
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t angles = rotary.positions[token] * rotary_dim;
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t from = token * x.stride + head * head_size, to = (token * heads + head) * head_size;
            for (int64_t i = 0; i < half; i += LANES) {
                const int64_t count = half - i;
                const Floats cosine = load_part<DTYPE>(rotary.cos_sin, angles + i, count);
                const Floats sine = load_part<DTYPE>(rotary.cos_sin, angles + half + i, count);
                const Floats first = load_part<DTYPE>(x.data, from + i, count);
                const Floats second = load_part<DTYPE>(x.data, from + half + i, count);
                store_part<DTYPE>(out, to + i, count, fma(-second, sine, first * cosine));
                store_part<DTYPE>(out, to + half + i, count, fma(first, sine, second * cosine));
            }
            for (int64_t i = rotary_dim; i < head_size; i += LANES) {
                const int64_t count = head_size - i;
                store_part<DTYPE>(out, to + i, count, load_part<DTYPE>(x.data, from + i, count));
            }
        }
    }
}

}  // namespace

void rms_norm(const RmsNorm& operands) {
    with_dtype(operands.dtype, [&](auto dtype) {
        if (operands.weight_dtype == FLOAT32) return rms_norm_of<dtype, FLOAT32>(operands);
        rms_norm_of<dtype, dtype>(operands);
    });
}

void gated_product(Activation activation, const void* x, Dtype dtype, int64_t tokens, int64_t size, void* out) {
    with_dtype(dtype, [&](auto constant) {
        if (activation == SILU) return gated_product_of<SILU, constant>(x, tokens, size, out);
        gated_product_of<GELU_TANH, constant>(x, tokens, size, out);
    });
}

void rotary_embedding(const Rotary& rotary, const Rows<const void*>& x, void* out) {
    with_dtype(x.dtype, [&](auto dtype) { rotary_embedding_of<dtype>(rotary, x, out); });
}

}  // namespace infoquant
