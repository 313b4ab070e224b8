"""Tensor-parallel sizes that a model allows, and the features that stay on one rank for all of them."""

import math

from infoquant_vllm.format import ModelShape


def tp_sizes(shape: ModelShape, max_tp_size: int) -> list[int]:
    """Return the TP sizes up to `max_tp_size` for which vLLM can shard the heads and the MLP of a model."""
    kv_heads = shape.num_key_value_heads
    inner = [shape.features(site) for site in shape.kinds_of_sites.values() if site.endswith("down")]
    return [
        size
        for size in range(1, max_tp_size + 1)
        if shape.num_attention_heads % size == 0
        and all(features % size == 0 for features in inner)
        and (kv_heads % size == 0 or size % kv_heads == 0)
    ]


def common_shard_size(features: int, shape: ModelShape, max_tp_size: int) -> int:
    """Return the size of the largest runs of `features` that no TP size up to `max_tp_size` splits."""
    return features // math.lcm(*tp_sizes(shape, max_tp_size))
