"""How many workers of tensor parallelism a model can have, and what is one worker's wherever they are fewer."""

import math

from infoquant_vllm.format import ModelShape


def tp_sizes(shape: ModelShape, most: int) -> list[int]:
    """The numbers of workers up to `most` among which vLLM can share out the heads and the MLP of a model."""
    kv_heads = shape.num_key_value_heads
    return [
        count
        for count in range(1, most + 1)
        if shape.num_attention_heads % count == 0
        and shape.intermediate_size % count == 0
        and (kv_heads % count == 0 or count % kv_heads == 0)
    ]


def common_share(features: int, shape: ModelShape, most: int) -> int:
    """The largest run of an input's `features` that no number of workers up to `most` cuts."""
    return features // math.lcm(*tp_sizes(shape, most))
