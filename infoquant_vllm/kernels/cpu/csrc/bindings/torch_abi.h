// The part of torch's stable C ABI that the operations use, looked up by name in the torch of this process. torch's own
// wrapper (torch/csrc/stable/library.h, TORCH_BOX) is not used: it needs torch at build time, which isolated builds do
// not have, and a linear of one token takes 0.2 to 1 us longer with it, of 4.2 us, for its shared pointers and for
// allocating through the dispatcher. Names and meanings are those of torch/csrc/inductor/aoti_torch/c/shim.h,
// torch/csrc/stable/c/shim.h and, for values, torch/csrc/stable/stableivalue_conversions.h (torch 2.13).
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simd/simd.h"

namespace infoquant::torch_abi {

using Value = uint64_t;  // the bits of a number, a handle, or, of an optional, a pointer to one of these
using Operation = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);
struct TensorObject;
struct ListObject;
struct LibraryObject;

// Each returns 0, or an error code and leaves its arguments alone.
struct Functions {
    int32_t (*library_init_fragment)(const char* space, const char* file, uint32_t line, LibraryObject** library);
    int32_t (*library_init_impl)(const char* space, const char* key, const char* file, uint32_t line,
                                 LibraryObject** library);
    int32_t (*library_def)(LibraryObject*, const char* schema);
    int32_t (*library_impl)(LibraryObject*, const char* name, Operation, uint64_t version);
    int32_t (*call_dispatcher)(const char* name, const char* overload, Value* stack, uint64_t version);
    int32_t (*get_data_ptr)(TensorObject*, void**);
    int32_t (*get_dim)(TensorObject*, int64_t*);
    int32_t (*get_sizes)(TensorObject*, int64_t**);
    int32_t (*get_strides)(TensorObject*, int64_t**);
    int32_t (*get_dtype)(TensorObject*, int32_t*);
    int32_t (*is_contiguous)(TensorObject*, bool*);
    int32_t (*empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                             int32_t index, TensorObject**);
    int32_t (*delete_tensor)(TensorObject*);
    int32_t (*list_size)(ListObject*, size_t*);
    int32_t (*list_get_item)(ListObject*, size_t, Value*);
    int32_t (*delete_list)(ListObject*);
    int32_t (*delete_value)(Value*);
    int32_t (*new_value)(Value**);
    int32_t cpu, contiguous_format, uint8, int8, int32;  // enum values of torch
    int32_t dtypes[3];                             // the same, in the order of `Dtype`
};

constexpr uint64_t VERSION = uint64_t{2} << 56 | uint64_t{13} << 48;

// The functions of this process's torch. Throws std::runtime_error where torch is not loaded or too old.
const Functions& functions();

inline void check(int32_t error) {
    if (error) throw std::runtime_error("infoquant: a function of torch's C ABI failed");
}

// An owned handle of a tensor, or none.
class Tensor {
  public:
    explicit Tensor(Value handle) : handle_(reinterpret_cast<TensorObject*>(handle)) {}
    explicit Tensor(TensorObject* handle = nullptr) : handle_(handle) {}
    Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_) functions().delete_tensor(handle_);
    }

    explicit operator bool() const { return handle_ != nullptr; }

    // A pointer to the first element; null if there is no tensor.
    template <typename T = void>
    T* data() const {
        void* found = nullptr;
        if (handle_) check(functions().get_data_ptr(handle_, &found));
        return static_cast<T*>(found);
    }

    int64_t dim() const {
        int64_t found;
        check(functions().get_dim(handle_, &found));
        return found;
    }

    // [dim()]; valid while the tensor lives.
    const int64_t* sizes() const {
        int64_t* found;
        check(functions().get_sizes(handle_, &found));
        return found;
    }

    // [dim()]; valid while the tensor lives.
    const int64_t* strides() const {
        int64_t* found;
        check(functions().get_strides(handle_, &found));
        return found;
    }

    // As torch's enum value.
    int32_t number_of_dtype() const {
        int32_t found;
        check(functions().get_dtype(handle_, &found));
        return found;
    }

    Dtype dtype() const {
        const int32_t found = number_of_dtype();
        for (Dtype dtype : {FLOAT32, BFLOAT16, FLOAT16}) {
            if (functions().dtypes[dtype] == found) return dtype;
        }
        throw std::runtime_error("infoquant: a tensor must be float32, bfloat16 or float16");
    }

    // Gives up the handle, for the stack.
    Value release() { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }

    // This tensor if it is contiguous, else a contiguous copy.
    Tensor contiguous() && {
        bool already;
        check(functions().is_contiguous(handle_, &already));
        if (already) return std::move(*this);
        Value stack[2] = {release(), static_cast<Value>(static_cast<uint32_t>(functions().contiguous_format))};
        check(functions().call_dispatcher("aten::contiguous", "", stack, VERSION));
        return Tensor(stack[0]);
    }

  private:
    TensorObject* handle_;
};

// A new contiguous tensor on the CPU; dtype is torch's enum value.
inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
    TensorObject* made;
    check(functions().empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, functions().cpu, 0, &made));
    return Tensor(made);
}

inline Tensor empty(const std::vector<int64_t>& sizes, Dtype dtype) {
    return empty(sizes, functions().dtypes[dtype]);
}

// A tensor or none, for the stack.
inline Value optional(Tensor tensor) {
    if (!tensor) return 0;
    Value* held;
    check(functions().new_value(&held));
    *held = tensor.release();
    return reinterpret_cast<Value>(held);
}

// Takes the arguments of an operation off the stack, in the order of its schema. Tensors pass to the caller.
class Arguments {
  public:
    explicit Arguments(const Value* stack) : next_(stack) {}

    Tensor tensor() { return Tensor(*next_++); }
    int64_t integer() { return static_cast<int64_t>(*next_++); }
    bool boolean() { return *next_++ & 1; }
    double number() {
        double found;
        std::memcpy(&found, next_++, sizeof found);
        return found;
    }
    // An empty Tensor for None.
    Tensor optional_tensor() {
        Value* const held = reinterpret_cast<Value*>(*next_++);
        if (!held) return Tensor();
        Tensor found(*held);
        functions().delete_value(held);
        return found;
    }
    std::vector<Tensor> tensors() {
        ListObject* const list = reinterpret_cast<ListObject*>(*next_++);
        size_t size = 0;
        functions().list_size(list, &size);
        std::vector<Tensor> found;
        for (size_t i = 0; i < size; ++i) {
            Value item = 0;
            functions().list_get_item(list, i, &item);
            found.emplace_back(item);
        }
        functions().delete_list(list);
        return found;
    }

  private:
    const Value* next_;
};

}  // namespace infoquant::torch_abi
