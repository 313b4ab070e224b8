// Keys and values into the quantized KV cache; semantics: kernels/reference/kv_cache.py.
#include <algorithm>

#include "quantize/hadamard.h"
#include "kernels.h"
#include "attention/kv_tile.h"

namespace {

using namespace vectors;

struct Cell {
    uint8_t codes[kv::MAX_HEAD_SIZE];
    uint16_t scale, zero;  // float16
};

float clamp(float x, float low, float high) { return std::min(std::max(x, low), high); }

uint16_t half(float x) { return to_halves(all(x))[0]; }
float from_half(uint16_t x) { return from_halves(x - Halves{})[0]; }

// Codes of a row [size] float32, zero up to a whole number of vectors, with the clip's factors on minimum and maximum.
Cell quantize(const float* row, int64_t size, const float* clip, int64_t num_bits) {
    const float largest_code = (float)((1 << num_bits) - 1);
    Floats low = all(0.0f), high = all(0.0f);  // the range holds zero, so a padding of zeros changes nothing
    for (int64_t i = 0; i < size; i += LANES) {
        low = smaller(low, load<Floats>(row + i));
        high = larger(high, load<Floats>(row + i));
    }
    const float lower = smallest(low) * clip[0], upper = largest(high) * clip[1];
    Cell cell;
    cell.scale = half(clamp((upper - lower) / largest_code, 0x1p-20f, 65504.0f));
    cell.zero = half(clamp(lower, -65504.0f, 65504.0f));
    const Floats scale = all(from_half(cell.scale)), zero = all(from_half(cell.zero));
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats code = nearest((load<Floats>(row + i) - zero) / scale);
        const Ints whole = nearest_integers(smaller(larger(code, all(0.0f)), all(largest_code)));
        store(cell.codes + i, __builtin_convertvector(whole, Narrow));
    }
    return cell;
}

// Eight features of a token are four bytes: the first four features are low nibbles, the others high ones.
void write_key(uint8_t* tile, int64_t token, const Cell& cell, kv::Layout layout) {
    uint8_t* to = tile + 4 * token;
    const int64_t step = layout.key_bits == 4 ? 8 : 4;
    for (int64_t i = 0; i < layout.head_size; i += step, to += 4 * kv::TOKENS) {
        uint32_t word = load<uint32_t>(cell.codes + i);
        if (layout.key_bits == 4) word |= load<uint32_t>(cell.codes + i + 4) << 4;
        store(to, word);
    }
}

// A feature of four tokens is four bytes: low nibbles are the first half of the features, high ones the second.
void write_value(uint8_t* tile, int64_t token, const Cell& cell, kv::Layout layout) {
    uint8_t* to = tile + layout.keys() + token / 4 * layout.quad() + token % 4;
    const int64_t half = layout.head_size / 2;
    if (layout.value_bits == 4) {
        for (int64_t i = 0; i < half; ++i) to[4 * i] = (uint8_t)(cell.codes[i] | cell.codes[half + i] << 4);
    } else {
        for (int64_t i = 0; i < layout.head_size; ++i) to[4 * i] = cell.codes[i];
    }
}

}  // namespace

void infoquant::kv_store(const Rows<const void*>& key, const Rows<const void*>& value, const kv::Pages& pages,
                         const int64_t* slots, int64_t tokens, const float* key_clip_ratio, const float* value_clip_ratio,
                         const float* key_mean, int64_t kv_heads, bool rotate) {
    const kv::Layout& layout = pages.layout;
    const int64_t head_size = layout.head_size;
#pragma omp parallel for schedule(static) if (tokens * kv_heads >= 64)
    for (int64_t job = 0; job < tokens * kv_heads; ++job) {
        const int64_t token = job / kv_heads, head = job % kv_heads, slot = slots[token];
        if (slot < 0) continue;
        uint8_t* tile = pages.tile(slot / pages.block_size, head, slot % pages.block_size);
        const int64_t lane = slot % kv::TOKENS;
        uint16_t* parameters = (uint16_t*)(tile + layout.parameters()) + lane;
        alignas(64) float row[kv::MAX_HEAD_SIZE];

        const int64_t place = token * key.stride + head * head_size;
        load_row(row, (const char*)key.data + place * element_bytes(key.dtype), head_size, key.dtype);
        if (key_mean != nullptr) {
            for (int64_t i = 0; i < head_size; ++i) row[i] -= key_mean[head * head_size + i];
        }
        if (rotate) infoquant::hadamard(row, head_size, nullptr, 1);
        Cell cell = quantize(row, head_size, key_clip_ratio + 2 * head, layout.key_bits);
        write_key(tile, lane, cell, layout);
        parameters[0] = cell.scale, parameters[kv::TOKENS] = cell.zero;

        const int64_t value_place = token * value.stride + head * head_size;
        load_row(row, (const char*)value.data + value_place * element_bytes(value.dtype), head_size, value.dtype);
        cell = quantize(row, head_size, value_clip_ratio + 2 * head, layout.value_bits);
        write_value(tile, lane, cell, layout);
        parameters[2 * kv::TOKENS] = cell.scale, parameters[3 * kv::TOKENS] = cell.zero;
    }
}
