// The kernels behind operations.cpp. Each one's own file says what it computes; dtypes are `Dtype`'s.
#pragma once
#include <cstdint>

#include "attention/kv_tile.h"

namespace infoquant {

inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

enum Transforms { NONE, HADAMARD, BLOCKS, KRONECKER };

// A linear's input x [tokens, features] and its transform. By kind:
// HADAMARD: runs of right_size features, whose dense factor is left [left_size, left_size]
// BLOCKS: right [features / right_size, right_size, right_size]
// KRONECKER: left [left_size, left_size] (x) right [right_size, right_size]
struct Input {
    const void* x;
    int64_t dtype, tokens, features, kind;
    const float *left, *right;
    int64_t left_size, right_size;
};

// codes [tokens, features], scale and zero [tokens, groups].
struct Quantized {
    uint8_t* codes;
    float* scale;
    int32_t* zero;
};

// As quantized_linear.py's `prepare_weight` and `prepare_grid` lay it out.
struct Weight {
    const uint8_t* lines;
    const float* scale;
    const uint8_t* zero;  // or null: signed codes
    int64_t channels, groups, num_bits;
};

void rotate(const Input& input, float* y);

// clip [groups, 2]
void rotate_quantize(const Input& input, const float* clip, int64_t groups, int64_t num_bits, bool symmetric,
                     const Quantized& to);

// Two rows of bytes per token, of one group each.
void rotate_quantize_wide(const Input& input, const Quantized& to);

// To out [tokens, channels]; bias [channels] or null.
void quantized_linear(const Quantized& x, int64_t tokens, int64_t features, int64_t input_groups, int64_t num_bits,
                      const Weight& weight, const float* bias, void* out, int64_t out_type);

// The three above in one; clip null: an input of 16 bits. out is of the dtype of x.
void linear(const Input& input, const float* clip, int64_t groups, int64_t num_bits, bool symmetric,
            const Weight& weight, const float* bias, void* out);

// x [tokens, features], weight [channels, features] and out [tokens, channels], all of one 16-bit dtype.
void dense_linear(const void* x, const uint16_t* weight, int64_t dtype, int64_t tokens, int64_t features,
                  int64_t channels, void* out);

// x and, where given, residual [tokens, size] to y and, where given, total = x + residual of the same shape.
void rms_norm(const void* x, const void* residual, const void* weight, int64_t dtype, int64_t tokens, int64_t size,
              double epsilon, void* y, void* total);

// x [tokens, size] @ rotation [size, size], times gain [size] or null, to out [tokens, size] of the dtype of x.
void rotate_rows(const void* x, int64_t dtype, int64_t tokens, int64_t size, const float* rotation, const float* gain,
                 void* out);

// x [tokens, 2 * size], gates before what they gate, to out [tokens, size].
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

// A head's first rotary_dim features turn; cos_sin [positions, rotary_dim] is in the rows' dtype. heads are those of x.
void rotary_embedding(const int64_t* positions, int64_t tokens, const void* cos_sin, int64_t rotary_dim,
                      const Rows<const void*>& x, int64_t heads, int64_t head_size, void* out);

// slots [tokens]; clips [kv_heads, 2]; key_mean [kv_heads, head_size] is subtracted from keys, null: nothing;
// rotate: keys by a Hadamard of butterflies alone.
void kv_store(const Rows<const void*>& key, const Rows<const void*>& value, const kv::Pages& pages,
              const int64_t* slots, int64_t tokens, const float* key_clip_ratio, const float* value_clip_ratio,
              const float* key_mean, int64_t kv_heads, bool rotate);

// rotate: queries by a Hadamard of butterflies alone; scale is that of the scores times log2(e); window 0 is none.
void kv_attention(const Rows<const void*>& query, const Rows<void*>& out, const kv::Pages& pages, const Batch& batch,
                  int64_t heads, int64_t kv_heads, bool rotate, float scale, int64_t window);

// The exclusive or of `bytes` (a multiple of 1024) at `from`, in lanes of 32 bits, to `to`, which holds LANES of them.
void read(const uint8_t* from, int64_t bytes, uint8_t* to);

}  // namespace infoquant
