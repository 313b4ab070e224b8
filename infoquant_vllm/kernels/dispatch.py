"""Choose the backend, one implementation of every operation, for a device or by INFOQUANT_KERNELS."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from types import MappingProxyType

import torch
from torch import Tensor

from infoquant_vllm.kernels.cpu.library import library
from infoquant_vllm.kernels.operands import (
    ExpertChoice,
    ExpertLinear,
    InputQuant,
    KVCalibration,
    KVScheme,
    PackedWeight,
    ScoreParams,
    Sequences,
)

FORCE = "INFOQUANT_KERNELS"
MIN_CAPABILITY = 80  # the first with int8 tensor cores of 16 x 8 x 32


@dataclass(frozen=True)
class Backend:
    """Kernels that belong together: they read the layouts that their own `prepare_` functions return.

    kernels/torch defines what each function computes; `_torch`, `_native` and `_triton` below list the functions.
    """

    name: str  # in the log and in `infoquant doctor`

    prepare_linear: Callable[[PackedWeight, int, int], PackedWeight]
    """(a checkpoint's weight, num_bits, segments of the inputs) to the weight that `linear` reads."""
    prepare_matrices: Callable[[list[Tensor], int], list[Tensor]]
    """Matrices of an input transform, and the size of its Hadamard blocks or 0, to `InputQuant.matrices`."""
    weight_rows: Callable[[Tensor, Tensor, int], Tensor]
    """(packed 8-bit weight of one group, rows [...], K) to signed codes [..., K] int8."""
    linear: Callable[[Tensor, InputQuant, PackedWeight, Tensor | None], Tensor]
    experts: Callable[[Tensor, ExpertChoice, ExpertLinear, ExpertLinear], Tensor]
    dense_linear: Callable[[Tensor, Tensor], Tensor]
    rotate_rows: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_tanh_and_mul: Callable[[Tensor], Tensor]
    rotary_embedding: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]

    kv_store: Callable[[Tensor, Tensor, Tensor, Tensor, KVCalibration, KVScheme], None]
    """(key, value [tokens, kv_heads, head_size], cache, slots [tokens] int64, ...) into the cache."""
    kv_attention: Callable[[Tensor, Tensor, Sequences, ScoreParams, KVScheme, Tensor], None]
    """(query [tokens, heads, head_size], cache, ..., output like query)."""
    kv_decode: Callable[[Tensor, Tensor, Sequences, ScoreParams, KVScheme, Tensor, int, Sequence[Tensor]], None] | None
    """`kv_attention` for sequences of a few queries, (..., most queries, scratch); None: `kv_attention` serves all."""
    decode_scratch: (
        Callable[[int, int, int, int | None, int, int, int, torch.device], tuple[tuple[int, ...], ...]] | None
    )
    """(heads, kv_heads, head_size, window, most sequences, queries, tokens of one, device) to shapes of the scratch."""

    group_multiple: int = 1  # of features in a group of weights or activations
    max_head_size: int = 512  # of the KV cache; head sizes are multiples of 8

    def check_linear(self, weight_group: int | None, input_group: int | None) -> None:
        """Raise NotImplementedError for group sizes (None: one group) that the kernels do not take."""
        for name, size in (("weights", weight_group), ("input_activations", input_group)):
            if size is not None and size % self.group_multiple:
                raise NotImplementedError(
                    f"infoquant: group_size {size} of {name}: the {self.name} kernels need multiples of "
                    f"{self.group_multiple}"
                )

    def check_head_size(self, head_size: int) -> None:
        """Raise NotImplementedError for heads of a KV cache that the kernels do not take."""
        if head_size % 8 or head_size > self.max_head_size:
            raise NotImplementedError(
                f"infoquant: head size {head_size}: the {self.name} kernels need multiples of 8 up to "
                f"{self.max_head_size}"
            )


@cache
def forced_kernels() -> str | None:
    """Return the word in INFOQUANT_KERNELS, None if it is unset; raises ValueError for an unknown one."""
    word = os.environ.get(FORCE)
    if word is not None and word not in BACKENDS:
        raise ValueError(f"{FORCE}={word}: expected one of {', '.join(BACKENDS)}, or leave it unset")
    return word


@cache
def backend(device: str) -> Backend:
    """Return the backend for tensors on a type of device; raises NotImplementedError if there is none."""
    word = forced_kernels() or OF_DEVICE.get(device)
    if word is None:
        raise NotImplementedError(f"infoquant: no kernels for {device}; there are some for {', '.join(OF_DEVICE)}")
    if word == "cpu" and device != "cpu":
        raise NotImplementedError(f"infoquant: {FORCE}=cpu: these kernels do not run on {device}; unset it")
    if word == "triton" and device == "cpu" and not _interprets_triton():
        raise NotImplementedError(f"infoquant: {FORCE}=triton on a CPU is Triton's interpreter: set TRITON_INTERPRET=1")
    if device == "cuda" and _capability() < MIN_CAPABILITY:
        found, least = _capability() / 10, MIN_CAPABILITY / 10
        raise NotImplementedError(f"infoquant: compute capability {found}, the kernels need {least} or more")
    return BACKENDS[word]()


def _cpu() -> Backend:
    return _torch() if library().handle is None else _native()


def _torch() -> Backend:
    from infoquant_vllm.kernels.torch import dense, elementwise, experts, kv_cache, linear

    return Backend(
        name="torch",
        prepare_linear=linear.prepare_linear,
        prepare_matrices=linear.prepare_matrices,
        weight_rows=linear.weight_rows,
        linear=linear.linear,
        experts=experts.experts,
        dense_linear=dense.dense_linear,
        rotate_rows=dense.rotate_rows,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        silu_and_mul=elementwise.silu_and_mul,
        gelu_tanh_and_mul=elementwise.gelu_tanh_and_mul,
        rotary_embedding=elementwise.rotary_embedding,
        kv_store=kv_cache.kv_store,
        kv_attention=kv_cache.kv_attention,
        kv_decode=None,
        decode_scratch=None,
    )


def _native() -> Backend:
    from infoquant_vllm.kernels.cpu import kernels
    from infoquant_vllm.kernels.torch.experts import experts

    return Backend(
        name=f"native {library().target}",
        prepare_linear=kernels.prepare_linear,
        prepare_matrices=kernels.prepare_matrices,
        weight_rows=kernels.weight_rows,
        linear=kernels.linear,
        experts=partial(experts, one_linear=kernels.linear, activation=kernels.silu_and_mul),
        dense_linear=kernels.dense_linear,
        rotate_rows=kernels.rotate_rows,
        rms_norm=kernels.rms_norm,
        add_rms_norm=kernels.add_rms_norm,
        silu_and_mul=kernels.silu_and_mul,
        gelu_tanh_and_mul=kernels.gelu_tanh_and_mul,
        rotary_embedding=kernels.rotary_embedding,
        kv_store=kernels.kv_store,
        kv_attention=kernels.kv_attention,
        kv_decode=None,
        decode_scratch=None,
        group_multiple=4,
    )


def _triton() -> Backend:
    from infoquant_vllm.kernels.triton import attention, decode, experts, kv_store, linear

    return replace(
        _torch(),  # for norms, SwiGLU and RoPE, which vLLM's own operations compute on a GPU, and for dense_linear
        name="Triton, interpreted" if _interprets_triton() else "Triton",
        prepare_linear=linear.prepare_linear,
        prepare_matrices=linear.prepare_matrices,
        weight_rows=linear.weight_rows,
        linear=linear.linear,
        experts=experts.experts,
        rotate_rows=linear.rotate_rows,
        kv_store=kv_store.kv_store,
        kv_attention=attention.kv_attention,
        kv_decode=decode.kv_decode,
        decode_scratch=decode.decode_scratch,
        group_multiple=32,
        max_head_size=256,
    )


BACKENDS: MappingProxyType[str, Callable[[], Backend]] = MappingProxyType(
    {"reference": _torch, "cpu": _cpu, "triton": _triton}
)
"""By the words that INFOQUANT_KERNELS takes."""
OF_DEVICE = MappingProxyType({"cpu": "cpu", "cuda": "triton"})


def _interprets_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
