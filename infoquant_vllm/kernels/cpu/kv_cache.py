"""KV cache on the CPU, in vectorised torch; semantics: kernels/reference/kv_cache.py.

Scores, softmax and the sum over values run in float64: their rounding is then so far below that of
the result's dtype that a row comes out the same whatever the batch, the chunk and the padding are.
"""

from itertools import pairwise

import torch

from infoquant_vllm.format import apply_hadamard

SCORE_ELEMENTS = 2**22  # 32 MiB of float64 scores at a time
QUERY_TILE = 64  # few enough that a tile skips most of the keys that come after its queries


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    key_clip: torch.Tensor,
    value_clip: torch.Tensor,
    hadamard: bool,
    num_bits: int,
) -> None:
    """As the reference."""
    written = slots >= 0
    places = slots[written]
    key, value = (x[: len(slots)][written].float() for x in (key, value))
    k_codes, k_params = _quantise(apply_hadamard(key) if hadamard else key, key_clip, num_bits)
    v_codes, v_params = _quantise(value, value_clip, num_bits)
    params = torch.cat((k_params, v_params), -1).view(torch.uint8)
    block = cache.shape[2]
    cache[places // block, :, places % block] = torch.cat((k_codes, v_codes, params), -1)


def _quantise(x: torch.Tensor, clip: torch.Tensor, num_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [tokens, kv_heads, head_size] float32 to bytes and float16 [tokens, kv_heads, (scale, zero)]."""
    qmax = 2**num_bits - 1
    low, high = torch.aminmax(x, dim=-1)
    low, high = low.clamp_(max=0).mul_(clip[:, 0]), high.clamp_(min=0).mul_(clip[:, 1])
    scale = (high - low).div_(qmax).clamp_(2**-20, 65504).half()
    zero = low.clamp_(-65504, 65504).half()
    codes = (x - zero.float()[..., None]).div_(scale.float()[..., None]).round_().clamp_(0, qmax).to(torch.uint8)
    packed = codes if num_bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed, torch.stack((scale, zero), -1)


def kv_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    query_starts: list[int],
    seq_lens: list[int],
    block_table: torch.Tensor,
    hadamard: bool,
    scale: float,
    window: int | None,
    num_bits: int,
) -> torch.Tensor:
    """As the reference; all sequences with one query together, others one by one in query tiles."""
    out = torch.empty(query.shape, dtype=torch.float64)
    q = query.float()
    q = (apply_hadamard(q) if hadamard else q).double()
    for rows, queries in _batches(query_starts, seq_lens, query.shape[1] * query.shape[2]):
        lens = [seq_lens[row] for row in rows]
        cells = _Cells(cache, block_table[rows], torch.tensor(lens), query.shape[2], num_bits)
        starts = torch.tensor([query_starts[row] for row in rows])
        tile = max(1, min(QUERY_TILE, SCORE_ELEMENTS // (len(rows) * query.shape[1] * max(lens))))
        for first in range(0, queries, tile):
            count = min(tile, queries - first)
            where = starts[:, None] + torch.arange(first, first + count)  # [sequences, queries]
            last_seen = torch.tensor(lens)[:, None] - queries + torch.arange(first, first + count)
            out[where] = _attend(q[where], cells, last_seen, scale, window)
    return out


def _batches(query_starts: list[int], seq_lens: list[int], head_elements: int) -> list[tuple[list[int], int]]:
    """(sequences, queries of each): decoding ones together as far as memory allows, others alone."""
    counts = [end - start for start, end in pairwise(query_starts)]
    batches = [([row], count) for row, count in enumerate(counts) if count > 1]
    group: list[int] = []
    for row in sorted((r for r, count in enumerate(counts) if count == 1), key=lambda r: seq_lens[r]):
        if group and (len(group) + 1) * seq_lens[row] * head_elements > 2 * SCORE_ELEMENTS:
            batches.append((group, 1))
            group = []
        group.append(row)
    return batches + ([(group, 1)] if group else [])


class _Cells:
    """The cells of some sequences, padded to one length, as float64 codes and their parameters."""

    def __init__(self, cache: torch.Tensor, blocks: torch.Tensor, lens: torch.Tensor, head_size: int, num_bits: int):
        length = int(lens.max())
        used = -(-length // cache.shape[2])
        cells = cache[blocks[:, :used].long()].transpose(1, 2).flatten(2, 3)[:, :, :length]
        width = head_size * num_bits // 8
        self.num_bits = num_bits
        key, value = self._codes(cells[..., :width]), self._codes(cells[..., width : 2 * width])
        params = cells[..., 2 * width :].contiguous().view(torch.float16).double()
        # Beyond a sequence's end lies what was there before, which may be no number at all.
        params.masked_fill_((torch.arange(length) >= lens[:, None])[:, None, :, None], 0)
        # [sequences, kv_heads, length, head_size] twice, then [sequences, kv_heads, length] four times:
        # key scale, key zero, value scale, value zero
        self.parts = (key, value, *params.unbind(-1))

    def _codes(self, packed: torch.Tensor) -> torch.Tensor:
        """Even features first, then the odd ones: spares an interleaving copy (see `_attend`)."""
        if self.num_bits == 8:
            return packed.double()
        half = packed.shape[-1]
        codes = torch.empty(*packed.shape[:-1], 2 * half, dtype=torch.float64)
        codes[..., :half] = packed & 0xF
        codes[..., half:] = packed >> 4
        return codes


def _attend(q: torch.Tensor, cells: _Cells, last_seen: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """q [sequences, queries, heads, head_size] over the cells up to last_seen [sequences, queries].

    A key is code * s + z, so q . key = s * (q . code) + z * sum(q); likewise for the values.
    """
    sequences, queries, heads, size = q.shape
    length = int(last_seen.max()) + 1
    key, value, key_scale, key_zero, value_scale, value_zero = (part[:, :, :length] for part in cells.parts)
    kv_heads = key.shape[1]
    share = heads // kv_heads
    if cells.num_bits == 4:
        q = torch.cat((q[..., 0::2], q[..., 1::2]), -1)
    q = q.view(sequences, queries, kv_heads, share, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = (q @ key.transpose(-1, -2)).mul_(key_scale[:, :, None])
    scores.addcmul_(q.sum(-1, keepdim=True), key_zero[:, :, None]).mul_(scale)
    age = last_seen[:, :, None] - torch.arange(length)  # [sequences, queries, length]
    hidden = age < 0 if window is None else (age < 0) | (age >= window)
    weights = scores.view(sequences, kv_heads, share, queries, length)
    weights = weights.masked_fill_(hidden[:, None, None], float("-inf")).softmax(-1).flatten(2, 3)
    out = (weights * value_scale[:, :, None]) @ value
    out += weights @ value_zero[..., None]
    if cells.num_bits == 4:
        out = torch.stack(out.chunk(2, -1), -1)
    return out.view(sequences, kv_heads, share, queries, size).permute(0, 3, 1, 2, 4).flatten(2, 3)
