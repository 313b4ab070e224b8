"""The classes of transformers that the source models are of, by their names in config.json."""

import copy
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedConfig

from infoquant_vllm.format import ARCHITECTURES, FUSED, ModelShape
from offline.algorithms.head_kl import Head
from offline.errors import ToolError
from offline.model.experts import separate_experts
from offline.model.windowed_attention import attention_of

CausalLM = LlamaForCausalLM
"""For type checkers: every class of `ARCHITECTURES` has the modules of Llama (see `empty_model`)."""
HEADS_FIRST = ("Gemma3ForCausalLM",)
"""Classes whose `q_norm` and `k_norm` see [sequences, heads, tokens, head_dim], not [sequences, tokens, ...]."""


class FusedLinear(nn.Module):
    """A linear of transformers that is computed by the linears beside it, which hold its rows.

    Those are looked up by their names when it runs, so that they may be replaced. The reference to their parent is
    weak: a circle would keep a layer's weights until a garbage collection.
    """

    def __init__(self, parent: nn.Module, names: list[str]):
        super().__init__()
        self._parent, self._names = weakref.ref(parent), names

    def __deepcopy__(self, memo: dict[int, Any]) -> "FusedLinear":
        """Return one that belongs to the copy of the parent, which is being copied too."""
        parent = self._parent()
        assert parent is not None  # it is being copied
        return FusedLinear(copy.deepcopy(parent, memo), self._names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., K] to the outputs of the linears side by side."""
        return torch.cat([getattr(self._parent(), name)(x) for name in self._names], -1)


def model_class(architecture: str) -> type[CausalLM]:
    """Return the class of transformers that a key of `ARCHITECTURES` names; `config_class` is that of its config."""
    found: type[CausalLM] = getattr(transformers, architecture)
    return found


def read_config(shape: ModelShape, hf_config: Mapping[str, Any], file: Path) -> PreTrainedConfig:
    """Read the config of transformers' class from what `file` holds; raises ToolError where transformers refuses it."""
    config_class: Any = model_class(shape.architecture).config_class
    try:
        config: PreTrainedConfig = config_class.from_dict(dict(hf_config))
    except Exception as error:  # huggingface_hub has its own validation errors, not derived from ValueError
        raise ToolError(f"{file}: transformers refuses it ({error})") from None
    config._attn_implementation = attention_of(config)
    return config


def empty_model(shape: ModelShape, config: PreTrainedConfig) -> CausalLM:
    """Build the model without values (device meta), except for what nothing stores: RoPE, the scale of embeddings.

    Its decoder layers have the linears of SITES: where transformers fuses them, they are split. Experts are modules of
    their own (see `separate_experts`).
    """
    with torch.device("meta"):
        model = model_class(shape.architecture)(config)
        if ARCHITECTURES[shape.architecture].fused:
            for layer in model.model.layers:
                _split_linears(layer, shape)
    separate_experts(model, shape)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    embeddings: Any = model.model.embed_tokens
    if hasattr(embeddings, "embed_scale"):
        embeddings.embed_scale = torch.tensor(embeddings.scalar_embed_scale)
    return model


def embedding_scale(model: nn.Module, dtype: torch.dtype) -> float:
    """Return the factor on the embeddings of a model (of class Model, not ForCausalLM) that is in `dtype`."""
    embeddings: Any = model.embed_tokens
    if hasattr(embeddings, "embed_scale"):
        return float(embeddings.embed_scale.to(dtype))
    return float(getattr(model.config, "embedding_multiplier", 1))


def head_of(model: CausalLM) -> Head:
    """Return the lm_head of a model with what its config does to logits."""
    scaling = float(getattr(model.config, "logits_scaling", 1))
    return Head(model.lm_head.weight, scaling, getattr(model.config, "final_logit_softcapping", None))


def rope_arguments(shape: ModelShape, config: PreTrainedConfig, layer: int) -> tuple[str, ...]:
    """Return what a rotary embedding takes beside positions: the kind of the layer, where kinds have RoPEs."""
    return (config.layer_types[layer],) if ARCHITECTURES[shape.architecture].layer_ropes else ()


def _split_linears(layer: nn.Module, shape: ModelShape) -> None:
    sizes = shape.linears()
    for fused, linears in FUSED.items():
        for linear in linears:
            rows, columns = sizes[f"model.layers.0.{linear}"]
            layer.set_submodule(linear, nn.Linear(columns, rows, bias=False))
        names = [linear.rpartition(".")[2] for linear in linears]
        layer.set_submodule(fused, FusedLinear(layer.get_submodule(fused.rpartition(".")[0]), names))
