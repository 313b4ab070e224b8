"""Models with the shapes of real ones and random weights, as Hugging Face folders: for speed, not for accuracy.

Their tokeniser has a word per token, so that random prompts of any length can be written down. All are of the class
Llama (Qwen2's shapes without its biases): transformers gives a Qwen2 model Qwen2's tokeniser whatever its folder holds.
"""

import argparse
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from offline.writer import atomic_folder


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )


SHAPES = MappingProxyType(
    {
        "qwen2-1.5b": _llama(1536, 8960, 28, 12, 2, 151_936),
        "qwen2-0.5b": _llama(896, 4864, 24, 14, 2, 151_936),
        "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49_152),
        "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49_152),
    }
)
STD = 0.02
UNKNOWN, END = "<|unknown|>", "</s>"
"""The first is the longest word, and so the letters that vLLM allows a text for each token, the space behind it too."""


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path, help="folder to make")
    options = parser.parse_args()
    write(SHAPES[options.shape], options.output)


def write(config: LlamaConfig, output: Path) -> None:
    """Write a model of that configuration, bf16, to the new folder `output`."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else parameter.data.normal_(std=STD)
    model.tie_weights()
    with atomic_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size="2GB")
        _tokenizer(config.vocab_size).save_pretrained(folder)


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = {UNKNOWN: 0, END: 1} | {f"w{index}": index for index in range(2, size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END)


if __name__ == "__main__":
    main()
