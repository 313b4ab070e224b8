// The kernels that bindings/operations.cpp registers. Each one's own file says what it computes.
#pragma once
#include <algorithm>
#include <cstdint>

#include "attention/kv_layout.h"
#include "simd/simd.h"

namespace infoquant {

inline int64_t div_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
inline int64_t round_up(int64_t count, int64_t unit) { return div_up(count, unit) * unit; }

enum class Transform { NONE, HADAMARD, BLOCKS, KRONECKER };

// The input x [tokens, features] of a linear and its transform, by kind:
// HADAMARD: over each right_size features, whose base matrix is left [left_size, left_size]
// BLOCKS: right [features / right_size, right_size, right_size]
// KRONECKER: left [left_size, left_size] (x) right [right_size, right_size]
struct Input {
    const void* x;
    Dtype dtype;
    int64_t tokens, features;
    Transform kind;
    const float *left, *right;
    int64_t left_size, right_size;
};

// How activations are quantized.
struct InputQuant {
    const float* clip;  // clip ratios of minimum and maximum [groups, 2]; null: int16
    int64_t groups, num_bits;
    bool symmetric;
    int64_t segments;   // consecutive groups of a segment share a scale
    const float* mean;  // [features], subtracted from the transformed input, or null

    int64_t rows_each() const { return clip ? 1 : 2; }  // rows of values for a token
    bool has_offset() const { return !clip || num_bits > 4; }
};

// Quantized activations, about (value - offset) * scale: values [rows, features], scale and offset [rows, segments].
struct Quantized {
    int8_t* values;
    float* scale;
    int32_t* offset;  // null: 0
    int64_t rows, features, segments;
};

// A weight as kernels.py packs it: (code - zero_point) * multiplier * scale.
struct Weight {
    const uint8_t* lines;
    const float* scale;          // [channels]
    const uint8_t* multiplier;   // [channels / 32, groups, 32]; null: 1
    const uint8_t* zero_point;   // [channels / 32, groups, 32]; null: signed codes
    int64_t channels, groups, num_bits;
};

// The transformed input to y [tokens, features].
void rotate(const Input& input, float* y);

// The transformed input to the arrays of `to`. int16 makes two rows of each token: of high bytes, then of low ones.
void rotate_quantize(const Input& input, const InputQuant& quant, const Quantized& to);

// To out [tokens, channels]; bias [channels] or null.
void quantized_linear(const Quantized& x, const Weight& weight, const float* bias, void* out, Dtype out_dtype);

// rotate_quantize and quantized_linear in one; out is of the dtype of x.
void linear(const Input& input, const InputQuant& quant, const Weight& weight, const float* bias, void* out);

// x [tokens, features], weight [channels, features] and out [tokens, channels], all of one 16-bit dtype.
struct DenseLinear {
    const void* x;
    const uint16_t* weight;
    Dtype dtype;
    int64_t tokens, features, channels;
    void* out;
};

void dense_linear(const DenseLinear& operands);

// x [tokens, size] @ rotation [size, size] times gain [size] (or null) to out [tokens, size] of the dtype of x.
struct RotateRows {
    const void* x;
    Dtype dtype;
    int64_t tokens, size;
    const float *rotation, *gain;
    void* out;
};

void rotate_rows(const RotateRows& operands);

// All of one dtype, but the weight may be float32. x and residual (or null) are [tokens, size]; y and
// total = x + residual have the same shape.
struct RmsNorm {
    const void *x, *residual, *weight;
    Dtype dtype, weight_dtype;
    int64_t tokens, size;
    double epsilon;
    void *y, *total;
};

void rms_norm(const RmsNorm& operands);

enum Activation { SILU, GELU_TANH };

// x [tokens, 2 * size] holds gates, then the values that they gate; out [tokens, size].
void gated_product(Activation activation, const void* x, Dtype dtype, int64_t tokens, int64_t size, void* out);

// Rows [tokens, heads, head_size] with `stride` elements from token to token.
template <typename Pointer>
struct Rows {
    Pointer data;
    Dtype dtype;
    int64_t stride;
};

// cos_sin [positions, rotary_dim] is of the dtype of x; features from rotary_dim on are copied.
struct Rotary {
    const int64_t* positions;  // [tokens]
    const void* cos_sin;
    int64_t tokens, rotary_dim, heads, head_size;
};

// RoPE of x to out [tokens, heads, head_size].
void rotary_embedding(const Rotary& rotary, const Rows<const void*>& x, void* out);

// Keys and values of the tokens into the cache's slots [tokens]; a negative slot is skipped.
struct KvStore {
    Rows<const void*> key, value;
    kv::Pages pages;
    const int64_t* slots;
    int64_t tokens, kv_heads;
    const float *key_clip_ratio, *value_clip_ratio;  // [kv_heads, 2]
    const float* key_mean;                           // [kv_heads, head_size], subtracted from keys, or null
    const float* key_feedback;                       // [kv_heads, head_size, head_size], of rounding errors, or null
    bool hadamard;                                   // of keys; the head size is a power of two
};

void kv_store(const KvStore& operands);

struct KvAttention {
    Rows<const void*> query;
    Rows<void*> out;
    kv::Pages pages;
    const int32_t *query_starts, *seq_lens, *block_table;  // [sequences + 1], [sequences], [sequences, table_stride]
    int64_t sequences, table_stride, heads, kv_heads;
    bool hadamard;   // of queries; the head size is a power of two
    float scale;     // of the scores, times log2(e)
    int64_t window;  // tokens that a query sees; 0: all before it
    float soft_cap;  // bound of the scores, times log2(e); 0: none

    int64_t head_size() const { return pages.layout.head_size; }
    int64_t queries_per_kv() const { return heads / kv_heads; }
    int64_t first_seen(int64_t last) const { return window ? std::max<int64_t>(0, last - window + 1) : 0; }
};

void kv_attention(const KvAttention& operands);

// The exclusive or of `bytes` (a multiple of 1024) at `from` in 32-bit lanes, to LANES of them at `to`.
void read_memory(const uint8_t* from, int64_t bytes, uint8_t* to);

}  // namespace infoquant
