"""Load a model, read a prompt, and print as JSON what the process holds: started by `benchmarks.speed.memory`."""

import gc
import json
import resource
import sys
from collections.abc import Iterable
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm._custom_ops import CPUDNNLGEMMHandler

from benchmarks.speed.memory import PROMPT_TOKENS


def main() -> None:
    """Print the figures of the model whose folder is the only argument."""
    model = LLM(sys.argv[1], enforce_eager=True, max_model_len=2 * PROMPT_TOKENS)
    model.generate({"prompt_token_ids": [5] * PROMPT_TOKENS}, SamplingParams(max_tokens=8), use_tqdm=False)
    cache = model.llm_engine.vllm_config.cache_config
    assert cache.num_gpu_blocks is not None  # set when the engine has made its cache
    figures = {
        "weight_bytes": model.apply_model(held_bytes)[0] + onednn_bytes(model),
        "kv_tokens": cache.num_gpu_blocks * cache.block_size,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    print(json.dumps(figures))


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensors that a model's modules hold but for the KV cache, each storage once."""
    storages = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        for owner in (module, getattr(module, "quant_method", None)):
            own = vars(owner) if owner is not None else {}
            held += [value for name, value in own.items() if not name.startswith("_") and name != "kv_cache"]
        for tensor in _tensors(held):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def onednn_bytes(model: LLM) -> int:
    """Bytes of the weights that oneDNN has in a layout of its own, outside of torch: a linear's own are gone then.

    int8 where vLLM quantizes to 8 bits, but for lm_head; else bf16.
    """
    config = model.llm_engine.vllm_config
    gc.unfreeze()  # vLLM has put what it loaded out of the collector's sight
    handlers = [each for each in gc.get_objects() if isinstance(each, CPUDNNLGEMMHandler)]
    vocabulary = config.model_config.get_vocab_size()
    wide = [config.quant_config is None or each.n >= vocabulary for each in handlers]
    return sum(each.k * each.n * (2 if bf16 else 1) for each, bf16 in zip(handlers, wide, strict=True))


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


if __name__ == "__main__":
    main()
