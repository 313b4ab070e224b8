"""Attention over the 4-bit cache as the plugin launches it: a kernel for sequences of few queries, one for prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from infoquant_vllm.kernels import operands
from infoquant_vllm.kernels.triton import attention as prompt
from infoquant_vllm.kernels.triton import decode

BITS = (4, 4)
BLOCK = 16
FEW_QUERIES = 8
"""The most that a speculative batch asks of a sequence here."""


@dataclass(frozen=True)
class Sequences:
    """Sequences that each have as many queries, their last tokens."""

    queries: int
    starts: torch.Tensor  # [sequences + 1] int32
    lens: torch.Tensor  # [sequences] int32
    table: torch.Tensor  # [sequences, blocks] int32

    @classmethod
    def of(cls, queries: int, context: int, table: torch.Tensor) -> "Sequences":
        """Return those of `context` tokens each whose block table this is."""
        sequences, device = len(table), table.device
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=device) * queries
        lens = torch.full((sequences,), context, dtype=torch.int32, device=device)
        return cls(queries, starts, lens, table)


def attention(
    query: torch.Tensor, kv_heads: int, batch: Sequences, out: torch.Tensor, longest: int
) -> Callable[[torch.Tensor], None]:
    """Return what attends with query [tokens, heads, head_size] over cells and writes `out` of the same shape.

    longest: tokens of the longest sequence that the engine takes, which decoding's scratch and launches are for.
    """
    _, heads, size = query.shape
    sequences = operands.Sequences(batch.starts, batch.lens, batch.table)
    rest: list[Any] = [sequences, operands.ScoreParams(size**-0.5), operands.KVScheme(BITS, hadamard=True), out]
    if batch.queries > FEW_QUERIES:
        return lambda cells: prompt.kv_attention(query, cells, *rest)
    bounds = len(batch.lens), batch.queries, longest
    shapes = decode.decode_scratch(heads, kv_heads, size, None, *bounds, query.device)
    rest += [batch.queries, [torch.empty(shape, device=query.device) for shape in shapes]]
    return lambda cells: decode.kv_decode(query, cells, *rest)
