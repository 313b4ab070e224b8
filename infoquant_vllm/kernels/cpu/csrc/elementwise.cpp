// RMS norm, SwiGLU's product and RoPE; semantics: kernels/reference/elementwise.py. What could round differently from one
// order of operations to another is in float64 and rounded to float32 once.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "doubles.h"
#include "kernels.h"
#include "rows.h"

using namespace infoquant;

namespace {

constexpr int64_t SERIAL_VALUES = 1 << 15;  // that are done sooner than other threads are called

typedef int64_t Longs __attribute__((vector_size(8 * WIDTH)));

inline Doubles load_double(const float* from, int64_t count) {
    float some[WIDTH] = {};
    std::memcpy(some, from, std::min<int64_t>(count, WIDTH) * sizeof(float));
    return widen(some);
}

// e^x to a few units in the last place: 2^n times the Taylor series of what is left, |r| < 0.35.
inline Doubles exponential(Doubles x) {
    const Doubles low = Doubles{} - 700, high = Doubles{} + 710;  // whose power is infinite
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Doubles magic = Doubles{} + 0x1.8p52;  // adding it leaves the nearest whole number in the last bits
    const Doubles shifted = x * 0x1.71547652b82fep0 + magic, n = shifted - magic;
    const Doubles r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;  // ln 2 in two parts
    constexpr int TERMS = 13;
    constexpr double COEFFICIENTS[TERMS + 1] = {  // 1 / n!
        1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
        1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 1.0 / 2.0, 1.0, 1.0};
    Doubles sum = Doubles{} + COEFFICIENTS[0];
#pragma GCC unroll 13
    for (int n = 1; n <= TERMS; ++n) sum = fma(sum, r, Doubles{} + COEFFICIENTS[n]);
    return sum * (Doubles)(((Longs)shifted << 52) + (Longs)(Doubles{} + 1.0));
}

inline Doubles silu(Doubles x) { return x / (1.0 + exponential(-x)); }

// Each of the values to its silu, rounded to float32.
void silu(float* values, int64_t count) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) narrow(values + i, silu(widen(values + i)));
    if (i == count) return;
    float last[WIDTH];
    narrow(last, silu(load_double(values + i, count - i)));
    std::memcpy(values + i, last, (count - i) * sizeof(float));
}

// Of all numbers that 16 bits hold, rounded to 16 bits: a prompt asks for some many times, and float64 takes its time.
template <int64_t DTYPE>
const float* silu_of_all() {
    static const std::vector<float> all = [] {
        std::vector<uint16_t> bits(1 << 16);
        std::vector<float> values(bits.size());
        std::iota(bits.begin(), bits.end(), uint16_t{0});
        load_rows<DTYPE>(bits.data(), 0, bits.size(), values.data());
        silu(values.data(), values.size());
        for (size_t i = 0; i < values.size(); i += LANES) {
            store(values.data() + i, rounded<DTYPE>(load(values.data() + i)));
        }
        return values;
    }();
    return all.data();
}

constexpr int CHAINS = 4;  // sums that do not wait for each other

// Of the squares of x [size], which is zero up to CHAINS * WIDTH values behind them.
double sum_of_squares(const float* x, int64_t size) {
    Doubles sums[CHAINS] = {};
    for (int64_t i = 0; i < size; i += CHAINS * WIDTH) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; ++chain) {
            const Doubles v = widen(x + i + chain * WIDTH);
            sums[chain] += v * v;
        }
    }
    const Doubles sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int lane = 0; lane < WIDTH; ++lane) total += sum[lane];
    return total;
}

template <int64_t DTYPE>
void rms_norm_of(const void* x, const void* residual, const void* weight, int64_t tokens, int64_t size, double epsilon,
                 void* y, void* total) {
#pragma omp parallel if (tokens * size > SERIAL_VALUES)
    {
        std::vector<float> row(size + CHAINS * WIDTH);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t first = token * size;
            for (int64_t i = 0; i < size; i += LANES) {
                Floats v = load_part<DTYPE>(x, first + i, size - i);
                if (residual) {
                    v += load_part<DTYPE>(residual, first + i, size - i);
                    store_part<DTYPE>(total, first + i, size - i, v);
                }
                store(row.data() + i, v);
            }
            const double factor = 1 / std::sqrt(sum_of_squares(row.data(), size) / size + epsilon);
            for (int64_t i = 0; i < size; i += WIDTH) narrow(row.data() + i, widen(row.data() + i) * factor);
            for (int64_t i = 0; i < size; i += LANES) {
                const Floats gain = load_part<DTYPE>(weight, i, size - i);
                store_part<DTYPE>(y, first + i, size - i, rounded<DTYPE>(load(row.data() + i)) * gain);
            }
        }
    }
}

template <int64_t DTYPE>
void silu_and_mul_of(const void* x, int64_t tokens, int64_t size, void* out) {
    const float* const known = DTYPE == FLOAT32 ? nullptr : silu_of_all<DTYPE>();
#pragma omp parallel if (tokens * size > SERIAL_VALUES)
    {
        std::vector<float> gate(size + LANES);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t gates = 2 * token * size, ups = gates + size, first = token * size;
            if (DTYPE == FLOAT32) {
                load_rows<DTYPE>(x, gates, size, gate.data());
                silu(gate.data(), size);
            }
            for (int64_t i = 0; i < size; i += LANES) {
                const int64_t count = size - i;
                const uint16_t* bits = static_cast<const uint16_t*>(x) + gates + i;
                uint16_t some[LANES] = {};
                if (count < LANES) bits = static_cast<uint16_t*>(std::memcpy(some, bits, count * sizeof *bits));
                const Floats gated = DTYPE == FLOAT32 ? load(gate.data() + i) : look_up(known, bits);
                store_part<DTYPE>(out, first + i, count, gated * load_part<DTYPE>(x, ups + i, count));
            }
        }
    }
}

template <int64_t DTYPE>
void rotary_embedding_of(const int64_t* positions, int64_t tokens, const void* cos_sin, int64_t rotary_dim,
                         const Rows<const void*>& x, int64_t heads, int64_t head_size, void* out) {
    const int64_t half = rotary_dim / 2;
#pragma omp parallel for schedule(static) if (tokens * heads * head_size > SERIAL_VALUES)
    for (int64_t token = 0; token < tokens; ++token) {
        const int64_t angles = positions[token] * rotary_dim;
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t from = token * x.stride + head * head_size, to = (token * heads + head) * head_size;
            for (int64_t i = 0; i < half; i += LANES) {
                const int64_t count = half - i;
                const Floats cosine = load_part<DTYPE>(cos_sin, angles + i, count);
                const Floats sine = load_part<DTYPE>(cos_sin, angles + half + i, count);
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

void infoquant::rms_norm(const void* x, const void* residual, const void* weight, int64_t dtype, int64_t tokens,
                         int64_t size, double epsilon, void* y, void* total) {
    const auto norm = dtype == FLOAT32    ? rms_norm_of<FLOAT32>
                      : dtype == BFLOAT16 ? rms_norm_of<BFLOAT16>
                                          : rms_norm_of<FLOAT16>;
    norm(x, residual, weight, tokens, size, epsilon, y, total);
}

void infoquant::silu_and_mul(const void* x, int64_t dtype, int64_t tokens, int64_t size, void* out) {
    const auto gated = dtype == FLOAT32    ? silu_and_mul_of<FLOAT32>
                       : dtype == BFLOAT16 ? silu_and_mul_of<BFLOAT16>
                                           : silu_and_mul_of<FLOAT16>;
    gated(x, tokens, size, out);
}

void infoquant::rotary_embedding(const int64_t* positions, int64_t tokens, const void* cos_sin, int64_t rotary_dim,
                                 const Rows<const void*>& x, int64_t heads, int64_t head_size, void* out) {
    const auto turned = x.dtype == FLOAT32    ? rotary_embedding_of<FLOAT32>
                        : x.dtype == BFLOAT16 ? rotary_embedding_of<BFLOAT16>
                                              : rotary_embedding_of<FLOAT16>;
    turned(positions, tokens, cos_sin, rotary_dim, x, heads, head_size, out);
}
