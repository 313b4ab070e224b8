// Rows times R1, the residual rotation: as kernels/torch/dense.py, but summed in float32 in the order of the features.
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "buffer.h"
#include "kernels.h"

namespace infoquant {
namespace {

constexpr int MAX_ROWS = 6, VECTORS = LANES == 16 ? 4 : 2;  // as many sums as fit in the registers
constexpr int64_t STRIP = VECTORS * LANES;    // columns of a tile
constexpr int64_t DEPTH = 64;                 // features at a time, whose part of a strip stays in L1
constexpr int64_t CHUNK = 512;                // rows at a time; bounds the memory of their sums
constexpr int64_t MIN_COPY_ROWS = 2 * MAX_ROWS + 1;  // with fewer, copying a strip costs more than it saves
constexpr int64_t SERIAL_WORK = 1 << 16;      // products; fewer are done before other threads have started

// sums [ROWS, STRIP] += x [ROWS, depth] @ panel [depth, STRIP], feature by feature, each product and sum rounded.
template <int ROWS>
void add_products(const float* x, int64_t x_stride, const float* panel, int64_t panel_stride, int64_t depth,
                  float* sums, int64_t sums_stride) {
    Floats totals[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) totals[r][v] = load(sums + r * sums_stride + v * LANES);
    }
    for (int64_t k = 0; k < depth; ++k) {
        const float* const line = panel + k * panel_stride;
        Floats values[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            __builtin_prefetch(line + STRIP + v * LANES);  // the next strip, which the hardware does not prefetch
            values[v] = load(line + v * LANES);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const Floats factor = splat(x[r * x_stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) totals[r][v] += factor * values[v];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) store(sums + r * sums_stride + v * LANES, totals[r][v]);
    }
}

using AddProducts = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
constexpr AddProducts BY_ROWS[MAX_ROWS] = {add_products<1>, add_products<2>, add_products<3>,
                                           add_products<4>, add_products<5>, add_products<6>};

// panel [depth, STRIP] from `count` columns of the rotation, padded with zeros.
void copy_panel(const float* from, int64_t stride, int64_t depth, int64_t count, float* panel) {
    for (int64_t k = 0; k < depth; ++k) {
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t left = std::max<int64_t>(count - v * LANES, 0);
            store(panel + k * STRIP + v * LANES, load_some(from + k * stride + v * LANES, left));
        }
    }
}

// sums [rows, round_up(columns, STRIP)] = x [rows, size] @ the rotation's `columns` columns at `rotation`.
void multiply(const float* x, int64_t rows, int64_t size, const float* rotation, int64_t columns, float* sums) {
    alignas(64) float panel[DEPTH * STRIP];
    const int64_t width = round_up(columns, STRIP);
    std::fill_n(sums, rows * width, 0.0f);
    for (int64_t k = 0; k < size; k += DEPTH) {
        const int64_t depth = std::min(DEPTH, size - k);
        for (int64_t c = 0; c < columns; c += STRIP) {
            const float* strip = rotation + k * size + c;
            int64_t stride = size;
            if (rows >= MIN_COPY_ROWS || c + STRIP > columns) {
                copy_panel(strip, size, depth, std::min(STRIP, columns - c), panel);
                strip = panel, stride = STRIP;
            }
            for (int64_t r = 0; r < rows; r += MAX_ROWS) {
                const int64_t count = std::min<int64_t>(MAX_ROWS, rows - r);
                BY_ROWS[count - 1](x + r * size + k, size, strip, stride, depth, sums + r * width + c, width);
            }
        }
    }
}

// y [size] = sums * gain where that is given, to elements first .. first + count of out.
void store_sums(float* sums, const float* gain, int64_t first, int64_t count, void* out, Dtype dtype) {
    for (int64_t i = 0; gain != nullptr && i < count; ++i) sums[i] *= gain[i];
    store_rows(sums, first, count, out, dtype);
}

}  // namespace

void rotate_rows(const RotateRows& p) {
    static thread_local Buffer<float> floats;
    const int64_t size = p.size;
    for (int64_t first = 0; first < p.tokens; first += CHUNK) {
        const int64_t rows = std::min(CHUNK, p.tokens - first);
        float* const x = floats.reserve(rows * size);
        const int64_t threads = rows * size * size > SERIAL_WORK ? omp_get_max_threads() : 1;
        const int64_t columns_each = round_up(div_up(size, threads), LANES);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; ++r) load_rows(p.x, p.dtype, (first + r) * size, size, x + r * size);
            thread_local Buffer<float> buffer;
#pragma omp for schedule(static)
            for (int64_t column = 0; column < size; column += columns_each) {
                const int64_t count = std::min(columns_each, size - column), width = round_up(count, STRIP);
                float* const sums = buffer.reserve(rows * width);
                multiply(x, rows, size, p.rotation + column, count, sums);
                const float* const gain = p.gain ? p.gain + column : nullptr;
                for (int64_t r = 0; r < rows; ++r) {
                    store_sums(sums + r * width, gain, (first + r) * size + column, count, p.out, p.dtype);
                }
            }
        }
    }
}

}  // namespace infoquant
