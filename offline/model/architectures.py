"""The classes of transformers that the source models are of, by their names in config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedConfig

from infoquant_vllm.format import ModelShape
from offline.errors import ToolError

CausalLM = LlamaForCausalLM
"""For type checkers: every class of `ARCHITECTURES` has the modules of Llama."""


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
    return config


def empty_model(shape: ModelShape, config: PreTrainedConfig) -> CausalLM:
    """Build the model without values (device meta), except for its rotary embedding, which nothing stores."""
    with torch.device("meta"):
        model = model_class(shape.architecture)(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model
