// Rows times an unquantized matrix of 16-bit floats, at the speed at which the matrix can be read; semantics:
// kernels/torch/dense.py. The order of sums is this file's own, and the same for any number of rows.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace infoquant {
namespace {

constexpr int MAX_ROWS = 8;      // rows that share a load of the matrix
constexpr int CHAINS = 2;        // independent sums per row hide the latency of an addition
constexpr int64_t AHEAD = 4096;  // bytes of the matrix to prefetch

template <Dtype DTYPE, int ROWS>
void channel(const uint16_t* weight, const float* x, int64_t features, float* out) {
    Floats sums[ROWS][CHAINS] = {};
    int64_t k = 0;
    for (; k + CHAINS * LANES <= features; k += CHAINS * LANES) {
        __builtin_prefetch(reinterpret_cast<const char*>(weight + k) + AHEAD);
#pragma GCC unroll 2
        for (int c = 0; c < CHAINS; ++c) {
            const Floats w = load_as<DTYPE>(weight + k + c * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) sums[r][c] = fma(w, load(x + r * features + k + c * LANES), sums[r][c]);
        }
    }
    for (; k < features; k += LANES) {
        const int64_t count = features - k;
        const Floats w = load_part<DTYPE>(weight, k, count);
        for (int r = 0; r < ROWS; ++r) sums[r][0] = fma(w, load_some(x + r * features + k, count), sums[r][0]);
    }
    for (int r = 0; r < ROWS; ++r) {
        const Floats sum = sums[r][0] + sums[r][1];
        float total = 0;
        for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
        out[r] = total;
    }
}

using Channel = void (*)(const uint16_t*, const float*, int64_t, float*);

template <Dtype DTYPE>
constexpr Channel BY_ROWS[MAX_ROWS] = {channel<DTYPE, 1>, channel<DTYPE, 2>, channel<DTYPE, 3>, channel<DTYPE, 4>,
                                       channel<DTYPE, 5>, channel<DTYPE, 6>, channel<DTYPE, 7>, channel<DTYPE, 8>};

}  // namespace

void dense_linear(const DenseLinear& p) {
    std::vector<float> rows(p.tokens * p.features);
    load_rows(p.x, p.dtype, 0, p.tokens * p.features, rows.data());
    for (int64_t first = 0; first < p.tokens; first += MAX_ROWS) {
        const int64_t count = std::min<int64_t>(MAX_ROWS, p.tokens - first);
        const Channel run = (p.dtype == BFLOAT16 ? BY_ROWS<BFLOAT16> : BY_ROWS<FLOAT16>)[count - 1];
        const float* const from = rows.data() + first * p.features;
#pragma omp parallel for schedule(static)
        for (int64_t n = 0; n < p.channels; ++n) {
            float sums[MAX_ROWS];
            run(p.weight + n * p.features, from, p.features, sums);
            for (int64_t r = 0; r < count; ++r) store_rows(sums + r, (first + r) * p.channels + n, 1, p.out, p.dtype);
        }
    }
}

}  // namespace infoquant
