// The exact GEMM of quantized inputs and packed weights; semantics: kernels/torch/linear.py.
//
// One 32-bit sum runs over all features of a segment: multipliers are applied as 4-bit codes are unpacked, zero-points
// there or by the sums of the inputs. VectorKernel reads weights as unsigned bytes w, inputs as signed ones x, and
//     sum (x - offset) (w - zero_point) = sum x w - zero_point sum x - offset (sum w - zero_point features)
// where sum w is the product of a row of ones; AmxKernel reads signed bytes w - zero_point. Weights lie in panels of 32
// channels (see kernels.py): a line of a panel holds four features of all its channels, so that sums run within lanes
// and never across.
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

template <typename Kernel, int WEIGHT_BITS, bool OFFSET>
void run(Problem p) {
    const int64_t fitting_rows = std::min(SCRATCH / (4 * row_words(p, Kernel::WIDTH)), RESULTS / (2 * p.channels));
    const int64_t max_rows = std::max<int64_t>(fitting_rows / Kernel::ROWS, 1) * Kernel::ROWS;
    const int64_t chunks = div_up(p.tokens, max_rows);
    constexpr bool ONES = Kernel::ONES_ROW && OFFSET;
    static thread_local Buffer<int32_t> scratch;
    static thread_local std::vector<Tile> tiles;
    const auto make = Kernel::needs_sums(p) ? make_tile<Kernel, true> : make_tile<Kernel, false>;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t start = part_begin(chunk, chunks, p.tokens, Kernel::UNIT);
        const int64_t tokens = part_begin(chunk + 1, chunks, p.tokens, Kernel::UNIT) - start;
        const int64_t count = div_up(tokens, Kernel::ROWS);
        p.sum_steps = Kernel::sum_steps(p, tokens);
        const int64_t words = row_words(p, Kernel::WIDTH);
        if (static_cast<int64_t>(tiles.size()) < count) tiles.resize(count);
        int32_t* const to = scratch.reserve((round_up(tokens, Kernel::UNIT) + ONES * count) * words);
        Tile* const made = tiles.data();
#pragma omp parallel if (tokens * p.features * p.channels >= SERIAL_WORK)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < count; i++) {
                const int64_t first = part_begin(i, count, tokens, Kernel::UNIT);
                const int64_t rows = part_begin(i + 1, count, tokens, Kernel::UNIT) - first;
                const int64_t padded = round_up(rows + ONES, Kernel::UNIT);
                made[i] = make(p, start + first, rows, ONES, padded, to + (first + ONES * i) * words);
            }
            Kernel::template multiply_panels<WEIGHT_BITS, OFFSET>(p, made, count);
        }
    }
}

template <int WEIGHT_BITS, bool OFFSET>
void run(const Problem& p) {
#ifdef __AMX_INT8__
    if (p.tokens >= AmxKernel::MIN_TOKENS) return run<AmxKernel, WEIGHT_BITS, OFFSET>(p);
#endif
    run<VectorKernel, WEIGHT_BITS, OFFSET>(p);
}

}  // namespace

void quantized_linear(const Quantized& x, const Weight& weight, const float* bias, void* out, Dtype out_dtype) {
    const int64_t middle = 1 << (weight.num_bits - 1);
    const Problem p{x.values,          x.scale, x.offset, weight.lines, weight.scale, weight.multiplier,
                    weight.zero_point, bias,    out,      out_dtype,    x.rows,       x.features,
                    weight.channels,   x.segments, weight.groups, middle};
    if (weight.num_bits == 4) return x.offset ? run<4, true>(p) : run<4, false>(p);
    return x.offset ? run<8, true>(p) : run<8, false>(p);
}

}  // namespace infoquant
