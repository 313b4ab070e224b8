// The kernels of a decoder layer as torch's operations: between them runs no Python, which took longer than they do.
#include "kernels.h"
#include "torch_abi.h"

using namespace infoquant;
using namespace infoquant::torch_abi;

namespace {

// Kind and matrices of a transform. hadamard: the size of its runs, whose dense factor is in matrices; else a
// matrix [blocks, b, b] or the two factors of a Kronecker product.
void set_transform(Linear& p, const std::vector<Tensor>& matrices, int64_t hadamard) {
    if (hadamard && matrices.size() != 1) throw std::runtime_error("infoquant: a Hadamard needs its dense factor");
    if (matrices.empty()) return;
    const Tensor &first = matrices.front(), &last = matrices.back();
    const bool blocks = !hadamard && matrices.size() == 1;
    p.kind = hadamard ? HADAMARD : blocks ? BLOCKS : KRONECKER;
    if (!blocks) p.left = first.data<float>(), p.left_size = first.sizes()[0];
    if (!hadamard) p.right = last.data<float>();
    p.right_size = hadamard ? hadamard : last.sizes()[1];
}

// As float32; what is not is converted into `kept`.
const float* float_bias(const Tensor& bias, int64_t channels, std::vector<float>& kept) {
    if (!bias || bias.dtype() == FLOAT32) return bias.data<float>();
    kept.resize(channels);
    load_rows(bias.data(), bias.dtype(), 0, channels, kept.data());
    return kept.data();
}

void run_linear(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    Tensor x = in.tensor();
    const std::vector<Tensor> matrices = in.tensors();
    const int64_t hadamard = in.integer();
    const Tensor clip = in.optional_tensor();
    const int64_t num_bits = in.integer(), symmetric = in.boolean();
    const Tensor weight = in.tensor(), scale = in.tensor(), zero = in.optional_tensor(), bias = in.optional_tensor();
    x = std::move(x).contiguous();
    const int64_t tokens = x.sizes()[0], channels = scale.sizes()[0];
    Tensor out = empty({tokens, channels}, x.dtype());
    std::vector<float> kept;
    Linear p{};
    p.x = x.data(), p.dtype = x.dtype(), p.tokens = tokens, p.features = x.sizes()[1];
    set_transform(p, matrices, hadamard);
    p.clip = clip.data<float>(), p.input_groups = clip ? clip.sizes()[0] : 1;
    p.num_bits = num_bits, p.symmetric = symmetric;
    p.weight = weight.data<uint8_t>(), p.weight_bits = weight.sizes()[2] / 16;
    p.weight_scale = scale.data<float>(), p.weight_groups = scale.sizes()[1];
    p.weight_zero = zero.data<uint8_t>(), p.bias = float_bias(bias, channels, kept);
    p.out = out.data(), p.channels = channels;
    linear(p);
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
    rms_norm(x.data(), nullptr, weight.data(), x.dtype(), rows(sizes), sizes.back(), epsilon, y.data(), nullptr);
    stack[0] = y.release();
}

void run_add_rms_norm(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor x = in.tensor().contiguous(), residual = in.tensor().contiguous(), weight = in.tensor();
    const double epsilon = in.number();
    const std::vector<int64_t> sizes = shape(x);
    Tensor y = empty(sizes, x.dtype()), total = empty(sizes, x.dtype());
    rms_norm(x.data(), residual.data(), weight.data(), x.dtype(), rows(sizes), sizes.back(), epsilon, y.data(),
             total.data());
    stack[0] = y.release(), stack[1] = total.release();
}

void run_silu_and_mul(Value* stack, uint64_t, uint64_t) {
    const Tensor x = Arguments(stack).tensor().contiguous();
    std::vector<int64_t> sizes = shape(x);
    sizes.back() /= 2;
    Tensor out = empty(sizes, x.dtype());
    silu_and_mul(x.data(), x.dtype(), rows(sizes), sizes.back(), out.data());
    stack[0] = out.release();
}

// Whether the rows of x [tokens, heads, head_size] lie one after the other within a token.
bool rows_follow(const Tensor& x) { return x.strides()[2] == 1 && x.strides()[1] == x.sizes()[2]; }

Tensor with_rows(Tensor x) { return rows_follow(x) ? std::move(x) : std::move(x).contiguous(); }

void require(bool condition, const char* what) {
    if (!condition) throw std::runtime_error(std::string("infoquant: ") + what);
}

kv::Pages pages(const Tensor& cache, int64_t head_size, int64_t key_bits, int64_t value_bits) {
    const int64_t *const sizes = cache.sizes(), *const strides = cache.strides();
    require(strides[3] == 1 && strides[2] == sizes[3], "the cells of a page must lie one after the other");
    return {cache.data<uint8_t>(), strides[0], strides[1], sizes[2], {head_size, key_bits, value_bits}};
}

void run_kv_store(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor key = with_rows(in.tensor()), value = with_rows(in.tensor()), cache = in.tensor();
    const Tensor slots = in.tensor().contiguous(), key_clip = in.tensor(), value_clip = in.tensor();
    const Tensor key_offset = in.optional_tensor();
    const bool hadamard = in.boolean();
    const int64_t key_bits = in.integer(), value_bits = in.integer();
    kv_store({key.data(), key.dtype(), key.strides()[0]}, {value.data(), value.dtype(), value.strides()[0]},
             pages(cache, key.sizes()[2], key_bits, value_bits), slots.data<int64_t>(), slots.sizes()[0],
             key_clip.data<float>(), value_clip.data<float>(), key_offset.data<float>(), key.sizes()[1], hadamard);
}

void run_kv_attention(Value* stack, uint64_t, uint64_t) {
    Arguments in(stack);
    const Tensor query = with_rows(in.tensor()), cache = in.tensor(), query_starts = in.tensor();
    const Tensor seq_lens = in.tensor(), block_table = in.tensor();
    const bool hadamard = in.boolean();
    const float scale = static_cast<float>(in.number());
    const int64_t window = in.integer(), key_bits = in.integer(), value_bits = in.integer();
    const Tensor out = in.tensor();
    require(rows_follow(out), "the rows of the output must lie one after the other");
    for (const Tensor* each : {&query_starts, &seq_lens, &block_table}) {
        require(each->number_of_dtype() == functions().int32, "lengths and the block table must be int32");
        require(each->strides()[each->dim() - 1] == 1, "lengths and the block table must lie one after the other");
    }
    const Batch batch{query_starts.data<int32_t>(), seq_lens.data<int32_t>(), block_table.data<int32_t>(),
                      seq_lens.sizes()[0], block_table.strides()[0]};
    kv_attention({query.data(), query.dtype(), query.strides()[0]}, {out.data(), out.dtype(), out.strides()[0]},
                 pages(cache, query.sizes()[2], key_bits, value_bits), batch, query.sizes()[1], cache.sizes()[1],
                 hadamard, scale, window);
}

struct Entry {
    const char *name, *schema;
    Operation run;
};

constexpr Entry OPERATIONS[] = {
    {"linear",
     "linear(Tensor x, Tensor[] matrices, int hadamard, Tensor? clip, int num_bits, bool symmetric, Tensor weight, "
     "Tensor weight_scale, Tensor? weight_zero, Tensor? bias) -> Tensor",
     run_linear},
    {"rms_norm", "rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor", run_rms_norm},
    {"add_rms_norm",
     "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)", run_add_rms_norm},
    {"silu_and_mul", "silu_and_mul(Tensor x) -> Tensor", run_silu_and_mul},
    {"kv_store",
     "kv_store(Tensor key, Tensor value, Tensor(a!) cache, Tensor slots, Tensor key_clip, Tensor value_clip, "
     "Tensor? key_offset, bool hadamard, int key_bits, int value_bits) -> ()",
     run_kv_store},
    {"kv_attention",
     "kv_attention(Tensor query, Tensor cache, Tensor query_starts, Tensor seq_lens, Tensor block_table, "
     "bool hadamard, float scale, int window, int key_bits, int value_bits, Tensor(a!) out) -> ()",
     run_kv_attention},
};

}  // namespace

// Defines the operations as torch.ops.SPACE.*, once per process; returns what went wrong, null for nothing.
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
