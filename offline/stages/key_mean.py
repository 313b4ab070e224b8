"""What all keys of a head have in common, taken away before they are quantized.

A constant less in every key changes all scores of a query alike, which softmax does not see
(SageAttention, arXiv 2410.02367, section 4.2); what is left spans a smaller range. There the mean is
that of the sequence at hand. A cache that grows token by token needs one that is known beforehand.
"""

import torch

from infoquant_vllm.format import ARCHITECTURES, ModelShape
from offline.model.hidden_states import Statistics, Stream


def key_mean(statistics: Statistics, stream: Stream, positions: int, shape: ModelShape) -> torch.Tensor:
    """The mean key of each head [kv_heads, head_dim], RoPE's turning of it averaged over the first positions.

    What RoPE turns round within them comes out as zero: no constant is common to it.

    statistics: with what leaves the module that makes the keys
    """
    _, module = ARCHITECTURES[shape.architecture].rope_inputs
    mean = statistics.sums[module] / statistics.tokens[module]
    return stream.turn_mean(mean.unflatten(0, (shape.num_key_value_heads, -1)), positions)
