// The kernels that other files of the library call. Each one's own file says what it computes; dtypes are `Dtype`'s.
#pragma once
#include <cstdint>

#include "kv_tile.h"

extern "C" {
void infoquant_rotate_quantize(const void* x, int64_t dtype, int64_t tokens, int64_t features, int64_t kind,
                               const float* left, int64_t left_size, const float* right, int64_t right_size,
                               const float* clip, int64_t groups, int64_t num_bits, int64_t symmetric, uint8_t* codes,
                               float* scale, int32_t* zero);

void infoquant_rotate_quantize_wide(const void* x, int64_t dtype, int64_t tokens, int64_t features, int64_t kind,
                                    const float* left, int64_t left_size, const float* right, int64_t right_size,
                                    uint8_t* codes, float* scale, int32_t* zero);

void infoquant_quantized_linear(const uint8_t* codes, const float* scale, const int32_t* zero, const uint8_t* weight,
                                const float* weight_scale, const uint8_t* weight_zero, const float* bias, void* out,
                                int64_t tokens, int64_t features, int64_t channels, int64_t input_groups,
                                int64_t weight_groups, int64_t weight_bits, int64_t num_bits, int64_t out_type);
}

namespace infoquant {

enum Transforms { NONE, HADAMARD, BLOCKS, KRONECKER };  // kinds of a linear's input transform

// A linear: what its input is, and its weights as quantized_linear.py's `prepare_weight` and `prepare_grid` make them.
struct Linear {
    const void* x;  // [tokens, features]
    int64_t dtype, tokens, features, kind;
    const float* left;
    int64_t left_size;
    const float* right;
    int64_t right_size;
    const float* clip;  // [input_groups, 2], or null: an input of 16 bits
    int64_t input_groups, num_bits, symmetric;
    const uint8_t* weight;
    const float* weight_scale;
    const uint8_t* weight_zero;  // or null: signed codes
    const float* bias;           // [channels] or null
    void* out;                   // [tokens, channels] of the dtype of x
    int64_t channels, weight_groups, weight_bits;
};

void linear(const Linear& problem);

void rms_norm(const void* x, const void* residual, const void* weight, int64_t dtype, int64_t tokens, int64_t size,
              double epsilon, void* y, void* total);

void silu_and_mul(const void* x, int64_t dtype, int64_t tokens, int64_t size, void* out);

// Rows [tokens, heads, head_size] whose tokens are `stride` elements apart.
template <typename Pointer>
struct Rows {
    Pointer data;
    int64_t dtype, stride;
};

// query_starts [sequences + 1], seq_lens [sequences], block_table [sequences, table_stride].
struct Batch {
    const int32_t *query_starts, *seq_lens, *block_table;
    int64_t sequences, table_stride;
};

void kv_store(const Rows<const void*>& key, const Rows<const void*>& value, const kv::Pages& pages,
              const int64_t* slots, int64_t tokens, const float* key_clip, const float* value_clip,
              const float* key_offset, int64_t kv_heads, bool rotate);

void kv_attention(const Rows<const void*>& query, const Rows<void*>& out, const kv::Pages& pages, const Batch& batch,
                  int64_t heads, int64_t kv_heads, bool rotate, float scale, int64_t window);

}  // namespace infoquant
