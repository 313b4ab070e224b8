// The exact GEMM of quantized inputs and packed weights; semantics: kernels/torch/linear.py.
//
// Weights are read as unsigned codes w (signed ones come with 8 or 128 added), inputs as signed bytes x: a 4-bit code
// minus its zero-point z, or an 8-bit code minus 128, which leaves the zero-point offset r = z - 128. Within a group
//     sum (code - z) (w - zero_point) = sum x w - r sum w - zero_point sum (code - z)
// in 32-bit integers. Weights lie in panels of 32 channels (see quantized_linear.py): a line of a panel holds four
// features of all its channels, so that sums run within lanes and never across.
#include <omp.h>

#include "gemm/gemm_amx.h"
#include "gemm/gemm_vector.h"

namespace infoquant {
namespace {

using namespace gemm;

constexpr int64_t SCRATCH = 3 << 19;      // bytes of inputs at a time, so that they stay in the L2 cache
constexpr int64_t RESULTS = 4 << 20;      // bytes of outputs at a time
constexpr int64_t SERIAL_WORK = 1 << 19;  // multiplications; fewer are done before other threads have started

// The beginning of part i of `parts` parts of `count`, a multiple of `unit`. Parts are even: 16 rows are 8 and 8.
int64_t part_begin(int64_t i, int64_t parts, int64_t count, int64_t unit) {
    return std::min(count, round_up(i * count / parts, unit));
}

template <typename Kernel, int WEIGHT_BITS, int BITS>
void run(const Problem& p) {
    const int64_t words = row_words(p, Kernel::WIDTH);
    const int64_t fitting_rows = std::min(SCRATCH / (4 * words), RESULTS / (2 * p.channels));
    const int64_t max_rows = std::max<int64_t>(fitting_rows / Kernel::ROWS, 1) * Kernel::ROWS;
    const int64_t chunks = div_up(p.tokens, max_rows);
    static thread_local Buffer<int32_t> scratch;
    static thread_local std::vector<Tile> tiles;
    const auto make =
        Kernel::template needs_sums<BITS>(p) ? make_tile<BITS, Kernel, true> : make_tile<BITS, Kernel, false>;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t start = part_begin(chunk, chunks, p.tokens, Kernel::UNIT);
        const int64_t tokens = part_begin(chunk + 1, chunks, p.tokens, Kernel::UNIT) - start;
        const int64_t count = div_up(tokens, Kernel::ROWS);
        if (static_cast<int64_t>(tiles.size()) < count) tiles.resize(count);
        int32_t* const to = scratch.reserve(round_up(tokens, Kernel::UNIT) * words);
        Tile* const made = tiles.data();
#pragma omp parallel if (tokens * p.features * p.channels >= SERIAL_WORK)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) {
                const int64_t first = part_begin(i, count, tokens, Kernel::UNIT);
                const int64_t rows = part_begin(i + 1, count, tokens, Kernel::UNIT) - first;
                made[i] = make(p, start + first, rows, round_up(rows, Kernel::UNIT), to + first * words);
            }
            Kernel::template multiply_panels<WEIGHT_BITS, BITS>(p, made, count);
        }
    }
}

template <int WEIGHT_BITS, int BITS>
void run(const Problem& p) {
#ifdef __AMX_INT8__
    if (p.tokens >= AmxKernel::MIN_TOKENS) return run<AmxKernel, WEIGHT_BITS, BITS>(p);
#endif
    run<VectorKernel, WEIGHT_BITS, BITS>(p);
}

}  // namespace

void quantized_linear(const Quantized& x, const Weight& weight, const float* bias, void* out, Dtype out_dtype) {
    const int64_t offset = 1 << (weight.num_bits - 1);
    const Problem p{x.codes,   x.scale,    x.zero_point,    weight.lines, weight.scale,  weight.zero_point, bias, out,
                    out_dtype, x.tokens,   x.features,      weight.channels, x.groups, weight.groups, offset};
    if (weight.num_bits == 4) return x.num_bits == 4 ? run<4, 4>(p) : run<4, 8>(p);
    return x.num_bits == 4 ? run<8, 4>(p) : run<8, 8>(p);
}

}  // namespace infoquant
