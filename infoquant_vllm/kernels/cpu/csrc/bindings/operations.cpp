// Registers the kernels as torch operations. Each one is called without Python in between: at one token that would take
// longer than the kernel.
#include "bindings/torch_abi.h"
#include "kernels.h"

using namespace infoquant;
using namespace infoquant::torch_abi;

namespace {

void require(bool condition, const char* what) {
    if (!condition) throw std::runtime_error(std::string("infoquant: ") + what);
}

// Three arguments: the input x [tokens, features] of a linear, and matrices and hadamard, its transform. hadamard is
// the size of a Hadamard transform, whose base matrix is in matrices; if 0, these are one matrix [blocks, b, b], the
// two factors of a Kronecker product, or none.
struct InputArguments {
    Tensor x;
    std::vector<Tensor> matrices;
    int64_t hadamard;

    explicit InputArguments(Arguments& in)
        : x(in.tensor().contiguous()), matrices(in.tensors()), hadamard(in.integer()) {}

    int64_t tokens() const { return x.sizes()[0]; }
    int64_t features() const { return x.sizes()[1]; }

    Input input() const {
        require(!hadamard || matrices.size() == 1, "a Hadamard transform needs its base matrix");
        Input made{x.data(), x.dtype(), tokens(), features(), Transform::NONE, nullptr, nullptr, 0, 0};
        if (matrices.empty()) return made;
        const Tensor &first = matrices.front(), &last = matrices.back();
        const bool blocks = !hadamard && matrices.size() == 1;
        made.kind = hadamard ? Transform::HADAMARD : blocks ? Transform::BLOCKS : Transform::KRONECKER;
        if (!blocks) made.left = first.data<float>(), made.left_size = first.sizes()[0];
        if (!hadamard) made.right = last.data<float>();
        made.right_size = hadamard ? hadamard : last.sizes()[1];
        return made;
    }
};

// Five arguments: clip ratios [groups, 2] or none, num_bits, symmetric, segments, mean [features] or none.
struct QuantArguments {
    Tensor clip, mean;
    InputQuant quant;

    QuantArguments(Arguments& in, int64_t features) : clip(in.optional_tensor()) {
        const int64_t groups = clip ? clip.sizes()[0] : 1, num_bits = in.integer();
        const bool symmetric = in.boolean();
        const int64_t segments = in.integer();
        mean = in.optional_tensor();
        require(!mean || (mean.dim() == 1 && mean.sizes()[0] == features && mean.dtype() == FLOAT32),
                "the mean must be float32 and have the features of the input");
        quant = {clip.data<float>(), groups, num_bits, symmetric, clip ? segments : 1, mean.data<float>()};
        require(quant.segments > 0 && groups % quant.segments == 0 && features % groups == 0,
                "the segments must divide the groups, which must divide the features");
        require(groups == quant.segments || num_bits == 4, "only 4-bit groups share a scale");
    }
};

// Four arguments: lines [N / 32, K / 4, 16 * num_bits], scale [N, 1], multipliers or none and zero-points or none
// [N / 32, groups, 32].
struct WeightArguments {
    Tensor lines, scale, multiplier, zero_point;

    explicit WeightArguments(Arguments& in)
        : lines(in.tensor()), scale(in.tensor()), multiplier(in.optional_tensor()), zero_point(in.optional_tensor()) {}

    Weight weight() const {
        const int64_t groups = multiplier ? multiplier.sizes()[1] : zero_point ? zero_point.sizes()[1] : 1;
        for (const Tensor* each : {&multiplier, &zero_point}) {
            require(!*each || (each->dim() == 3 && each->sizes()[0] == lines.sizes()[0] && each->sizes()[1] == groups),
                    "multipliers and zero-points must be those of the weight's panels and groups");
        }
        return {lines.data<uint8_t>(),      scale.data<float>(), multiplier.data<uint8_t>(),
                zero_point.data<uint8_t>(), scale.sizes()[0],    groups,
                lines.sizes()[2] / 16};
    }
};

void check_product(int64_t features, int64_t segments, const WeightArguments& packed, const Weight& weight) {
    require(packed.lines.sizes()[1] == div_up(features, 4), "the weight must have the features of the input");
    require(weight.groups == 1 || weight.num_bits == 4, "only 4-bit weights have groups");
    for (const int64_t parts : {segments, weight.groups}) {
        require(parts == 1 || features % (4 * parts) == 0, "groups must have multiples of 4 features");
    }
}

// The bias in float32, converted into `converted` if it has another dtype.
const float* float_bias(const Tensor& bias, int64_t channels, std::vector<float>& converted) {
    if (!bias || bias.dtype() == FLOAT32) return bias.data<float>();
    converted.resize(channels);
    load_rows(bias.data(), bias.dtype(), 0, channels, converted.data());
    return converted.data();
}

void run_linear(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const InputArguments x(in);
    const QuantArguments how(in, x.features());
    const WeightArguments packed(in);
    const Tensor bias = in.optional_tensor();
    const Weight weight = packed.weight();
    check_product(x.features(), how.quant.segments, packed, weight);
    Tensor out = empty({x.tokens(), weight.channels}, x.x.dtype());
    std::vector<float> converted;
    linear(x.input(), how.quant, weight, float_bias(bias, weight.channels, converted), out.data());
    stack[0] = out.release();
}

void run_quantized_linear(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor values = in.tensor().contiguous(), scale = in.tensor().contiguous();
    Tensor offset = in.optional_tensor();
    if (offset) offset = std::move(offset).contiguous();
    const WeightArguments packed(in);
    const Tensor bias = in.optional_tensor();
    const Dtype dtype = static_cast<Dtype>(in.integer());
    const Weight weight = packed.weight();
    const Quantized x{values.data<int8_t>(), scale.data<float>(), offset.data<int32_t>(),
                      values.sizes()[0],     values.sizes()[1],   scale.sizes()[1]};
    check_product(x.features, x.segments, packed, weight);
    Tensor out = empty({x.rows, weight.channels}, dtype);
    std::vector<float> converted;
    quantized_linear(x, weight, float_bias(bias, weight.channels, converted), out.data(), dtype);
    stack[0] = out.release();
}

void run_rotate_quantize(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const InputArguments x(in);
    const QuantArguments how(in, x.features());
    const int64_t rows = how.quant.rows_each() * x.tokens(), segments = how.quant.segments;
    Tensor values = empty({rows, x.features()}, functions().int8), scale = empty({rows, segments}, FLOAT32);
    Tensor offset = how.quant.has_offset() ? empty({rows, segments}, functions().int32) : Tensor();
    rotate_quantize(x.input(), how.quant,
                    {values.data<int8_t>(), scale.data<float>(), offset.data<int32_t>(), rows, x.features(), segments});
    stack[0] = values.release(), stack[1] = scale.release(), stack[2] = optional(std::move(offset));
}

void run_rotate(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const InputArguments x(in);
    Tensor y = empty({x.tokens(), x.features()}, FLOAT32);
    rotate(x.input(), y.data<float>());
    stack[0] = y.release();
}

void run_rotate_rows(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor x = in.tensor().contiguous(), rotation = in.tensor().contiguous(), gain = in.optional_tensor();
    const int64_t tokens = x.sizes()[0], size = x.sizes()[1];
    require(rotation.sizes()[0] == size && rotation.sizes()[1] == size, "the rotation must have the size of the rows");
    require(rotation.dtype() == FLOAT32 && (!gain || gain.dtype() == FLOAT32), "rotation and gain must be float32");
    Tensor out = empty({tokens, size}, x.dtype());
    rotate_rows({x.data(), x.dtype(), tokens, size, rotation.data<float>(), gain.data<float>(), out.data()});
    stack[0] = out.release();
}

void run_dense_linear(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor x = in.tensor().contiguous(), weight = in.tensor().contiguous();
    const int64_t tokens = x.sizes()[0], channels = weight.sizes()[0];
    Tensor out = empty({tokens, channels}, x.dtype());
    dense_linear({x.data(), weight.data<uint16_t>(), x.dtype(), tokens, x.sizes()[1], channels, out.data()});
    stack[0] = out.release();
}

std::vector<int64_t> shape(const Tensor& x) { return {x.sizes(), x.sizes() + x.dim()}; }

int64_t rows(const std::vector<int64_t>& sizes) {
    int64_t count = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) count *= sizes[i];
    return count;
}

void run_rms_norm(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor x = in.tensor().contiguous(), weight = in.tensor();
    const double epsilon = in.number();
    const std::vector<int64_t> sizes = shape(x);
    Tensor y = empty(sizes, x.dtype());
    rms_norm({x.data(), nullptr, weight.data(), x.dtype(), weight.dtype(), rows(sizes), sizes.back(), epsilon,
              y.data(), nullptr});
    stack[0] = y.release();
}

void run_add_rms_norm(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor x = in.tensor().contiguous(), residual = in.tensor().contiguous(), weight = in.tensor();
    const double epsilon = in.number();
    const std::vector<int64_t> sizes = shape(x);
    Tensor y = empty(sizes, x.dtype()), total = empty(sizes, x.dtype());
    rms_norm({x.data(), residual.data(), weight.data(), x.dtype(), weight.dtype(), rows(sizes), sizes.back(), epsilon,
              y.data(), total.data()});
    stack[0] = y.release(), stack[1] = total.release();
}

template <Activation ACTIVATION>
void run_gated_product(Value* stack, uint64_t, uint64_t) {
    const Tensor x = Arguments(stack).tensor().contiguous();
    std::vector<int64_t> sizes = shape(x);
    sizes.back() /= 2;
    Tensor out = empty(sizes, x.dtype());
    gated_product(ACTIVATION, x.data(), x.dtype(), rows(sizes), sizes.back(), out.data());
    stack[0] = out.release();
}

// x [tokens, features]; strides between tokens may be larger.
Tensor with_features(Tensor x) { return x.strides()[1] == 1 ? std::move(x) : std::move(x).contiguous(); }

void run_rotary_embedding(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor positions = in.tensor().contiguous(), query = with_features(in.tensor());
    const Tensor key = with_features(in.tensor()), cos_sin = in.tensor().contiguous();
    const int64_t head_size = in.integer(), tokens = positions.sizes()[0], rotary_dim = cos_sin.sizes()[1];
    const auto apply_rope = [&](const Tensor& x) {
        require(x.dtype() == cos_sin.dtype(), "cosines and sines must have the dtype of queries and keys");
        require(x.sizes()[0] == tokens, "there must be a position for each token");
        const int64_t size = x.sizes()[1];
        Tensor out = empty({tokens, size}, x.dtype());
        rotary_embedding({positions.data<int64_t>(), cos_sin.data(), tokens, rotary_dim, size / head_size, head_size},
                         {x.data(), x.dtype(), x.strides()[0]}, out.data());
        return out;
    };
    Tensor rotated_query = apply_rope(query), rotated_key = apply_rope(key);
    stack[0] = rotated_query.release(), stack[1] = rotated_key.release();
}

// Whether each token's rows of x [tokens, heads, head_size] are contiguous.
bool has_contiguous_rows(const Tensor& x) { return x.strides()[2] == 1 && x.strides()[1] == x.sizes()[2]; }

Tensor with_rows(Tensor x) { return has_contiguous_rows(x) ? std::move(x) : std::move(x).contiguous(); }

kv::Pages pages(const Tensor& cache, int64_t head_size, int64_t key_bits, int64_t value_bits) {
    const int64_t *const sizes = cache.sizes(), *const strides = cache.strides();
    require(strides[3] == 1 && strides[2] == sizes[3], "the entries of a page must be contiguous");
    return {cache.data<uint8_t>(), strides[0], strides[1], sizes[2], {head_size, key_bits, value_bits}};
}

void run_kv_store(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor key = with_rows(in.tensor()), value = with_rows(in.tensor()), cache = in.tensor();
    const Tensor slots = in.tensor().contiguous(), key_clip_ratio = in.tensor(), value_clip_ratio = in.tensor();
    const Tensor key_mean = in.optional_tensor(), key_feedback = in.optional_tensor();
    const bool hadamard = in.boolean();
    const int64_t key_bits = in.integer(), value_bits = in.integer();
    kv_store({{key.data(), key.dtype(), key.strides()[0]},
              {value.data(), value.dtype(), value.strides()[0]},
              pages(cache, key.sizes()[2], key_bits, value_bits),
              slots.data<int64_t>(),
              slots.sizes()[0],
              key.sizes()[1],
              key_clip_ratio.data<float>(),
              value_clip_ratio.data<float>(),
              key_mean.data<float>(),
              key_feedback.data<float>(),
              hadamard});
}

void run_kv_attention(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor query = with_rows(in.tensor()), cache = in.tensor(), query_starts = in.tensor();
    const Tensor seq_lens = in.tensor(), block_table = in.tensor();
    const bool hadamard = in.boolean();
    const float scale = static_cast<float>(in.number());
    const int64_t window = in.integer();
    const float soft_cap = static_cast<float>(in.number());
    const int64_t key_bits = in.integer(), value_bits = in.integer();
    const Tensor out = in.tensor();
    require(has_contiguous_rows(out), "the rows of the output must be contiguous");
    for (const Tensor* each : {&query_starts, &seq_lens, &block_table}) {
        require(each->number_of_dtype() == functions().int32, "lengths and the block table must be int32");
        require(each->strides()[each->dim() - 1] == 1, "lengths and the block table must be contiguous");
    }
    kv_attention({{query.data(), query.dtype(), query.strides()[0]},
                  {out.data(), out.dtype(), out.strides()[0]},
                  pages(cache, query.sizes()[2], key_bits, value_bits),
                  query_starts.data<int32_t>(),
                  seq_lens.data<int32_t>(),
                  block_table.data<int32_t>(),
                  seq_lens.sizes()[0],
                  block_table.strides()[0],
                  query.sizes()[1],
                  cache.sizes()[1],
                  hadamard,
                  scale,
                  window,
                  soft_cap});
}

void run_read(Value* stack, uint64_t, uint64_t) {
    const Tensor data = Arguments(stack).tensor();
    int64_t bytes = 1;
    for (int64_t i = 0; i < data.dim(); ++i) bytes *= data.sizes()[i];
    require(bytes % 1024 == 0, "the number of bytes must be a multiple of 1024");
    Tensor sum = empty({4 * LANES}, functions().uint8);
    read_memory(data.data<uint8_t>(), bytes, sum.data<uint8_t>());
    stack[0] = sum.release();
}

struct Entry {
    const char *name, *schema;
    Operation run;
};

constexpr Entry OPERATIONS[] = {
    {"linear",
     "linear(Tensor x, Tensor[] matrices, int hadamard, Tensor? clip, int num_bits, bool symmetric, int segments, "
     "Tensor? mean, Tensor weight, Tensor weight_scale, Tensor? weight_multiplier, Tensor? weight_zero, Tensor? bias) -> Tensor",
     run_linear},
    {"quantized_linear",
     "quantized_linear(Tensor values, Tensor scale, Tensor? offset, Tensor weight, Tensor weight_scale, "
     "Tensor? weight_multiplier, Tensor? weight_zero, Tensor? bias, int dtype) -> Tensor",
     run_quantized_linear},
    {"rotate_quantize",
     "rotate_quantize(Tensor x, Tensor[] matrices, int hadamard, Tensor? clip, int num_bits, bool symmetric, "
     "int segments, Tensor? mean) -> (Tensor, Tensor, Tensor?)",
     run_rotate_quantize},
    {"rotate", "rotate(Tensor x, Tensor[] matrices, int hadamard) -> Tensor", run_rotate},
    {"rotate_rows", "rotate_rows(Tensor rows, Tensor rotation, Tensor? gain) -> Tensor", run_rotate_rows},
    {"few_rows_linear", "few_rows_linear(Tensor x, Tensor weight) -> Tensor", run_dense_linear},
    {"read", "read(Tensor data) -> Tensor", run_read},
    {"rms_norm", "rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor", run_rms_norm},
    {"add_rms_norm",
     "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)", run_add_rms_norm},
    {"silu_and_mul", "silu_and_mul(Tensor x) -> Tensor", run_gated_product<SILU>},
    {"gelu_tanh_and_mul", "gelu_tanh_and_mul(Tensor x) -> Tensor", run_gated_product<GELU_TANH>},
    {"rotary_embedding",
     "rotary_embedding(Tensor positions, Tensor query, Tensor key, Tensor cos_sin, int head_size) -> (Tensor, Tensor)",
     run_rotary_embedding},
    {"kv_store",
     "kv_store(Tensor key, Tensor value, Tensor(a!) cache, Tensor slots, Tensor key_clip_ratio, "
     "Tensor value_clip_ratio, Tensor? key_mean, Tensor? key_feedback, bool hadamard, int key_bits, int value_bits) "
     "-> ()",
     run_kv_store},
    {"kv_attention",
     "kv_attention(Tensor query, Tensor cache, Tensor query_starts, Tensor seq_lens, Tensor block_table, "
     "bool hadamard, float scale, int window, float soft_cap, int key_bits, int value_bits, Tensor(a!) out) -> ()",
     run_kv_attention},
};

}  // namespace

// Registers the operations as torch.ops.SPACE.*, once per process; returns an error message, or null.
extern "C" const char* infoquant_define_operations(const char* space) {
    static bool defined = false;
    static std::string problem;
    if (defined) return nullptr;
    try {
        const Functions& torch = functions();
        LibraryObject *schemas, *kernels;  // kept by torch for as long as the process lives
        check(torch.library_init_fragment(space, __FILE__, __LINE__, &schemas));
        check(torch.library_init_impl(space, "CPU", __FILE__, __LINE__, &kernels));
        for (const Entry& each : OPERATIONS) {
            check(torch.library_def(schemas, each.schema));
            check(torch.library_impl(kernels, each.name, each.run, VERSION));
        }
        defined = true;
        return nullptr;
    } catch (const std::exception& error) {
        problem = error.what();
        return problem.c_str();
    }
}
