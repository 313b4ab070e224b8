#include "bindings/torch_abi.h"

#include <dlfcn.h>

namespace infoquant::torch_abi {
namespace {

template <typename F>
F find(void* torch, const char* name) {
    void* const found = dlsym(torch, name);
    if (!found) throw std::runtime_error(std::string("this torch has no ") + name + ", which 2.13 has");
    return reinterpret_cast<F>(found);
}

int32_t number(void* torch, const char* name) { return find<int32_t (*)()>(torch, name)(); }

Functions look_up() {
    void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) throw std::runtime_error("torch is not loaded in this process");
    Functions f;
    const auto set = [torch](auto& function, const char* name) {
        function = find<std::remove_reference_t<decltype(function)>>(torch, name);
    };
    set(f.library_init_fragment, "aoti_torch_library_init_fragment");
    set(f.library_init_impl, "aoti_torch_library_init_impl");
    set(f.library_def, "aoti_torch_library_def");
    set(f.library_impl, "torch_library_impl");
    set(f.call_dispatcher, "torch_call_dispatcher");
    set(f.get_data_ptr, "aoti_torch_get_data_ptr");
    set(f.get_dim, "aoti_torch_get_dim");
    set(f.get_sizes, "aoti_torch_get_sizes");
    set(f.get_strides, "aoti_torch_get_strides");
    set(f.get_dtype, "aoti_torch_get_dtype");
    set(f.is_contiguous, "aoti_torch_is_contiguous");
    set(f.empty_strided, "aoti_torch_empty_strided");
    set(f.delete_tensor, "aoti_torch_delete_tensor_object");
    set(f.list_size, "torch_list_size");
    set(f.list_get_item, "torch_list_get_item");
    set(f.delete_list, "torch_delete_list");
    set(f.delete_value, "torch_delete_stable_ivalue");
    set(f.new_value, "torch_new_stable_ivalue");
    f.cpu = number(torch, "aoti_torch_device_type_cpu");
    f.contiguous_format = number(torch, "aoti_torch_memory_format_contiguous_format");
    f.uint8 = number(torch, "aoti_torch_dtype_uint8");
    f.int8 = number(torch, "aoti_torch_dtype_int8");
    f.int32 = number(torch, "aoti_torch_dtype_int32");
    f.dtypes[FLOAT32] = number(torch, "aoti_torch_dtype_float32");
    f.dtypes[BFLOAT16] = number(torch, "aoti_torch_dtype_bfloat16");
    f.dtypes[FLOAT16] = number(torch, "aoti_torch_dtype_float16");
    return f;
}

}  // namespace

const Functions& functions() {
    static const Functions found = look_up();
    return found;
}

}  // namespace infoquant::torch_abi
