"""Compile the Triton kernels of the KV cache for GPUs that are not here, and tell what came out: one JSON line each.

    python -m tests.compiled ARCHITECTURE... SHAPE...

Not in a process that runs kernels under the interpreter: there they are no kernels that could be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infoquant_vllm.kernels.triton import kv4_attention, kv4_store

POINTERS = {
    "key_ptr": "*bf16",
    "value_ptr": "*bf16",
    "query_ptr": "*bf16",
    "out_ptr": "*bf16",
    "cache_ptr": "*u8",
    "slots_ptr": "*i64",
    "starts_ptr": "*i32",
    "lens_ptr": "*i32",
    "table_ptr": "*i32",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
# Head size, heads per kv-head, kv-heads, bits of keys and of values, tokens of a block, window.
SHAPES: dict[str, tuple[int, int, int, tuple[int, int], int, int]] = {
    "llama-3-8b": (128, 4, 8, (4, 4), 16, 0),
    "llama-2-13b": (128, 1, 40, (4, 4), 128, 0),
    "llama-3-70b tp 4": (128, 8, 2, (4, 4), 16, 0),
    "qwen2.5-7b": (128, 7, 4, (4, 4), 32, 0),
    "heads of 64": (64, 3, 3, (4, 4), 16, 512),
    "heads of 96": (96, 1, 32, (4, 4), 64, 0),
    "heads of 256": (256, 8, 2, (4, 4), 16, 0),
    "8 bits": (128, 4, 8, (8, 8), 16, 0),
}


def kernels(shape: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every kernel with what it is compiled for in a shape."""
    size, group, kv_heads, num_bits, block, window = SHAPES[shape]
    mixed = kv4_attention.attention_constants(block, size, group, num_bits, True, window)
    decode = kv4_attention.decode_constants(mixed, kv_heads)
    return {
        "kv4_store": (kv4_store.kv4_store_kernel, kv4_store.store_constants(block, size, num_bits, True, True)),
        "kv4_attention": (kv4_attention.kv4_attention_kernel, mixed),
        "kv4_decode": (kv4_attention.kv4_decode_kernel, decode),
        "kv4_reduce": (kv4_attention.kv4_reduce_kernel, kv4_attention.reduce_constants(decode)),
    }


def source(kernel: Any, constants: dict[str, Any]) -> ASTSource:
    """What a launcher would have compiled, with strides and tensors that 16 divides, as vLLM's are."""
    constants = {name: value for name, value in constants.items() if name not in OPTIONS}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        number = "fp32" if name in ("norm", "log_scale") else "i32"
        signature[name] = (
            "constexpr" if name in constants else POINTERS.get(name, "*fp32" if "_ptr" in name else number)
        )
        if name.endswith("_ptr") or (name.endswith("_stride") and name != "table_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(arch: int, kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, PTX's products and the instructions of the innermost loop."""
    options = {name: constants[name] for name in OPTIONS if name in constants}
    compiled = triton.compile(source(kernel, constants), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _said(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        assembly = _said(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "products": sorted(set(re.findall(r"mma\.sync\.[\w.]*?\.(s\d+\.s8\.s8\.s\d+)|(wgmma)\.", compiled.asm["ptx"]))),
        "loop": max(loops(assembly), default=0),
        "warps": constants["num_warps"],
    }


def loops(assembly: str) -> Iterator[int]:
    """Instructions of every loop that has no loop within."""
    labels: dict[str, int] = {}
    spans, count = [], 0
    for line in assembly.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = count
        elif re.match(r"^\s+/\*[0-9a-f]{4,}\*/", line):
            jump = re.search(r"BRA.*\((\.L_x_\d+)\)", line)
            if jump and jump[1] in labels:
                spans.append((labels[jump[1]], count))
            count += 1
    for first, last in spans:
        if not any(first <= a and b <= last and (a, b) != (first, last) and b - a > 8 for a, b in spans):
            yield last - first + 1


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """All kernels of the shapes named, or of the first, for every architecture named."""
    words = sys.argv[1:]
    named = [word for word in words if word in SHAPES] or list(SHAPES)[:1]
    for arch in (int(word) for word in words if word not in SHAPES):
        for shape in named:
            for name, (kernel, constants) in kernels(shape).items():
                print(json.dumps({"arch": arch, "shape": shape, "kernel": name} | compile_for(arch, kernel, constants)))


if __name__ == "__main__":
    main()
