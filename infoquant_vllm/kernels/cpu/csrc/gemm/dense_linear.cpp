// A few float32 rows times an unquantized matrix of 16-bit floats, as fast as the matrix can be read; semantics:
// kernels/reference/dense_linear.py, but for the order of sums, which is the same for any number of rows.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "rows.h"

using namespace infoquant;

namespace {

constexpr int MAX_ROWS = 8;   // at a time
constexpr int CHAINS = 2;     // sums per row, for more than one addition to be under way
constexpr int64_t AHEAD = 4096;  // bytes of the matrix to prefetch

template <int64_t DTYPE, int ROWS>
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
        const int64_t count = std::min<int64_t>(features - k, LANES);
        float last[LANES];
        load_rows(weight, DTYPE, k, count, last);
        const Floats w = load_some(last, count);
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

template <int64_t DTYPE>
constexpr Channel BY_ROWS[MAX_ROWS] = {channel<DTYPE, 1>, channel<DTYPE, 2>, channel<DTYPE, 3>, channel<DTYPE, 4>,
                                       channel<DTYPE, 5>, channel<DTYPE, 6>, channel<DTYPE, 7>, channel<DTYPE, 8>};

}  // namespace

void infoquant::dense_linear(const void* x, const uint16_t* weight, int64_t dtype, int64_t tokens, int64_t features,
                             int64_t channels, void* out) {
    std::vector<float> rows(tokens * features);
    load_rows(x, dtype, 0, tokens * features, rows.data());
    for (int64_t first = 0; first < tokens; first += MAX_ROWS) {
        const int64_t count = std::min<int64_t>(MAX_ROWS, tokens - first);
        const Channel run = (dtype == BFLOAT16 ? BY_ROWS<BFLOAT16> : BY_ROWS<FLOAT16>)[count - 1];
        const float* const from = rows.data() + first * features;
#pragma omp parallel for schedule(static)
        for (int64_t n = 0; n < channels; ++n) {
            float sums[MAX_ROWS];
            run(weight + n * features, from, features, sums);
            for (int64_t r = 0; r < count; ++r) store_rows(sums + r, (first + r) * channels + n, 1, out, dtype);
        }
    }
}
