"""Load a checkpoint as a transformers model that computes what the server does."""

from pathlib import Path

import torch
from torch import nn

from infoquant_vllm.format import ARCHITECTURES, Checkpoint, FormatError, ModelShape, cache_tensors, linear_tensors
from infoquant_vllm.kernels.torch.elementwise import gelu_tanh, silu
from offline.errors import ToolError
from offline.evaluate.simulated import (
    DeferredRotary,
    RotatedEmbedding,
    RotatedHead,
    SimulatedActivation,
    SimulatedCache,
    SimulatedLinear,
    SimulatedNorm,
    SimulatedRouter,
    cached_attention,
)
from offline.model.architectures import CausalLM, empty_model, read_config, rope_arguments
from offline.model.source import config_dtype
from offline.model.windowed_attention import register_attention
from offline.stages.lm_head import dequantized_lm_head

ATTENTION = "infoquant_simulated_cache"
ACTIVATIONS = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh}
"""By their names in config.json."""


def load_simulated(folder: str | Path, dtype: torch.dtype | None = None) -> CausalLM:
    """Load a checkpoint in eval mode; linears, KV cache, embeddings and lm_head follow the format.

    The rest (RoPE, residual stream, lm_head) runs in `dtype`, as in the server; None takes that of config.json. Norms
    and activations are rounded to it, rotations and quantizers run in float32, attention and R1 in the server's own
    kernels. In float32 the codes are the server's; in bf16 some roundings differ.

    Raises ToolError where the checkpoint is not whole or holds impossible values.
    """
    try:
        checkpoint = Checkpoint(folder)
        return _load(checkpoint, dtype or config_dtype(checkpoint.hf_config))
    except FormatError as error:
        raise ToolError(str(error)) from None


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> CausalLM:
    plain = {name: value for name, value in checkpoint.hf_config.items() if name != "quantization_config"}
    config = read_config(checkpoint.shape, plain, checkpoint.folder / "config.json")
    model = empty_model(checkpoint.shape, config)
    _replace_linears(model, checkpoint)
    _replace_attention(model, checkpoint)
    parameters = set(dict(model.named_parameters()))
    names = parameters & set(checkpoint.weight_map)
    state = {name: checkpoint.tensor(name).to(dtype) for name in names}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    _replace_vocabulary(model, checkpoint, dtype)
    _replace_between(model, checkpoint.shape)
    model.config.dtype = dtype
    return model.eval().requires_grad_(False)


def _replace_linears(model: CausalLM, checkpoint: Checkpoint) -> None:
    for module, (out_features, in_features) in checkpoint.shape.linears().items():
        scheme = checkpoint.config.scheme(module)
        if scheme is None:
            continue
        names = list(linear_tensors(scheme, out_features, in_features))
        names += ["bias"] if checkpoint.shape.has_bias(module) else []
        tensors = {name: checkpoint.tensor(f"{module}.{name}") for name in names}
        _set(model, module, SimulatedLinear(scheme, tensors))


def _replace_attention(model: CausalLM, checkpoint: Checkpoint) -> None:
    cache = checkpoint.config.kv_cache
    if cache is None:
        return
    model.set_attn_implementation(register_attention(ATTENTION, cached_attention))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = DeferredRotary(rotary)
    for layer in range(checkpoint.shape.num_hidden_layers):
        own = DeferredRotary(rotary, rope_arguments(checkpoint.shape, model.config, layer))
        _set(model, f"model.layers.{layer}.self_attn.rotary", own)
        name = f"model.layers.{layer}.self_attn.attn"
        names = cache_tensors(cache, checkpoint.shape)
        _set(model, name, SimulatedCache(cache, {local: checkpoint.tensor(f"{name}.{local}") for local in names}))


def _replace_vocabulary(model: CausalLM, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Replace 8-bit embeddings and lm_head, and add the rotations into and out of R1's basis of a tied model."""
    shape, scheme = checkpoint.shape, checkpoint.config.lm_head_scheme
    if scheme is not None:
        names = linear_tensors(scheme, shape.vocab_size, shape.hidden_size)
        tensors = {name: checkpoint.tensor(f"{shape.lm_head_module}.{name}") for name in names}
        model.lm_head = SimulatedLinear(scheme, tensors)
        if shape.tie_word_embeddings:
            model.model.embed_tokens.weight = nn.Parameter(
                dequantized_lm_head(checkpoint).to(dtype), requires_grad=False
            )
    if not checkpoint.config.online_r1:
        return
    rotation = checkpoint.tensor("model.embed_tokens.r1")
    final_norm = checkpoint.tensor("model.embed_tokens.final_norm_weight")
    model.model.embed_tokens = RotatedEmbedding(model.model.embed_tokens.weight, rotation)
    model.lm_head = RotatedHead(model.lm_head, rotation, final_norm)


def _replace_between(model: CausalLM, shape: ModelShape) -> None:
    """Replace norms, activation functions and routers."""
    activation = ACTIVATIONS[ARCHITECTURES[shape.architecture].activation[1]]
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            _set(model, name, SimulatedNorm(module.weight, model.config.rms_norm_eps, shape.norm_offset))
        elif type(module).__name__.endswith("TopKRouter"):
            _set(model, name, SimulatedRouter(module))
        elif name.endswith((".act_fn", ".activation_fn")):
            _set(model, name, SimulatedActivation(activation))


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
