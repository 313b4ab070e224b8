// Attention over the quantized KV cache, whose codes are read straight from its pages; semantics:
// kernels/torch/kv_cache.py.
//
// q . k and weight * value are sums of integer codes, so their order is free: a row of queries has the same bits for
// any batch, chunk of a prompt, split of the context and number of threads. Floats are only summed over the 128 tokens
// of a chunk, by halves, and over the chunks, in their order.
#include <omp.h>

#include <memory>
#include <vector>

#include "attention/kv_attention_amx.h"
#include "attention/kv_attention_vector.h"
#include "kernels.h"
#include "quantize/hadamard.h"

namespace infoquant {
namespace {

using namespace attention;

constexpr int64_t TASK_ROWS = 128;  // a row is one head of one query
constexpr int MAX_ROWS = 4;         // rows that share a load of codes
constexpr int64_t SERIAL_WORK = 16;  // rows times chunks; less is done before other threads have started

// Rows first .. first + count of a sequence and a KV head, over the chunks begin .. end. Row i belongs to query
// i / queries_per_kv.
struct Task {
    int64_t sequence, kv_head, first, count, begin, end;
    float* partials;  // where the context is split: [chunks from begin, count, partial_floats]
};

void read_query(Row& row, const KvAttention& p, int64_t token, int64_t head) {
    const int64_t head_size = p.head_size(), vectors = div_up(head_size, LANES16);
    Floats16 query[kv::MAX_HEAD_SIZE / LANES16];
    std::fill_n(query, round_up(head_size, SPLIT) / LANES16, Floats16{});
    float* const values = reinterpret_cast<float*>(query);
    load_rows(p.query.data, p.query.dtype, token * p.query.stride + head * head_size, head_size, values);
    if (p.hadamard) hadamard(values, head_size, nullptr, 1);
    Floats16 greatest = splat16(TINY);
    for (int64_t i = 0; i < vectors; ++i) greatest = max(greatest, max(query[i], -query[i]));
    const float bound = hmax(greatest);
    const Floats16 factor = splat16(LEVELS / bound);
    for (int64_t i = 0; i < vectors; i += SPLIT / LANES16) {
        split_integers(query + i, factor, row.high + i * LANES16, row.low + i * LANES16);
    }
    Ints16 total = splat16(0);
    for (int64_t i = 0; i < vectors; ++i) total += round_to_int(query[i] * factor);
    int32_t query_sum = 0;
    for (int i = 0; i < LANES16; ++i) query_sum += total[i];
    row.query_sum = static_cast<float>(query_sum);
    row.factor = bound / LEVELS * p.scale;
    row.soft_cap = p.soft_cap;
}

void read_chunk(Chunk& chunk, const KvAttention& p, const Task& task, int64_t first_token) {
    const int64_t length = p.seq_lens[task.sequence], block_size = p.pages.block_size;
    const int32_t* const blocks = p.block_table + task.sequence * p.table_stride;
    for (int t = 0; t < TILES; ++t) {
        const int64_t token = first_token + t * kv::TOKENS;
        // Tiles beyond the sequence repeat its last one: they are computed and then masked.
        const int64_t read = std::min(token, (length - 1) / kv::TOKENS * kv::TOKENS);
        chunk.tiles[t] = p.pages.tile(blocks[read / block_size], task.kv_head, read % block_size);
        const int64_t count = std::clamp<int64_t>(length - token, 0, kv::TOKENS);
        const auto mask = lane_index16() < splat16(static_cast<int32_t>(count));
        const uint8_t* const qparams = chunk.tiles[t] + p.pages.layout.qparams();
        for (int i = 0; i < 4; ++i) {
            const Floats16 values = from_float16(load<Halves16>(qparams + 2 * kv::TOKENS * i));
            chunk.qparams[i][t] = mask ? values : splat16(0.0f);
        }
    }
}

// Rows go to the widest kernel first: which one computes a row does not change its bits.
template <int KEY_BITS, int VALUE_BITS>
void attend_all(Row* rows, int64_t count, const Chunk& chunk, int64_t first_token, kv::Layout layout) {
#ifdef __AMX_INT8__
    if (count >= AMX_ROWS && layout.head_size <= AMX_MAX_HEAD_SIZE) {
        static thread_local Codes codes;
        const TileRange seen(rows, count, first_token);
        unpack<KEY_BITS, VALUE_BITS>(codes, chunk, seen.first, seen.last, layout);
        const amx::TileConfig config;
        for (; count >= AMX_ROWS; rows += AMX_ROWS, count -= AMX_ROWS) {
            attend_amx(rows, chunk, codes, first_token, layout.head_size);
        }
    }
#endif
    for (; count >= MAX_ROWS; rows += MAX_ROWS, count -= MAX_ROWS) {
        attend<MAX_ROWS, KEY_BITS, VALUE_BITS>(rows, chunk, first_token, layout);
    }
    if (count == 3) attend<3, KEY_BITS, VALUE_BITS>(rows, chunk, first_token, layout);
    if (count == 2) attend<2, KEY_BITS, VALUE_BITS>(rows, chunk, first_token, layout);
    if (count == 1) attend<1, KEY_BITS, VALUE_BITS>(rows, chunk, first_token, layout);
}

using Attend = void (*)(Row*, int64_t, const Chunk&, int64_t, kv::Layout);

Attend attend_with(kv::Layout layout) {
    if (layout.key_bits == 4) return layout.value_bits == 4 ? attend_all<4, 4> : attend_all<4, 8>;
    return layout.value_bits == 4 ? attend_all<8, 4> : attend_all<8, 8>;
}

// A partial result: a row's sums over one chunk, where the context is split (split-K).
int64_t partial_floats(int64_t head_size) { return 3 + 2 * half_width(head_size); }

void save(float* partial, const Row& row, int64_t width) {
    partial[0] = row.exponent, partial[1] = row.sum, partial[2] = row.zero;
    std::copy(row.values, row.values + width, partial + 3);
}

// Does what `update_sums` and `add_values` do with a chunk that is not split off, so that splitting does not change the
// result: the factors are powers of two, and exact.
void merge(Row& row, const float* partial, int64_t width) {
    const float before = row.exponent;
    row.exponent = std::max(before, partial[0]);
    const float old = exp2_integer(before - row.exponent), now = exp2_integer(partial[0] - row.exponent);
    row.sum = row.sum * old + partial[1] * now;
    row.zero = row.zero * old + partial[2] * now;
    for (int64_t i = 0; i < width; i += LANES16) {
        store(row.values + i, load<Floats16>(row.values + i) * old + load<Floats16>(partial + 3 + i) * now);
    }
}

struct QueryIndex {
    int64_t token, head;
};

QueryIndex query_index(const KvAttention& p, const Task& task, int64_t row) {
    const int64_t index = task.first + row, group = p.queries_per_kv();
    return {p.query_starts[task.sequence] + index / group, task.kv_head * group + index % group};
}

void finish(Row& row, const KvAttention& p, QueryIndex at) {
    const int64_t half = p.head_size() / 2, padded = half_width(p.head_size());
    for (int64_t i = 0; i < 2 * padded; i += LANES16) {
        store(row.values + i, (load<Floats16>(row.values + i) + row.zero) / row.sum);
    }
    if (padded != half) std::copy(row.values + padded, row.values + padded + half, row.values + half);
    const int64_t first = at.token * p.out.stride + at.head * p.head_size();
    store_rows(row.values, first, p.head_size(), p.out.data, p.out.dtype);
}

void run(const KvAttention& p, const Task& task) {
    Row rows[TASK_ROWS];
    const int64_t width = 2 * half_width(p.head_size());
    const int64_t queries = p.query_starts[task.sequence + 1] - p.query_starts[task.sequence];
    for (int64_t r = 0; r < task.count; ++r) {
        const QueryIndex at = query_index(p, task, r);
        read_query(rows[r], p, at.token, at.head);
        rows[r].last_seen = p.seq_lens[task.sequence] - queries + (task.first + r) / p.queries_per_kv();
        rows[r].first_seen = p.first_seen(rows[r].last_seen);
        start(rows[r], width);
    }
    const Attend attend = attend_with(p.pages.layout);
    Chunk chunk;
    for (int64_t c = task.begin; c < task.end; ++c) {
        read_chunk(chunk, p, task, c * CHUNK);
        attend(rows, task.count, chunk, c * CHUNK, p.pages.layout);
        for (int64_t r = 0; task.partials && r < task.count; ++r) {
            save(task.partials + ((c - task.begin) * task.count + r) * partial_floats(p.head_size()), rows[r], width);
            start(rows[r], width);
        }
    }
    for (int64_t r = 0; !task.partials && r < task.count; ++r) finish(rows[r], p, query_index(p, task, r));
}

// Merges the partial results of row r of a task, in the order of the chunks.
void combine(const KvAttention& p, const Task& whole, int64_t r) {
    Row row;
    const int64_t width = 2 * half_width(p.head_size());
    start(row, width);
    for (int64_t c = 0; c < whole.end - whole.begin; ++c) {
        merge(row, whole.partials + (c * whole.count + r) * partial_floats(p.head_size()), width);
    }
    finish(row, p, query_index(p, whole, r));
}

// The longest tasks come first, so that the threads finish together.
std::vector<Task> whole_tasks(const KvAttention& p) {
    std::vector<Task> tasks;
    for (int64_t s = 0; s < p.sequences; ++s) {
        const int64_t queries = p.query_starts[s + 1] - p.query_starts[s], rows = queries * p.queries_per_kv();
        const int64_t before = p.seq_lens[s] - queries;
        for (int64_t first = (rows - 1) / TASK_ROWS * TASK_ROWS; rows && first >= 0; first -= TASK_ROWS) {
            const int64_t count = std::min(TASK_ROWS, rows - first);
            const int64_t begin = p.first_seen(before + first / p.queries_per_kv()) / CHUNK;
            const int64_t end = (before + (first + count - 1) / p.queries_per_kv()) / CHUNK + 1;
            for (int64_t head = 0; head < p.kv_heads; ++head) {
                tasks.push_back({s, head, first, count, begin, end, nullptr});
            }
        }
    }
    return tasks;
}

// Splits tasks into ranges of chunks, whose results go to `partials`.
std::vector<Task> split(std::vector<Task>& whole, int64_t chunks_each, const KvAttention& p,
                        std::unique_ptr<float[]>& partials) {
    const int64_t floats = partial_floats(p.head_size());
    int64_t needed = 0;
    for (const Task& task : whole) needed += (task.end - task.begin) * task.count * floats;
    partials.reset(new float[needed]);
    float* next = partials.get();
    std::vector<Task> tasks;
    for (Task& task : whole) {
        task.partials = next;
        for (int64_t begin = task.begin; begin < task.end; begin += chunks_each) {
            Task piece = task;
            piece.begin = begin, piece.end = std::min(begin + chunks_each, task.end), piece.partials = next;
            next += (piece.end - piece.begin) * task.count * floats;
            tasks.push_back(piece);
        }
    }
    return tasks;
}

// Chunks per piece so that every thread has a few pieces, or 0 where whole tasks keep the threads busy.
int64_t chunks_per_piece(const std::vector<Task>& tasks, int64_t threads) {
    int64_t chunks = 0, longest = 0;
    for (const Task& task : tasks) {
        chunks += task.end - task.begin;
        longest = std::max(longest, task.end - task.begin);
    }
    const int64_t fair = std::max<int64_t>(2, chunks / (4 * threads));
    return threads == 1 || static_cast<int64_t>(tasks.size()) >= 4 * threads || longest <= fair ? 0 : fair;
}

}  // namespace

void kv_attention(const KvAttention& p) {
    std::vector<Task> whole = whole_tasks(p);
    int64_t work = 0;
    for (const Task& task : whole) work += task.count * (task.end - task.begin);
    const int64_t threads = work < SERIAL_WORK ? 1 : omp_get_max_threads();
    const int64_t chunks_each = chunks_per_piece(whole, threads);
    std::unique_ptr<float[]> partials;
    const std::vector<Task> pieces = chunks_each ? split(whole, chunks_each, p, partials) : std::vector<Task>();
    const std::vector<Task>& tasks = chunks_each ? pieces : whole;
#pragma omp parallel for schedule(dynamic, 1) if (threads > 1)
    for (size_t i = 0; i < tasks.size(); ++i) run(p, tasks[i]);
    if (!chunks_each) return;
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < whole.size(); ++i) {
        for (int64_t r = 0; r < whole[i].count; ++r) combine(p, whole[i], r);
    }
}

}  // namespace infoquant
