"""Activations as the Triton kernels hold them between the quantizer and the product."""

from typing import NamedTuple

import torch


class Codes(NamedTuple):
    """Quantized rows: value[t, k] = (values[t, k] - rest[g, t]) * scale[g, t].

    4-bit codes are stored less their zero point, which fits in an int8, so that no correction is left to the
    product; of 8-bit ones 128 is taken away there and the `rest` of the zero point behind it.
    """

    values: torch.Tensor
    """int8 [tokens, features, padded]; what is in the padding meets weights of zero."""
    scale: torch.Tensor
    """float32 [groups, tokens]"""
    rest: torch.Tensor | None
    """int32 [groups, tokens]; None: zeros"""
    sums: torch.Tensor | None
    """int32 [finer groups, tokens]: sums of `values`, for weights with zero points."""

    @classmethod
    def empty(
        cls,
        tokens: int,
        groups: int,
        padded: int,
        sum_groups: int,
        num_bits: int,
        symmetric: bool,
        device: torch.device,
    ) -> "Codes":
        """Memory for codes of `num_bits`, at 16 bits a row of high and a row of low bytes for each token."""
        rows = 2 * tokens if num_bits == 16 else tokens
        has_rest = num_bits == 16 or (num_bits == 8 and not symmetric)
        return cls(
            torch.empty(rows, padded, dtype=torch.int8, device=device),
            torch.empty(groups, rows, dtype=torch.float32, device=device),
            torch.empty(groups, rows, dtype=torch.int32, device=device) if has_rest else None,
            torch.empty(sum_groups, rows, dtype=torch.int32, device=device) if sum_groups else None,
        )
