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

// The error of each feature times its row of feedback [size, size] is added to the features after it.
void round_with_feedback(float* row, int64_t size, const float* feedback, float largest_code, Entry& entry) {
    const float scale = from_float16(entry.scale), zero = from_float16(entry.zero);
    for (int64_t i = 0; i < size; ++i) {
        const float step = std::nearbyint((row[i] - zero) / scale);
        const float code = std::min(largest_code, std::max(0.0f, step));  // 0 of NaN
        entry.codes[i] = static_cast<uint8_t>(code);
        const float error = row[i] - (code * scale + zero);
        for (int64_t j = i + 1; j < size; ++j) row[j] += error * feedback[i * size + j];
    }
}

// row [size] is followed by zeros up to a multiple of 16; with feedback it is overwritten.
Entry quantize(float* row, int64_t size, const float* clip_ratio, const float* feedback, int64_t num_bits) {
    const float largest_code = static_cast<float>((1 << num_bits) - 1);
    Floats16 low = splat16(0.0f), high = splat16(0.0f);  // the range includes zero, so the padding changes nothing
    for (int64_t i = 0; i < size; i += LANES16) {
        low = min(low, load<Floats16>(row + i));
        high = max(high, load<Floats16>(row + i));
    }
    const float lower = hmin(low) * clip_ratio[0], upper = hmax(high) * clip_ratio[1];
    Entry entry;
    entry.scale = to_float16(clamp((upper - lower) / largest_code, 0x1p-20f, 65504.0f));
    entry.zero = to_float16(clamp(lower, -65504.0f, 65504.0f));
    if (feedback != nullptr) {
        round_with_feedback(row, size, feedback, largest_code, entry);
        return entry;
    }
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

void store_token(const KvStore& p, int64_t token, int64_t head) {
    const kv::Layout& layout = p.pages.layout;
    const int64_t head_size = layout.head_size, slot = p.slots[token];
    if (slot < 0) return;
    uint8_t* const tile = p.pages.tile(slot / p.pages.block_size, head, slot % p.pages.block_size);
    const int64_t lane = slot % kv::TOKENS;
    uint16_t* const qparams = reinterpret_cast<uint16_t*>(tile + layout.qparams()) + lane;
    alignas(64) float row[kv::MAX_HEAD_SIZE];
    std::fill_n(row + head_size, round_up(head_size, LANES16) - head_size, 0.0f);

    load_rows(p.key.data, p.key.dtype, token * p.key.stride + head * head_size, head_size, row);
    if (p.key_mean != nullptr) {
        for (int64_t i = 0; i < head_size; ++i) row[i] -= p.key_mean[head * head_size + i];
    }
    if (p.hadamard) hadamard(row, head_size, nullptr, 1);
    const float* feedback = p.key_feedback == nullptr ? nullptr : p.key_feedback + head * head_size * head_size;
    Entry entry = quantize(row, head_size, p.key_clip_ratio + 2 * head, feedback, layout.key_bits);
    write_key(tile, lane, entry, layout);
    qparams[0] = entry.scale, qparams[kv::TOKENS] = entry.zero;

    load_rows(p.value.data, p.value.dtype, token * p.value.stride + head * head_size, head_size, row);
    entry = quantize(row, head_size, p.value_clip_ratio + 2 * head, nullptr, layout.value_bits);
    write_value(tile, lane, entry, layout);
    qparams[2 * kv::TOKENS] = entry.scale, qparams[3 * kv::TOKENS] = entry.zero;
}

}  // namespace

void kv_store(const KvStore& p) {
#pragma omp parallel for schedule(static) if (p.tokens * p.kv_heads >= 64)
    for (int64_t job = 0; job < p.tokens * p.kv_heads; ++job) store_token(p, job / p.kv_heads, job % p.kv_heads);
}

}  // namespace infoquant
