"""What tensor parallelism may cut of a linear whose input features it shares out (o_proj and down_proj)."""

from infoquant_vllm.format.errors import FormatError
from infoquant_vllm.format.schema import LinearScheme


def check_tp_divisible(scheme: LinearScheme, features: int, workers: int = 1) -> None:
    """Raise FormatError where `workers` cannot each have an equal share of a linear's input [features].

    Whatever is computed of several features together must be of one worker: bytes of codes, groups of weights,
    ranges of the input, blocks of its transform. Inputs of 16 bits are the exception: their steps are so fine
    that a worker may choose its own.
    """
    weights, inputs, transform = scheme.weights, scheme.input_activations, scheme.input_transform
    token = features if workers > 1 and inputs.strategy == "token" else None
    for label, size in (
        ("weight group_size", weights.group_size),
        (f"{transform.type} block_size", transform.block_size),
        ("kronecker size", features if transform.factors is not None else None),
        ("activation group_size", inputs.group_size),
        ("activation range per token, of", None if inputs.num_bits == 16 else token),
        ("codes per byte", 8 // weights.num_bits),
    ):
        if size is not None and features // workers % size:
            raise FormatError(f"{label} {size} does not divide {_shares(features, workers)}")


def _shares(features: int, workers: int) -> str:
    if workers == 1:
        return f"its {features} input features"
    return (
        f"the {features // workers} of {features} input features that each of {workers} tensor-parallel workers has; "
        f"serve it with --tensor-parallel-size 1, or quantize it with `infoquant quantize --max-tp-size {workers}`"
    )
