"""Check how tensor parallelism may split row-parallel linears (o_proj and down_proj)."""

from infoquant_vllm.format.errors import FormatError
from infoquant_vllm.format.schema import LinearScheme


def check_tp_divisible(scheme: LinearScheme, features: int, tp_size: int = 1) -> None:
    """Raise FormatError if the input features of a linear cannot be split evenly among `tp_size` ranks.

    Features that share a byte of codes, a group of weights, an activation scale or a transform block must be on one
    rank. 16-bit inputs are the exception: their steps are so fine that every rank may have its own scale.
    """
    weights, inputs, transform = scheme.weights, scheme.input_activations, scheme.input_transform
    token = features if tp_size > 1 and inputs.segment_size is None else None
    for label, size in (
        ("weight group_size", weights.group_size),
        (f"{transform.type} block_size", transform.block_size),
        ("kronecker size", features if transform.factors is not None else None),
        ("activation group_size", inputs.group_size),
        ("activation segment_size", inputs.segment_size),
        ("activation scale per token, of", None if inputs.num_bits == 16 else token),
        ("codes per byte", 8 // weights.num_bits),
    ):
        if size is not None and features // tp_size % size:
            raise FormatError(f"{label} {size} does not divide {_shards(features, tp_size)}")


def _shards(features: int, tp_size: int) -> str:
    if tp_size == 1:
        return f"its {features} input features"
    return (
        f"the {features // tp_size} of {features} input features on each of {tp_size} tensor-parallel ranks; "
        f"serve it with --tensor-parallel-size 1, or quantize it with `infoquant quantize --max-tp-size {tp_size}`"
    )
