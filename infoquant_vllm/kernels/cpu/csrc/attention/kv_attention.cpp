// Attention over the quantized KV cache, codes straight from its pages; semantics: kernels/reference/kv_cache.py.
//
// Both products are sums of whole numbers, so their order is free: a row of queries comes out the same whatever the
// batch, the chunk of a prompt, the split of the context and the number of threads are. Floats are only summed over
// the 128 tokens of a chunk, by halves, and over the chunks, in their order.
#include <omp.h>

#include <memory>
#include <vector>

#include "kernels.h"
#include "attention/kv_attention_amx.h"
#include "attention/kv_rows.h"

namespace {

using namespace attention;

constexpr int ROWS = 128;  // rows of a task: heads of a kv-head, times queries
constexpr int GROUP = 4;  // rows that share a load of codes

struct Problem {
    const char* query;
    char* out;
    int64_t query_dtype, out_dtype, query_stride, out_stride;
    kv::Pages pages;
    const int32_t *query_starts, *seq_lens, *block_table;
    int64_t sequences, table_stride, heads, kv_heads, head_size;
    bool rotate;
    float scale;  // of the scores, times log2(e)
    int64_t window;

    int64_t share() const { return heads / kv_heads; }
    int64_t first_seen(int64_t last) const { return window ? std::max<int64_t>(0, last - window + 1) : 0; }
};

// Rows first .. first + count of a sequence and a kv-head, over the chunks begin .. end. Row i is the query i / share.
struct Task {
    int64_t sequence, kv_head, first, count, begin, end;
    float* parts;  // where the context is split: [chunks from begin, count, Row::SAVED + width]
};

void read_query(Row& row, const Problem& p, int64_t token, int64_t head) {
    Floats query[kv::MAX_HEAD_SIZE / LANES];
    std::fill_n(query, infoquant::round_up(p.head_size, SPLIT) / LANES, Floats{});
    float* const numbers = reinterpret_cast<float*>(query);
    const int64_t place = token * p.query_stride + head * p.head_size;
    load_row(numbers, p.query + place * element_bytes(p.query_dtype), p.head_size, p.query_dtype);
    if (p.rotate) infoquant::hadamard(numbers, p.head_size, nullptr, 1);
    Floats greatest = all(TINY);
    const int64_t used = (p.head_size + LANES - 1) / LANES;
    for (int64_t i = 0; i < used; ++i) greatest = larger(greatest, larger(query[i], -query[i]));
    const float bound = largest(greatest);
    Ints total = all(0);
    for (int64_t i = 0; i < used; i += SPLIT / LANES) {
        split_integers(query + i, all(LEVELS / bound), row.high + i * LANES, row.low + i * LANES);
    }
    for (int64_t i = 0; i < used; ++i) total += nearest_integers(query[i] * all(LEVELS / bound));
    int32_t query_sum = 0;
    for (int i = 0; i < LANES; ++i) query_sum += total[i];
    row.query_sum = (float)query_sum;
    row.factor = bound / LEVELS * p.scale;
}

void read_chunk(Chunk& chunk, const Problem& p, const Task& task, int64_t first_token) {
    const int64_t length = p.seq_lens[task.sequence];
    const int32_t* blocks = p.block_table + task.sequence * p.table_stride;
    for (int t = 0; t < TILES; ++t) {
        const int64_t token = first_token + t * kv::TOKENS;
        // Tiles beyond the sequence repeat its last one: nothing looks at what is computed from them.
        const int64_t read = std::min(token, (length - 1) / kv::TOKENS * kv::TOKENS);
        const int64_t size = p.pages.block_size;
        chunk.tiles[t] = p.pages.tile(blocks[read / size], task.kv_head, read % size);
        const auto there = lane_index() < all((int32_t)std::clamp<int64_t>(length - token, 0, kv::TOKENS));
        const uint8_t* halves = chunk.tiles[t] + p.pages.layout.parameters();
        for (int part = 0; part < 4; ++part) {
            const Floats values = from_halves(load<Halves>(halves + 2 * kv::TOKENS * part));
            chunk.parameters[part][t] = there ? values : all(0.0f);
        }
    }
}

inline Ints broadcast(const int8_t* four) { return all(load<int32_t>(four)); }

// products[row][tile]: whole numbers q . code of the tiles from first to last, two at a time.
template <int R, int BITS>
void score(const Row* rows, const Chunk& chunk, int first, int last, int64_t head_size, Floats products[R][TILES]) {
    const int64_t key_bytes = head_size * kv::TOKENS * BITS / 8;
    for (int t = first & ~1; t <= last; t += 2) {
        Ints high[R][2] = {}, low[R][2] = {};
        const uint8_t *left = chunk.tiles[t], *right = chunk.tiles[t + 1];
        constexpr int64_t STEP = BITS == 4 ? 64 : 128;  // bytes of eight features
        for (int64_t i = 0; i < head_size; i += 8, left += STEP, right += STEP) {
            const kv::Pair a = kv::load_pair<BITS>(left, 64), b = kv::load_pair<BITS>(right, 64);
            __builtin_prefetch(left + key_bytes);  // the values
            __builtin_prefetch(right + key_bytes);
            for (int r = 0; r < R; ++r) {
                const Ints h = broadcast(rows[r].high + i), l = broadcast(rows[r].low + i);
                high[r][0] = dot4(high[r][0], a.first, h), high[r][1] = dot4(high[r][1], b.first, h);
                low[r][0] = dot4(low[r][0], a.first, l), low[r][1] = dot4(low[r][1], b.first, l);
                const Ints h2 = broadcast(rows[r].high + i + 4), l2 = broadcast(rows[r].low + i + 4);
                high[r][0] = dot4(high[r][0], a.second, h2), high[r][1] = dot4(high[r][1], b.second, h2);
                low[r][0] = dot4(low[r][0], a.second, l2), low[r][1] = dot4(low[r][1], b.second, l2);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int each = 0; each < 2; ++each) {
                const Floats h = __builtin_convertvector(high[r][each], Floats);
                products[r][t + each] = h * 256.0f + __builtin_convertvector(low[r][each], Floats);
            }
        }
    }
}

// Adds whole numbers weight * code of the tiles from first to last to the rows' sums, 32 features at a time.
template <int R, int BITS>
void add_values(Row* rows, const Chunk& chunk, int first, int last, const Weights<R>& weights,
                kv::Layout layout) {
    const int64_t half = half_width(layout.head_size), keys = layout.keys(), quad = layout.quad();
    for (int64_t i = 0; i < half; i += LANES) {
        Ints high[R][2] = {}, low[R][2] = {};
        for (int t = first; t <= last; ++t) {
            const uint8_t* values = chunk.tiles[t] + keys + 4 * i;
            for (int j = 0; j < 4; ++j) {
                const kv::Pair a = kv::load_pair<BITS>(values + j * quad, quad / 2);
                for (int r = 0; r < R; ++r) {
                    const Ints h = broadcast(weights.high[r] + t * LANES + 4 * j);
                    const Ints l = broadcast(weights.low[r] + t * LANES + 4 * j);
                    high[r][0] = dot4(high[r][0], a.first, h), high[r][1] = dot4(high[r][1], a.second, h);
                    low[r][0] = dot4(low[r][0], a.first, l), low[r][1] = dot4(low[r][1], a.second, l);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int each = 0; each < 2; ++each) {
                float* to = rows[r].values + i + each * half;
                const Floats h = __builtin_convertvector(high[r][each], Floats);
                const Floats whole = h * 256.0f + __builtin_convertvector(low[r][each], Floats);
                store(to, load<Floats>(to) * weights.before[r] + whole * weights.now[r]);
            }
        }
    }
}

template <int R, int KEY_BITS, int VALUE_BITS>
void attend(Row* rows, const Chunk& chunk, int64_t first_token, kv::Layout layout) {
    const Range seen(rows, R, first_token);
    if (seen.first > seen.last) return;
    Floats products[R][TILES] = {};
    score<R, KEY_BITS>(rows, chunk, seen.first, seen.last, layout.head_size, products);
    Weights<R> weights;
    for (int r = 0; r < R; ++r) {
        to_scores(rows[r], chunk, first_token, 0, TILES - 1, [&](int t) { return products[r][t]; }, products[r]);
    }
    softmax(rows, chunk, products, weights);
    add_values<R, VALUE_BITS>(rows, chunk, seen.first, seen.last, weights, layout);
}

template <int KEY_BITS, int VALUE_BITS>
void attend_all(Row* rows, int64_t count, const Chunk& chunk, int64_t first_token, kv::Layout layout) {
#ifdef __AMX_INT8__
    if (count >= AMX_ROWS && layout.head_size <= AMX_HEAD_SIZE) {
        static thread_local Codes codes;
        const Range seen(rows, count, first_token);
        unpack<KEY_BITS, VALUE_BITS>(codes, chunk, seen.first, seen.last, layout);
        const amx::Shapes shapes;
        for (; count >= AMX_ROWS; rows += AMX_ROWS, count -= AMX_ROWS) {
            attend_by_tiles(rows, chunk, codes, first_token, layout.head_size);
        }
    }
#endif
    for (; count >= GROUP; rows += GROUP, count -= GROUP) {
        attend<GROUP, KEY_BITS, VALUE_BITS>(rows, chunk, first_token, layout);
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

// A part: a row's sums over one chunk, where the context is split.
int64_t part_floats(int64_t head_size) { return 3 + 2 * half_width(head_size); }

void save(float* part, const Row& row, int64_t width) {
    part[0] = row.largest, part[1] = row.sum, part[2] = row.zero;
    std::copy(row.values, row.values + width, part + 3);
}

// The same operations as on a chunk's own sums in `softmax` and `add_values`: powers of two are exact factors.
void merge(Row& row, const float* part, int64_t width) {
    const float before = row.largest;
    row.largest = std::max(before, part[0]);
    const float old = power(before - row.largest), now = power(part[0] - row.largest);
    row.sum = row.sum * old + part[1] * now;
    row.zero = row.zero * old + part[2] * now;
    for (int64_t i = 0; i < width; i += LANES) {
        store(row.values + i, load<Floats>(row.values + i) * old + load<Floats>(part + 3 + i) * now);
    }
}

struct Place {
    int64_t token, head;
};

Place place(const Problem& p, const Task& task, int64_t row) {
    const int64_t index = task.first + row, share = p.share();
    return {p.query_starts[task.sequence] + index / share, task.kv_head * share + index % share};
}

void finish(Row& row, const Problem& p, Place place) {
    const int64_t half = p.head_size / 2, padded = half_width(p.head_size);
    for (int64_t i = 0; i < 2 * padded; i += LANES) {
        store(row.values + i, (load<Floats>(row.values + i) + row.zero) / row.sum);
    }
    if (padded != half) std::copy(row.values + padded, row.values + padded + half, row.values + half);
    const int64_t to = place.token * p.out_stride + place.head * p.head_size;
    store_row(p.out + to * element_bytes(p.out_dtype), row.values, p.head_size, p.out_dtype);
}

void run(const Problem& p, const Task& task) {
    Row rows[ROWS];
    const int64_t width = 2 * half_width(p.head_size);
    const int64_t queries = p.query_starts[task.sequence + 1] - p.query_starts[task.sequence];
    for (int64_t r = 0; r < task.count; ++r) {
        const Place at = place(p, task, r);
        read_query(rows[r], p, at.token, at.head);
        rows[r].last_seen = p.seq_lens[task.sequence] - queries + (task.first + r) / p.share();
        rows[r].first_seen = p.first_seen(rows[r].last_seen);
        start(rows[r], width);
    }
    const Attend attend = attend_with(p.pages.layout);
    Chunk chunk;
    for (int64_t c = task.begin; c < task.end; ++c) {
        read_chunk(chunk, p, task, c * CHUNK);
        attend(rows, task.count, chunk, c * CHUNK, p.pages.layout);
        for (int64_t r = 0; task.parts && r < task.count; ++r) {
            save(task.parts + ((c - task.begin) * task.count + r) * part_floats(p.head_size), rows[r], width);
            start(rows[r], width);
        }
    }
    for (int64_t r = 0; !task.parts && r < task.count; ++r) finish(rows[r], p, place(p, task, r));
}

// Row r of a task whose chunks other tasks have saved.
void combine(const Problem& p, const Task& whole, int64_t r) {
    Row row;
    const int64_t width = 2 * half_width(p.head_size);
    start(row, width);
    for (int64_t c = 0; c < whole.end - whole.begin; ++c) {
        merge(row, whole.parts + (c * whole.count + r) * part_floats(p.head_size), width);
    }
    finish(row, p, place(p, whole, r));
}

std::vector<Task> whole_tasks(const Problem& p) {
    std::vector<Task> tasks;
    for (int64_t s = 0; s < p.sequences; ++s) {
        const int64_t queries = p.query_starts[s + 1] - p.query_starts[s], rows = queries * p.share();
        const int64_t before = p.seq_lens[s] - queries;
        for (int64_t first = (rows - 1) / ROWS * ROWS; rows && first >= 0; first -= ROWS) {  // the longest tasks first
            const int64_t count = std::min<int64_t>(ROWS, rows - first);
            const int64_t begin = p.first_seen(before + first / p.share()) / CHUNK;
            const int64_t end = (before + (first + count - 1) / p.share()) / CHUNK + 1;
            for (int64_t head = 0; head < p.kv_heads; ++head) {
                tasks.push_back({s, head, first, count, begin, end, nullptr});
            }
        }
    }
    return tasks;
}

// Cuts tasks into ranges of chunks, with places in `parts` for their sums.
std::vector<Task> split(std::vector<Task>& whole, int64_t chunks_each, int64_t floats, std::unique_ptr<float[]>& parts) {
    int64_t needed = 0;
    for (const Task& task : whole) needed += (task.end - task.begin) * task.count * floats;
    parts.reset(new float[needed]);
    float* next = parts.get();
    std::vector<Task> tasks;
    for (Task& task : whole) {
        task.parts = next;
        for (int64_t begin = task.begin; begin < task.end; begin += chunks_each) {
            Task piece = task;
            piece.begin = begin, piece.end = std::min(begin + chunks_each, task.end), piece.parts = next;
            next += (piece.end - piece.begin) * task.count * floats;
            tasks.push_back(piece);
        }
    }
    return tasks;
}

// Chunks of a piece so that every thread has a few, or 0 where whole tasks keep the threads busy.
int64_t piece_size(const std::vector<Task>& tasks, int64_t threads) {
    int64_t chunks = 0, longest = 0;
    for (const Task& task : tasks) {
        chunks += task.end - task.begin;
        longest = std::max(longest, task.end - task.begin);
    }
    const int64_t fair = std::max<int64_t>(2, chunks / (4 * threads));
    return threads == 1 || (int64_t)tasks.size() >= 4 * threads || longest <= fair ? 0 : fair;
}

}  // namespace

void infoquant::kv_attention(const Rows<const void*>& query, const Rows<void*>& out, const kv::Pages& pages,
                             const Batch& batch, int64_t heads, int64_t kv_heads, bool rotate, float scale,
                             int64_t window) {
    const int64_t head_size = pages.layout.head_size;
    const Problem p{(const char*)query.data,
                    (char*)out.data,
                    query.dtype,
                    out.dtype,
                    query.stride,
                    out.stride,
                    pages,
                    batch.query_starts,
                    batch.seq_lens,
                    batch.block_table,
                    batch.sequences,
                    batch.table_stride,
                    heads,
                    kv_heads,
                    head_size,
                    rotate,
                    scale,
                    window};
    std::vector<Task> whole = whole_tasks(p);
    int64_t work = 0;
    for (const Task& task : whole) work += task.count * (task.end - task.begin);
    const int64_t threads = work < 16 ? 1 : omp_get_max_threads();
    const int64_t piece = piece_size(whole, threads);
    std::unique_ptr<float[]> parts;
    const std::vector<Task> pieces = piece ? split(whole, piece, part_floats(head_size), parts) : std::vector<Task>();
    const std::vector<Task>& tasks = piece ? pieces : whole;
#pragma omp parallel for schedule(dynamic, 1) if (threads > 1)
    for (size_t i = 0; i < tasks.size(); ++i) run(p, tasks[i]);
    if (!piece) return;
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i = 0; i < whole.size(); ++i) {
        for (int64_t r = 0; r < whole[i].count; ++r) combine(p, whole[i], r);
    }
}
