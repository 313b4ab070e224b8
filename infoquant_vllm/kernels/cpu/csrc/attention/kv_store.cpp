// Quantizes keys and values into the KV cache; semantics: kernels/torch/kv_cache.py.
#include <algorithm>
#include <cmath>

#include "attention/kv_layout.h"
#include "kernels.h"
#include "quantize/hadamard.h"

namespace infoquant {
namespace {

// A key or a value of one token and KV head.
struct Entry {
    uint8_t codes[kv::MAX_HEAD_SIZE];
    uint16_t scale, zero;  // float16
};

float clamp(float x, float low, float high) { return std::min(std::max(x, low), high); }

// Rows of up to 16 tokens with feature after feature: a vector holds one feature of all of them.
struct Lanes {
    Floats16 rows[kv::MAX_HEAD_SIZE];
    alignas(64) float scale[LANES16], zero[LANES16];
};

// The error of each feature times its row of feedback [size, size] is added to the features after it, in the order of
// the features. Errors of a few features are added together to those behind all of them, which are then read once.
void round_with_feedback(Lanes& lanes, int64_t size, const float* feedback, float largest_code) {
    constexpr int64_t TOGETHER = 8;
    const Floats16 scale = load<Floats16>(lanes.scale), zero = load<Floats16>(lanes.zero);
    for (int64_t first = 0; first < size; first += TOGETHER) {
        const int64_t end = std::min(first + TOGETHER, size);
        Floats16 errors[TOGETHER];
        for (int64_t i = first; i < end; ++i) {
            const Floats16 x = lanes.rows[i], step = round((x - zero) / scale);
            const Floats16 code = min(max(step, splat16(0.0f)), splat16(largest_code));  // 0 of NaN
            const Floats16 error = x - (code * scale + zero);
            lanes.rows[i] = code, errors[i - first] = error;
            for (int64_t j = i + 1; j < end; ++j) lanes.rows[j] += error * splat16(feedback[i * size + j]);
        }
        for (int64_t j = end; j < size; ++j) {
            Floats16 x = lanes.rows[j];
            for (int64_t i = first; i < end; ++i) x += errors[i - first] * splat16(feedback[i * size + j]);
            lanes.rows[j] = x;
        }
    }
}

// Scale and zero of a row [size], which is followed by zeros up to a multiple of 16.
Entry with_range(const float* row, int64_t size, const float* clip_ratio, float largest_code) {
    Floats16 low = splat16(0.0f), high = splat16(0.0f);  // the range includes zero, so the padding changes nothing
    for (int64_t i = 0; i < size; i += LANES16) {
        low = min(low, load<Floats16>(row + i));
        high = max(high, load<Floats16>(row + i));
    }
    const float lower = hmin(low) * clip_ratio[0], upper = hmax(high) * clip_ratio[1];
    Entry entry;
    entry.scale = to_float16(clamp((upper - lower) / largest_code, 0x1p-20f, 65504.0f));
    entry.zero = to_float16(clamp(lower, -65504.0f, 65504.0f));
    return entry;
}

Entry quantize(const float* row, int64_t size, const float* clip_ratio, int64_t num_bits) {
    const float largest_code = static_cast<float>((1 << num_bits) - 1);
    Entry entry = with_range(row, size, clip_ratio, largest_code);
    const Floats16 scale = splat16(from_float16(entry.scale)), zero = splat16(from_float16(entry.zero));
    for (int64_t i = 0; i < size; i += LANES16) {
        const Floats16 code = round((load<Floats16>(row + i) - zero) / scale);
        const Ints16 codes = round_to_int(min(max(code, splat16(0.0f)), splat16(largest_code)));
        store(entry.codes + i, __builtin_convertvector(codes, Int8s16));
    }
    return entry;
}

// Eight features of a token are four bytes: the first four features in the low nibbles, the others in the high ones.
void write_key(uint8_t* tile, int64_t token, const Entry& entry, kv::Layout layout) {
    uint8_t* to = tile + 4 * token;
    const int64_t step = layout.key_bits == 4 ? 8 : 4;
    for (int64_t i = 0; i < layout.head_size; i += step, to += 4 * kv::TOKENS) {
        uint32_t word = load<uint32_t>(entry.codes + i);
        if (layout.key_bits == 4) word |= load<uint32_t>(entry.codes + i + 4) << 4;
        store(to, word);
    }
}

// A feature of four tokens is four bytes: the first half of the features in low nibbles, the second in high ones.
void write_value(uint8_t* tile, int64_t token, const Entry& entry, kv::Layout layout) {
    uint8_t* to = tile + layout.keys() + token / 4 * layout.quad() + token % 4;
    const int64_t half = layout.head_size / 2;
    if (layout.value_bits == 4) {
        for (int64_t i = 0; i < half; ++i) {
            to[4 * i] = static_cast<uint8_t>(entry.codes[i] | entry.codes[half + i] << 4);
        }
    } else {
        for (int64_t i = 0; i < layout.head_size; ++i) to[4 * i] = entry.codes[i];
    }
}

// The page's tile of a slot, and the slot's place in it.
struct Place {
    uint8_t* tile;
    int64_t lane;
};

Place place(const KvStore& p, int64_t slot, int64_t head) {
    return {p.pages.tile(slot / p.pages.block_size, head, slot % p.pages.block_size), slot % kv::TOKENS};
}

// Scale and zero of a key, or of a value, which are the second pair.
void write_qparams(Place to, const Entry& entry, kv::Layout layout, int64_t pair) {
    uint16_t* const qparams = reinterpret_cast<uint16_t*>(to.tile + layout.qparams()) + to.lane;
    qparams[2 * pair * kv::TOKENS] = entry.scale, qparams[(2 * pair + 1) * kv::TOKENS] = entry.zero;
}

// The key less its mean, rotated: what is quantized.
void load_key(const KvStore& p, int64_t token, int64_t head, float* row) {
    const int64_t head_size = p.pages.layout.head_size;
    load_rows(p.key.data, p.key.dtype, token * p.key.stride + head * head_size, head_size, row);
    if (p.key_mean != nullptr) {
        for (int64_t i = 0; i < head_size; ++i) row[i] -= p.key_mean[head * head_size + i];
    }
    if (p.hadamard) hadamard(row, head_size, nullptr, 1);
}

void store_key(const KvStore& p, int64_t token, int64_t head, float* row) {
    const kv::Layout& layout = p.pages.layout;
    const Place to = place(p, p.slots[token], head);
    load_key(p, token, head, row);
    const Entry entry = quantize(row, layout.head_size, p.key_clip_ratio + 2 * head, layout.key_bits);
    write_key(to.tile, to.lane, entry, layout);
    write_qparams(to, entry, layout, 0);
}

void store_value(const KvStore& p, int64_t token, int64_t head, float* row) {
    const kv::Layout& layout = p.pages.layout;
    const Place to = place(p, p.slots[token], head);
    load_rows(p.value.data, p.value.dtype, token * p.value.stride + head * layout.head_size, layout.head_size, row);
    const Entry entry = quantize(row, layout.head_size, p.value_clip_ratio + 2 * head, layout.value_bits);
    write_value(to.tile, to.lane, entry, layout);
    write_qparams(to, entry, layout, 1);
}

// Keys of up to 16 tokens [first, end) with error feedback: one chain of features for all that have a slot.
void store_keys_with_feedback(const KvStore& p, int64_t first, int64_t end, int64_t head, float* row) {
    int64_t tokens[LANES16], count = 0;
    for (int64_t token = first; token < end; ++token) {
        if (p.slots[token] >= 0) tokens[count++] = token;
    }
    if (count == 0) return;
    const kv::Layout& layout = p.pages.layout;
    const int64_t head_size = layout.head_size;
    const float largest_code = static_cast<float>((1 << layout.key_bits) - 1);
    Entry entries[LANES16];
    Lanes lanes;
    float* const columns = reinterpret_cast<float*>(lanes.rows);
    std::fill_n(columns, head_size * LANES16, 0.0f);
    std::fill_n(lanes.scale, LANES16, 1.0f), std::fill_n(lanes.zero, LANES16, 0.0f);
    for (int64_t lane = 0; lane < count; ++lane) {
        load_key(p, tokens[lane], head, row);
        entries[lane] = with_range(row, head_size, p.key_clip_ratio + 2 * head, largest_code);
        lanes.scale[lane] = from_float16(entries[lane].scale), lanes.zero[lane] = from_float16(entries[lane].zero);
        for (int64_t i = 0; i < head_size; ++i) columns[i * LANES16 + lane] = row[i];
    }
    round_with_feedback(lanes, head_size, p.key_feedback + head * head_size * head_size, largest_code);
    for (int64_t lane = 0; lane < count; ++lane) {
        for (int64_t i = 0; i < head_size; ++i) {
            entries[lane].codes[i] = static_cast<uint8_t>(columns[i * LANES16 + lane]);
        }
        const Place to = place(p, p.slots[tokens[lane]], head);
        write_key(to.tile, to.lane, entries[lane], layout);
        write_qparams(to, entries[lane], layout, 0);
    }
}

void store_tokens(const KvStore& p, int64_t first, int64_t end, int64_t head) {
    const int64_t head_size = p.pages.layout.head_size;
    alignas(64) float row[kv::MAX_HEAD_SIZE];
    std::fill_n(row + head_size, round_up(head_size, LANES16) - head_size, 0.0f);
    if (p.key_feedback != nullptr) store_keys_with_feedback(p, first, end, head, row);
    for (int64_t token = first; token < end; ++token) {
        if (p.slots[token] < 0) continue;
        if (p.key_feedback == nullptr) store_key(p, token, head, row);
        store_value(p, token, head, row);
    }
}

}  // namespace

void kv_store(const KvStore& p) {
    const int64_t each = p.key_feedback == nullptr ? 1 : LANES16, jobs = (p.tokens + each - 1) / each * p.kv_heads;
#pragma omp parallel for schedule(static) if (p.tokens * p.kv_heads >= 64)
    for (int64_t job = 0; job < jobs; ++job) {
        const int64_t first = job / p.kv_heads * each;
        store_tokens(p, first, std::min(first + each, p.tokens), job % p.kv_heads);
    }
}

}  // namespace infoquant
