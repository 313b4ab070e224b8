// The Hadamard transform of infoquant_vllm/format/hadamard.py with the roundings of `apply_hadamard`: butterflies, then
// the base matrix H_m (size = m * 2^k), summed from left to right, then 1 / sqrt(size).
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "buffer.h"
#include "simd/simd.h"

namespace infoquant {

constexpr int MAX_RADIX = LANES;  // vectors that fit in the registers, with some to spare

// Replaces lanes a and b that are H apart by a + b and a - b. Products with +-1 are exact, so the fused operation
// rounds as the sum does.
template <int H, int... LANE>
inline Floats butterfly(Floats x, std::integer_sequence<int, LANE...>) {
    const Floats signs = {(LANE & H ? -1.0f : 1.0f)...};
    return fma(x, signs, __builtin_shuffle(x, Ints{(LANE ^ H)...}));
}

inline Floats butterflies_of_lanes(Floats x) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    x = butterfly<1>(x, lanes);
    x = butterfly<2>(x, lanes);
    x = butterfly<4>(x, lanes);
#ifdef __AVX512F__
    x = butterfly<8>(x, lanes);
#endif
    return x;
}

// log2(RADIX) butterfly steps over RADIX vectors that are h apart, the first one at x. FIRST: the steps within a
// vector come before them. LAST: the result is multiplied by scale.
template <int RADIX, bool FIRST, bool LAST>
inline void butterflies_of_vectors(float* x, int64_t h, float scale) {
    Floats v[RADIX];
#pragma GCC unroll 16
    for (int k = 0; k < RADIX; ++k) {
        v[k] = load(x + k * h);
        if (FIRST) v[k] = butterflies_of_lanes(v[k]);
    }
#pragma GCC unroll 4
    for (int step = 1; step < RADIX; step *= 2) {
#pragma GCC unroll 16
        for (int k = 0; k < RADIX; ++k) {
            if (k & step) continue;
            const Floats a = v[k], b = v[k + step];
            v[k] = a + b;
            v[k + step] = a - b;
        }
    }
#pragma GCC unroll 16
    for (int k = 0; k < RADIX; ++k) store(x + k * h, LAST ? v[k] * scale : v[k]);
}

// The butterfly steps h, 2 h, ..., RADIX / 2 * h over x [size].
template <int RADIX, bool FIRST, bool LAST>
inline void steps(float* x, int64_t size, int64_t h, float scale) {
    for (int64_t block = 0; block < size; block += RADIX * h) {
        for (int64_t i = 0; i < h; i += LANES) butterflies_of_vectors<RADIX, FIRST, LAST>(x + block + i, h, scale);
    }
}

template <bool FIRST, bool LAST>
inline void steps(float* x, int64_t size, int64_t h, int64_t radix, float scale) {
    switch (radix) {
        case 1: return steps<1, FIRST, LAST>(x, size, h, scale);
        case 2: return steps<2, FIRST, LAST>(x, size, h, scale);
        case 4: return steps<4, FIRST, LAST>(x, size, h, scale);
        case 8: return steps<8, FIRST, LAST>(x, size, h, scale);
        default: return steps<MAX_RADIX, FIRST, LAST>(x, size, h, scale);
    }
}

// Butterflies over runs of n, a power of two, in x [size]; then multiplies by scale.
inline void butterflies(float* x, int64_t size, int64_t n, float scale) {
    if (n < LANES) {
        for (int64_t h = 1; h < n; h *= 2) {
            for (int64_t i = 0; i < size; ++i) {
                if (i & h) continue;  // n divides size, so bits of i are bits of the index in a run
                const float a = x[i], b = x[i + h];
                x[i] = a + b;
                x[i + h] = a - b;
            }
        }
        for (int64_t i = 0; i < size; ++i) x[i] *= scale;
        return;
    }
    int64_t radix = std::min<int64_t>(n / LANES, MAX_RADIX), h = radix * LANES;
    if (h == n) return steps<true, true>(x, size, LANES, radix, scale);
    steps<true, false>(x, size, LANES, radix, scale);
    for (; h < n; h *= radix) {
        radix = std::min<int64_t>(n / h, MAX_RADIX);
        if (h * radix == n) return steps<false, true>(x, size, h, radix, scale);
        steps<false, false>(x, size, h, radix, scale);
    }
}

// Rows j .. j + ROWS of the base matrix times columns [m, VECTORS], times scale.
template <int ROWS, int VECTORS, bool UNIT>
inline void base_rows(Floats* out, const Floats* columns, const float* base, int64_t m, int64_t j, float scale) {
    Floats sums[ROWS][VECTORS] = {};
    for (int64_t i = 0; i < m; ++i) {
#pragma GCC unroll 12
        for (int k = 0; k < ROWS; ++k) {
            const Floats weight = splat(base[i * m + j + k]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) {
                const Floats x = columns[i * VECTORS + v];
                sums[k][v] = UNIT ? fma(x, weight, sums[k][v]) : sums[k][v] + x * weight;
            }
        }
    }
#pragma GCC unroll 12
    for (int k = 0; k < ROWS; ++k) {
        for (int v = 0; v < VECTORS; ++v) out[(j + k) * VECTORS + v] = sums[k][v] * scale;
    }
}

// y[j] = sum over i of x[i] * base[i, j] for `width` columns of x [m, n] in place, then times scale.
template <int VECTORS, bool UNIT>
inline void base_columns(float* x, int64_t n, int64_t width, const float* base, int64_t m, float scale) {
    static thread_local Buffer<Floats> kept;
    Floats *const columns = kept.reserve(2 * m * VECTORS), *const out = columns + m * VECTORS;
    for (int64_t i = 0; i < m; ++i) {
        for (int v = 0; v < VECTORS; ++v) {
            columns[i * VECTORS + v] = load_some(x + i * n + v * LANES, width - v * LANES);
        }
    }
    int64_t j = 0;
    for (; j + 12 <= m; j += 12) base_rows<12, VECTORS, UNIT>(out, columns, base, m, j, scale);
    for (; j + 4 <= m; j += 4) base_rows<4, VECTORS, UNIT>(out, columns, base, m, j, scale);
    for (; j < m; ++j) base_rows<1, VECTORS, UNIT>(out, columns, base, m, j, scale);
    for (int64_t i = 0; i < m; ++i) {
        for (int v = 0; v < VECTORS; ++v) store_some(x + i * n + v * LANES, out[i * VECTORS + v], width - v * LANES);
    }
}

// The base matrix times x [m, n] in place, times scale. UNIT: the entries are +-1, so products are exact and the
// fused operation rounds as the sum does.
template <bool UNIT>
inline void apply_base(float* x, int64_t n, const float* base, int64_t m, float scale) {
    constexpr int VECTORS = LANES == 16 ? 2 : 1;  // with twelve rows, as many sums as fit in the registers
    int64_t c = 0;
    for (; c + VECTORS * LANES <= n; c += VECTORS * LANES) {
        base_columns<VECTORS, UNIT>(x + c, n, VECTORS * LANES, base, m, scale);
    }
    for (; c < n; c += LANES) {
        base_columns<1, UNIT>(x + c, n, std::min<int64_t>(n - c, LANES), base, m, scale);
    }
}

// x [size] times the Hadamard matrix of its size, in place; base [m, m] is `hadamard_dense(size)`.
inline void hadamard(float* x, int64_t size, const float* base, int64_t m) {
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
    butterflies(x, size, size / m, m == 1 ? scale : 1.0f);
    if (m == 1) return;
    // Paley's matrices have an even order and entries +-1; those of Hartley have an odd order.
    if (m % 2 == 0) return apply_base<true>(x, size / m, base, m, scale);
    apply_base<false>(x, size / m, base, m, scale);
}

}  // namespace infoquant
