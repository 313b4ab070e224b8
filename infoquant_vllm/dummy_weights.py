"""Fill layers with valid random tensors for `--load-format dummy`, which times a shape from its config.json alone."""

import zlib

import torch

ONES = ("input_clip_ratio", "key_clip_ratio", "value_clip_ratio", "final_norm_weight")
ZEROS = ("key_mean", "key_feedback", "input_mean", "output_mean")
DUMMY_MULTIPLIER = 15
"""The largest one for zero-points in the middle."""
IDENTITIES = ("input_blocks", "input_left", "input_right", "r1")


@torch.no_grad()
def fill_dummy_weights(tensors: dict[str, torch.Tensor], module: str, num_bits: int | None) -> None:
    """Fill the tensors of one layer in place, without temporaries of their size; `module` is the seed.

    Scales make a linear's outputs about as large as its inputs, so that activations stay finite in many layers.
    An unquantized matrix keeps the values that vLLM gave it.
    """
    for name, data in tensors.items():
        if name == "weight_packed":
            _fill_with_random_bytes(data, zlib.crc32(module.encode()))
        elif name == "weight_scale" and num_bits is not None:
            features = tensors["weight_packed"].shape[-1] * 8 // num_bits
            step = 3**0.5 / (2 ** (num_bits - 1) * features**0.5)  # codes are nearly uniform
            data.fill_(step / DUMMY_MULTIPLIER if "weight_multiplier" in tensors else step)
        elif name == "weight_multiplier":
            data.fill_(DUMMY_MULTIPLIER)
        elif name == "weight_zero_point" and num_bits is not None:
            data.fill_(2 ** (num_bits - 1))
        elif name in ONES:
            data.fill_(1)
        elif name in ZEROS:
            data.zero_()
        elif name in IDENTITIES:
            data.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)


def _fill_with_random_bytes(data: torch.Tensor, seed: int) -> None:
    """Draw eight bytes at a time: generators draw one number after another, whatever its size."""
    generator = torch.Generator(device=data.device).manual_seed(seed)
    flat = data.view(-1)
    whole = len(flat) // 8 * 8
    flat[:whole].view(torch.int64).random_(-(2**63), None, generator=generator)
    flat[whole:].random_(0, 256, generator=generator)
