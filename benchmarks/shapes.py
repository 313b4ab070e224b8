"""Write Hugging Face folders of models with the shapes of real ones and random weights, to measure speed.

A folder holds a config.json and a tokenizer, for `vllm serve FOLDER --load-format dummy`. With --weights it also holds
random bf16 weights, for `infoquant quantize` or `vllm serve`. The tokenizer has one word per token, so that prompts
have any number of tokens. All models have the class Llama (Qwen2's shapes without its biases), because transformers
loads Qwen2's own tokenizer for the class Qwen2, whatever the folder holds.
"""

import argparse
import json
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from infoquant_vllm.format import ModelShape
from offline.output.atomic import atomic_folder
from offline.presets import PRESETS
from offline.recipe import Recipe

if TYPE_CHECKING:
    from transformers import LlamaConfig


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    rope_theta: float,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


SHAPES = MappingProxyType(
    {
        "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128_256, 500_000.0),
        "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128_256, 500_000.0),
        "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152_064, 1_000_000.0),
        "qwen2-1.5b": _llama(1536, 8960, 28, 12, 2, 151_936, 1_000_000.0, tied=True),
        "qwen2-0.5b": _llama(896, 4864, 24, 14, 2, 151_936, 1_000_000.0, tied=True),
        "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49_152, 100_000.0, tied=True),
        "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49_152, 100_000.0, tied=True),
    }
)
"""The content of config.json by name."""
STD = 0.02
UNKNOWN, END = "<|unknown|>", "</s>"
"""UNKNOWN is the longest word: vLLM limits the characters of a text to that length, and a space, per token."""


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path, help="folder to make")
    content = parser.add_mutually_exclusive_group()
    content.add_argument(
        "--preset", choices=["none", *PRESETS], default="fast", help="quantization_config; none: bf16 (default: fast)"
    )
    content.add_argument("--weights", action="store_true", help="random bf16 weights, and no quantization_config")
    options = parser.parse_args()
    if options.weights:
        from transformers import LlamaConfig

        write(LlamaConfig(**SHAPES[options.shape]), options.output)
    else:
        write_config(SHAPES[options.shape], options.output, PRESETS.get(options.preset))


def write_config(data: dict[str, Any], output: Path, recipe: Recipe | None) -> None:
    """Write config.json and a tokenizer to the new folder `output`.

    data: config.json of the bf16 model.
    recipe: adds the quantization_config of its checkpoints; None leaves the model bf16.
    """
    if recipe is not None:
        quantization = recipe.quantization_config(ModelShape.from_hf(data))
        data = data | {"quantization_config": quantization.model_dump(mode="json", exclude_none=True)}
    with atomic_folder(output) as folder:
        (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        _write_tokenizer(data["vocab_size"], folder)


def write(config: "LlamaConfig", output: Path) -> None:
    """Write a random bf16 model to the new folder `output`."""
    import torch  # here, since a config.json can be written without it
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else parameter.data.normal_(std=STD)
    model.tie_weights()
    with atomic_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size="2GB")
        _write_tokenizer(config.vocab_size, folder)


def _write_tokenizer(size: int, folder: Path) -> None:
    words = {UNKNOWN: 0, END: 1} | {f"w{index}": index for index in range(2, size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([UNKNOWN, END])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNKNOWN, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
