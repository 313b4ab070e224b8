"""KV cache on the CPU, in vectorized torch; semantics: kernels/reference/kv_cache.py.

Products of whole numbers run in float64, which holds their sums exactly.
"""

import math
from itertools import pairwise

import torch

from infoquant_vllm.format import apply_hadamard
from infoquant_vllm.kernels.reference.kv_cache import (
    CHUNK,
    CUT,
    LEVELS,
    POWER,
    TILE,
    TINY,
    quantize,
    sum_by_halves,
    tile_parts,
)

SCORE_ELEMENTS = 2**18  # so that the many steps from scores to weights stay in the processor's cache
CODE_ELEMENTS = 2**23  # 64 MiB of float64 codes at a time
HIDDEN, LOWEST = -(2.0**30), -(2.0**20)  # scores of tokens that are not seen, and less than any other's exponent


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    key_clip_ratio: torch.Tensor,
    value_clip_ratio: torch.Tensor,
    key_mean: torch.Tensor | None,
    hadamard: bool,
    num_bits: tuple[int, int],
) -> None:
    """As the reference."""
    written = slots >= 0
    places = slots[written]
    if len(places) == 0:
        return
    key, value = (x[: len(slots)][written].float() for x in (key, value))
    key = key if key_mean is None else key - key_mean
    k_codes, *k_params = quantize(apply_hadamard(key) if hadamard else key, key_clip_ratio, num_bits[0])
    v_codes, *v_params = quantize(value, value_clip_ratio, num_bits[1])
    if num_bits[0] == 4:
        k_codes = k_codes.unflatten(-1, (-1, 2, 4))
        k_codes = k_codes[..., 0, :] | (k_codes[..., 1, :] << 4)
    if num_bits[1] == 4:
        first, second = v_codes.chunk(2, -1)
        v_codes = first | (second << 4)
    blocks, kv_heads, block, _ = cache.shape
    keys, values, params = tile_parts(cache.view(blocks, kv_heads, block // TILE, -1), key.shape[2], num_bits)
    place, tile, lane = places // block, places % block // TILE, places % TILE
    keys[place, :, tile, :, lane] = k_codes.reshape(len(places), kv_heads, -1, 4)
    values[place, :, tile, lane // 4, :, lane % 4] = v_codes
    params[place, :, tile, :, lane] = torch.stack((*k_params, *v_params), -1)


def kv_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    hadamard: bool,
    scale: float,
    window: int | None,
    num_bits: tuple[int, int],
    out: torch.Tensor,
) -> None:
    """As the reference; all sequences with one query together, others one by one."""
    tokens, heads, size = query.shape
    kv_heads = cache.shape[1]
    q = query.float()
    q = (apply_hadamard(q) if hadamard else q).view(tokens, kv_heads, -1, size)
    starts, lens = query_starts.tolist(), seq_lens.tolist()
    for rows, queries in _batches(starts, lens, heads * size):
        where = torch.tensor([starts[row] for row in rows])[:, None] + torch.arange(queries)  # [sequences, queries]
        lengths = torch.tensor([lens[row] for row in rows])
        keys, values, params = _read(cache, block_table[rows], lengths, size, num_bits)
        last_seen = lengths[:, None] - queries + torch.arange(queries)
        found = attend_causally(q[where].permute(0, 2, 3, 1, 4), keys, values, params, last_seen, scale, window)
        out[where] = found.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out.dtype)


def _batches(query_starts: list[int], seq_lens: list[int], head_elements: int) -> list[tuple[list[int], int]]:
    """(sequences, queries of each): decoding ones together as far as memory allows, others alone."""
    counts = [end - start for start, end in pairwise(query_starts)]
    batches = [([row], count) for row, count in enumerate(counts) if count > 1]
    group: list[int] = []
    for row in sorted((r for r, count in enumerate(counts) if count == 1), key=lambda r: seq_lens[r]):
        if group and (len(group) + 1) * seq_lens[row] * head_elements > CODE_ELEMENTS:
            batches.append((group, 1))
            group = []
        group.append(row)
    return batches + ([(group, 1)] if group else [])


def _read(
    cache: torch.Tensor, blocks: torch.Tensor, lengths: torch.Tensor, size: int, num_bits: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of keys and values and parameters of some sequences, as `attend` takes them."""
    kv_heads, length = cache.shape[1], int(lengths.max())
    used, tiles = -(-length // cache.shape[2]), -(-length // TILE)
    found = cache[blocks[:, :used].long()].transpose(1, 2).reshape(len(blocks), kv_heads, -1, TILE * cache.shape[3])
    keys, values, params = tile_parts(found[:, :, :tiles], size, num_bits)
    keys, values = keys.transpose(-3, -2), values.transpose(-2, -1)  # features last
    if num_bits[0] == 4:
        keys = torch.stack((keys & 15, keys >> 4), -2)
    if num_bits[1] == 4:
        values = torch.cat((values & 15, values >> 4), -1)
    padded = -(-length // CHUNK) * CHUNK
    codes = torch.zeros(2, len(blocks), kv_heads, padded, size, dtype=torch.float64)
    for to, part in zip(codes, (keys, values), strict=True):
        to[:, :, : tiles * TILE] = part.reshape(len(blocks), kv_heads, -1, size)
    numbers = torch.zeros(4, len(blocks), kv_heads, padded)
    numbers[..., : tiles * TILE] = params.movedim(-2, 0).flatten(-2)
    # Beyond a sequence's end lies what was there before, which may be no number at all.
    numbers.masked_fill_((torch.arange(padded) >= lengths[:, None])[:, None], 0)
    return codes[0], codes[1], numbers


def attend_causally(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    params: torch.Tensor,
    last_seen: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`attend` for q [sequences, kv_heads, share, queries, head_size], in pieces, without chunks that none sees.

    last_seen [sequences, queries] are the queries' own places.
    """
    out = torch.empty_like(q)
    step = max(1, SCORE_ELEMENTS // (q[..., 0, 0].numel() * keys.shape[-2]))
    for start in range(0, q.shape[-2], step):
        last = last_seen[:, start : start + step, None]
        end = -(-(int(last.max()) + 1) // CHUNK) * CHUNK
        age = last - torch.arange(end)
        hidden = age < 0 if window is None else (age < 0) | (age >= window)
        cells = (keys[..., :end, :], values[..., :end, :], params[..., :end])
        out[..., start : start + step, :] = attend(
            q[..., start : start + step, :], *cells, hidden[:, None, None], scale
        )
    return out


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    """The reference's `attend` for many heads, all chunks at once.

    Args:
        q: [..., share, queries, head_size] float32.
        keys, values: codes [..., tokens, head_size] float64; tokens are whole chunks.
        params: [4, ..., tokens] float32; beyond the sequence any number but NaN.
        hidden: what is not seen, bool, broadcast to [..., share, queries, tokens].
        scale: of the scores.
    """
    shape = q.shape
    key_scale, key_zero, value_scale, value_zero = params[..., None, :].unbind()
    rows = q.flatten(-3, -2)
    whole, step = _whole_numbers(rows, rows.abs())
    scores = (whole @ keys.mT).float().mul_(key_scale)
    scores.add_(whole.sum(-1, keepdim=True).float() * key_zero).mul_(step * (scale * math.log2(math.e)))
    scores.view(*shape[:-1], -1).masked_fill_(hidden, HIDDEN)
    scores = scores.unflatten(-1, (-1, CHUNK))  # [..., rows, chunks, CHUNK]
    exponents = scores.amax(-1, keepdim=True).round_().clamp_(min=LOWEST)
    weights = _powers(scores, exponents)
    scaled = weights * value_scale.unflatten(-1, (-1, CHUNK))
    whole, steps = _whole_numbers(scaled, scaled)
    products = (whole.transpose(-3, -2) @ values.unflatten(-2, (-1, CHUNK))).float().transpose(-3, -2)
    totals = sum_by_halves(weights)
    zeros = sum_by_halves(weights.mul_(value_zero.unflatten(-1, (-1, CHUNK))))
    return _sum_chunks(exponents, products, steps, totals, zeros).view(shape)


def _whole_numbers(x: torch.Tensor, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = magnitude.amax(-1, keepdim=True).clamp_(min=TINY)
    return (x * (torch.full_like(largest, LEVELS) / largest)).round_().double(), largest / LEVELS


def _powers(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """2^(x - exponent), in place of x."""
    whole = x.round()
    fraction = x.sub_(whole)
    y = fraction * POWER[0]
    for coefficient in POWER[1:-1]:
        y.add_(coefficient).mul_(fraction)
    return y.add_(POWER[-1]).mul_(_power_of_two(whole.sub_(exponent)))


def _power_of_two(k: torch.Tensor) -> torch.Tensor:
    """2^k by its bits; an exponent of 127 less than none is zero."""
    return (torch.where(k >= CUT, k, -127.0).to(torch.int32) + 127).bitwise_left_shift_(23).view(torch.float32)


def _sum_chunks(
    exponents: torch.Tensor, products: torch.Tensor, steps: torch.Tensor, totals: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """Results [..., rows, head_size] from products [..., rows, chunks, head_size] and [..., rows, chunks, 1]."""
    largest = exponents.cummax(-2).values
    before = torch.cat((torch.full_like(largest[..., :1, :], LOWEST), largest[..., :-1, :]), -2)
    old, new = _power_of_two(before - largest), _power_of_two(exponents - largest)
    products = products * (steps * new)
    totals, zeros = totals * new, zeros * new
    result, total, zero = (torch.zeros_like(part[..., 0, :]) for part in (products, totals, zeros))
    for i in range(products.shape[-2]):
        result = result * old[..., i, :] + products[..., i, :]
        total = total * old[..., i, :] + totals[..., i, :]
        zero = zero * old[..., i, :] + zeros[..., i, :]
    return (result + zero) / total
