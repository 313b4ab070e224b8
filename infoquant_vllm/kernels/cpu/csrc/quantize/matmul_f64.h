// Matrix products of the input transforms. Sums are in float64, where products of float32 are exact, and rounded to
// float32 once.
#pragma once

#include "simd/simd.h"

namespace infoquant {

// A matrix of float32 values held as doubles: element (row, k) is at row * row_stride + k * k_stride.
struct Left {
    const double* data;
    int64_t row_stride, k_stride;
};

// out [rows, columns] = left [rows, size] @ right [size, columns], for ROWS rows and VECTORS vectors of columns.
template <int ROWS, int VECTORS>
inline void matmul_tile(Left left, const float* right, int64_t right_stride, int64_t size, float* out,
                         int64_t out_stride) {
    Doubles sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < size; ++k) {
        Doubles values[VECTORS];
        for (int v = 0; v < VECTORS; ++v) values[v] = widen(right + k * right_stride + v * DOUBLE_LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const Doubles factor = splat(left.data[r * left.row_stride + k * left.k_stride]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(factor, values[v], sums[r][v]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) narrow(out + r * out_stride + v * DOUBLE_LANES, sums[r][v]);
    }
}

// The same for ROWS rows and all columns, from the widest tiles to single columns.
template <int ROWS, int VECTORS>
inline void matmul_rows(Left left, const float* right, int64_t columns, int64_t size, float* out, int64_t out_stride) {
    int64_t c = 0;
    for (; c + VECTORS * DOUBLE_LANES <= columns; c += VECTORS * DOUBLE_LANES) {
        matmul_tile<ROWS, VECTORS>(left, right + c, columns, size, out + c, out_stride);
    }
    for (; c + DOUBLE_LANES <= columns; c += DOUBLE_LANES) {
        matmul_tile<ROWS, 1>(left, right + c, columns, size, out + c, out_stride);
    }
    for (; c < columns; ++c) {
        for (int r = 0; r < ROWS; ++r) {
            double sum = 0;
            for (int64_t k = 0; k < size; ++k) {
                sum += left.data[r * left.row_stride + k * left.k_stride] * right[k * columns + c];
            }
            out[r * out_stride + c] = static_cast<float>(sum);
        }
    }
}

// out [rows, columns] = left [rows, size] @ right [size, columns], where out's rows are out_stride apart.
inline void matmul_f64(Left left, const float* right, int64_t rows, int64_t columns, int64_t size, float* out,
                       int64_t out_stride) {
    constexpr int VECTORS = LANES == 16 ? 4 : 2;  // with six rows, as many sums as fit in the registers
    int64_t r = 0;
    const auto remaining = [&] { return Left{left.data + r * left.row_stride, left.row_stride, left.k_stride}; };
    for (; r + 6 <= rows; r += 6) {
        matmul_rows<6, VECTORS>(remaining(), right, columns, size, out + r * out_stride, out_stride);
    }
    for (; r + 2 <= rows; r += 2) {
        matmul_rows<2, VECTORS>(remaining(), right, columns, size, out + r * out_stride, out_stride);
    }
    for (; r < rows; ++r) {
        matmul_rows<1, 2 * VECTORS>(remaining(), right, columns, size, out + r * out_stride, out_stride);
    }
}

}  // namespace infoquant
