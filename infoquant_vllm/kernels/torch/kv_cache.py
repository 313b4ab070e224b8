"""The quantized KV cache: what it stores for a token, and attention over it.

The cache is [blocks, kv_heads, block, bytes] uint8; a block is a multiple of 16 tokens. Each KV sub-block of 16 tokens
of one kv-head is 16 * bytes, in which features and tokens stand as products of four bytes at a time need them. With
4-bit codes:

1. keys [head_size / 8, 16 tokens, 4]: byte j of features 8 i .. 8 i + 7 holds feature 8 i + j in its
   low nibble and 8 i + 4 + j in its high one
2. values [4, head_size / 2, 4 tokens]: the byte of feature d and of d + head_size / 2, likewise
3. float16 [4, 16 tokens]: key scales, key zeros, value scales, value zeros

With 8-bit codes keys are [head_size / 4, 16 tokens, 4] and values [4, head_size, 4 tokens]. `num_bits` are those of
keys and of values.
"""

import math
from itertools import pairwise

import torch

from infoquant_vllm.format import apply_hadamard
from infoquant_vllm.kernels.operands import KVCalibration, KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.torch.quantize import quantize_kv

SUB_BLOCK = 16  # tokens
SOFTMAX_STEP = 128  # tokens per step of the online softmax
MAX_INT16 = 32512  # 127 * 256: integers up to here are 256 a + b with signed bytes a and b
MIN_MAGNITUDE = 2.0**-100
MIN_EXPONENT = -64  # weights below 2^MIN_EXPONENT of the largest are zero
FLAT_EXPONENT = 60  # tanh(x) is 1 in float32 where 2^FLAT_EXPONENT is below e^(2x)
EXP2_POLYNOMIAL = (0.009600395, 0.055916894, 0.24023719, 0.69312197, 1.0)  # 2^f on [-1/2, 1/2], to 3e-6
SCORE_ELEMENTS = 2**18  # scores at a time; keeps the many steps from scores to weights in the processor's cache
CODE_ELEMENTS = 2**23  # codes at a time; 64 MiB of float64
MASKED, LOWEST_EXPONENT = -(2.0**30), -(2.0**20)  # the score of a masked token, and less than any score's exponent


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    calibration: KVCalibration,
    scheme: KVScheme,
) -> None:
    """Quantize key, value [tokens, kv_heads, head_size] and write them into the cache.

    Slot s is offset s % block of block s // block; tokens with a negative slot are padding and skipped.
    """
    key_clip_ratio, value_clip_ratio, key_mean, key_feedback = calibration
    num_bits, hadamard = scheme
    mask = slots >= 0
    slots = slots[mask]
    if len(slots) == 0:
        return
    key, value = (x[: len(mask)][mask].float() for x in (key, value))
    key = key if key_mean is None else key - key_mean
    key = apply_hadamard(key) if hadamard else key
    k_codes, *k_qparams = quantize_kv(key, key_clip_ratio, num_bits[0], key_feedback)
    v_codes, *v_qparams = quantize_kv(value, value_clip_ratio, num_bits[1])
    k_bytes, v_bytes = k_codes.to(torch.uint8), v_codes.to(torch.uint8)
    if num_bits[0] == 4:
        k_bytes = k_bytes.unflatten(-1, (-1, 2, 4))
        k_bytes = k_bytes[..., 0, :] | (k_bytes[..., 1, :] << 4)
    if num_bits[1] == 4:
        first, second = v_bytes.chunk(2, -1)
        v_bytes = first | (second << 4)
    blocks, kv_heads, block, _ = cache.shape
    keys, values, qparams = _split(cache.view(blocks, kv_heads, block // SUB_BLOCK, -1), key.shape[2], num_bits)
    index, sub_block, token = slots // block, slots % block // SUB_BLOCK, slots % SUB_BLOCK
    keys[index, :, sub_block, :, token] = k_bytes.reshape(len(slots), kv_heads, -1, 4)
    values[index, :, sub_block, token // 4, :, token % 4] = v_bytes
    qparams[index, :, sub_block, :, token] = torch.stack((*k_qparams, *v_qparams), -1)


def _split(
    sub_blocks: torch.Tensor, size: int, num_bits: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View sub-blocks [..., bytes] as keys [..., n, 16, 4], values [..., 4, n, 4] and qparams float16 [..., 4, 16]."""
    key_bytes, value_bytes = (SUB_BLOCK * size * bits // 8 for bits in num_bits)
    keys = sub_blocks[..., :key_bytes].unflatten(-1, (-1, SUB_BLOCK, 4))
    values = sub_blocks[..., key_bytes : key_bytes + value_bytes].unflatten(-1, (4, -1, 4))
    qparams = sub_blocks[..., key_bytes + value_bytes :].view(torch.float16).unflatten(-1, (4, SUB_BLOCK))
    return keys, values, qparams


def kv_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    sequences: Sequences,
    score: ScoreParams,
    scheme: KVScheme,
    out: torch.Tensor,
) -> None:
    """Compute causal attention of query [tokens, heads, head_size] over the cache.

    A query sees itself and the tokens before it. Writes `out`, shaped as query, in its dtype; see `attend` for the
    arithmetic.
    """
    query_starts, seq_lens, block_table = sequences
    scale, window, soft_cap = score
    num_bits, hadamard = scheme
    tokens, heads, size = query.shape
    q = query.float()
    q = (apply_hadamard(q) if hadamard else q).view(tokens, cache.shape[1], -1, size)  # [.., kv_heads, GQA group, ..]
    starts, lens = query_starts.tolist(), seq_lens.tolist()
    for rows, queries in _batches(starts, lens, heads * size):
        offsets = torch.arange(queries, device=query.device)
        where = torch.tensor([starts[row] for row in rows], device=query.device)[:, None] + offsets
        lengths = torch.tensor([lens[row] for row in rows], device=query.device)
        keys, values, qparams = _read(cache, block_table[rows], lengths, size, num_bits)
        positions = lengths[:, None] - queries + offsets
        grouped = q[where].permute(0, 2, 3, 1, 4)  # [sequences, kv_heads, GQA group, queries, head_size]
        found = _attend_in_pieces(grouped, (keys, values, qparams), positions, scale, window, soft_cap)
        out[where] = found.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out.dtype)


def _batches(query_starts: list[int], seq_lens: list[int], head_elements: int) -> list[tuple[list[int], int]]:
    """Group sequences as (indices, queries of each): decoding ones together as memory allows, others alone."""
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
    """Read keys, values and qparams of some sequences, padded to whole steps, as `attend` takes them."""
    kv_heads, length = cache.shape[1], int(lengths.max())
    used, sub_blocks = -(-length // cache.shape[2]), -(-length // SUB_BLOCK)
    found = cache[blocks[:, :used].long()].transpose(1, 2)
    found = found.reshape(len(blocks), kv_heads, -1, SUB_BLOCK * cache.shape[3])
    keys, values, qparams = _split(found[:, :, :sub_blocks], size, num_bits)
    keys, values = keys.transpose(-3, -2), values.transpose(-2, -1)  # features last
    if num_bits[0] == 4:
        keys = torch.stack((keys & 15, keys >> 4), -2)
    if num_bits[1] == 4:
        values = torch.cat((values & 15, values >> 4), -1)
    padded = -(-length // SOFTMAX_STEP) * SOFTMAX_STEP
    codes = torch.zeros(2, len(blocks), kv_heads, padded, size, dtype=torch.float64, device=cache.device)
    for to, part in zip(codes, (keys, values), strict=True):
        to[:, :, : sub_blocks * SUB_BLOCK] = part.reshape(len(blocks), kv_heads, -1, size)
    padded_qparams = torch.zeros(4, len(blocks), kv_heads, padded, device=cache.device)
    padded_qparams[..., : sub_blocks * SUB_BLOCK] = qparams.movedim(-2, 0).flatten(-2)
    # Beyond the end of a sequence the cache holds earlier contents, which may be NaN.
    padded_qparams.masked_fill_((torch.arange(padded, device=cache.device) >= lengths[:, None])[:, None], 0)
    return codes[0], codes[1], padded_qparams


def _attend_in_pieces(
    q: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Call `attend` for some queries at a time, without steps that none of them sees.

    q [sequences, kv_heads, GQA group, queries, head_size] at positions [sequences, queries].
    """
    keys, values, qparams = context
    out = torch.empty_like(q)
    count = max(1, SCORE_ELEMENTS // (q[..., 0, 0].numel() * keys.shape[-2]))
    for start in range(0, q.shape[-2], count):
        piece = slice(start, start + count)
        last = positions[:, piece, None]
        end = -(-(int(last.max()) + 1) // SOFTMAX_STEP) * SOFTMAX_STEP
        age = last - torch.arange(end, device=q.device)
        mask = age < 0 if window is None else (age < 0) | (age >= window)
        seen = keys[..., :end, :], values[..., :end, :], qparams[..., :end]
        out[..., piece, :] = attend(q[..., piece, :], *seen, mask[:, None, None], scale, soft_cap)
    return out


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    qparams: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Compute softmax(scale * q @ k.T) @ v with queries and weights rounded to int16.

    Products with codes are exact then, in any order (float64 holds their sums); all else is float32, and every
    operation rounds, in the order stated here. So a row is the same bits in every batch, prefill chunk, split of the
    context and number of threads.

    Tokens are summed in steps of SOFTMAX_STEP, counted from the first token of the sequence. The weights of a step are
    relative to 2^exponent, its greatest score in powers of two; sums over steps are relative to the greatest exponent
    so far. Going from one to the other is a factor that is a power of two, so it does not round. After Dao et al.,
    FlashAttention, 2022, and Milakov and Gimelshein, Online normalizer calculation, 2018.

    Args:
        q: [..., GQA group, queries, head_size] float32.
        keys, values: codes [..., tokens, head_size] float64; tokens are whole steps.
        qparams: [4, ..., tokens] float32; for padding any number but NaN.
        mask: True where a query does not see a token, broadcasts to [..., GQA group, queries, tokens].
        scale, soft_cap: see `kv_attention`.
    """
    shape, log2_e = q.shape, math.log2(math.e)
    key_scale, key_zero, value_scale, value_zero = qparams[..., None, :].unbind()
    rows = q.flatten(-3, -2)
    int16, int16_scale = _round_to_int16(rows, rows.abs())
    scores = (int16 @ keys.mT).float().mul_(key_scale)
    scores.add_(int16.sum(-1, keepdim=True).float() * key_zero).mul_(int16_scale * (scale * log2_e))
    if soft_cap:
        scores = _soft_capped(scores, soft_cap * log2_e)
    scores.view(*shape[:-1], -1).masked_fill_(mask, MASKED)
    scores = scores.unflatten(-1, (-1, SOFTMAX_STEP))  # [..., rows, steps, SOFTMAX_STEP]
    exponents = scores.amax(-1, keepdim=True).round_().clamp_(min=LOWEST_EXPONENT)
    weights = _exp2(scores, exponents)
    scaled = weights * value_scale.unflatten(-1, (-1, SOFTMAX_STEP))
    int16, int16_scales = _round_to_int16(scaled, scaled)
    products = (int16.transpose(-3, -2) @ values.unflatten(-2, (-1, SOFTMAX_STEP))).float().transpose(-3, -2)
    totals = _sum_by_halves(weights)
    zeros = _sum_by_halves(weights.mul_(value_zero.unflatten(-1, (-1, SOFTMAX_STEP))))
    return _sum_steps(exponents, products, int16_scales, totals, zeros).view(shape)


def _round_to_int16(x: torch.Tensor, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round x [..., n] to integers up to MAX_INT16, as float64 for exact sums of products; return their scales too."""
    largest = magnitude.amax(-1, keepdim=True).clamp_(min=MIN_MAGNITUDE)
    return (x * (torch.full_like(largest, MAX_INT16) / largest)).round_().double(), largest / MAX_INT16


def _exp2(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Compute 2^(x - exponent) for integer exponents, in place of x: a polynomial in x - round(x)."""
    integer = x.round()
    fraction = x.sub_(integer)
    y = fraction * EXP2_POLYNOMIAL[0]
    for coefficient in EXP2_POLYNOMIAL[1:-1]:
        y.add_(coefficient).mul_(fraction)
    return y.add_(EXP2_POLYNOMIAL[-1]).mul_(_power_of_two(integer.sub_(exponent)))


def _soft_capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Compute cap * tanh(x / cap), in place of x: as cap - 2 cap / (e^(2 x / cap) + 1)."""
    factor = torch.tensor(2 * math.log2(math.e)).float() / torch.tensor(cap).float()
    power = _exp2(x.mul_(factor).clamp_(-FLAT_EXPONENT, FLAT_EXPONENT), torch.zeros(()))
    return power.add_(1).reciprocal_().mul_(-2 * cap).add_(cap)


def _power_of_two(k: torch.Tensor) -> torch.Tensor:
    """Build 2^k for integers k <= FLAT_EXPONENT from its bits; 0 below MIN_EXPONENT and for NaN."""
    return (torch.where(k >= MIN_EXPONENT, k, -127.0).to(torch.int32) + 127).bitwise_left_shift_(23).view(torch.float32)


def _sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    """Sum x [..., SOFTMAX_STEP] to [..., 1]: entries 64 apart first, of the sums those 32 apart, and so on."""
    while x.shape[-1] > 1:
        first, second = x.chunk(2, -1)
        x = first + second
    return x


def _sum_steps(
    exponents: torch.Tensor, products: torch.Tensor, scales: torch.Tensor, totals: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    """Combine steps to [..., rows, head_size]: products [..., rows, steps, head_size], others [..., rows, steps, 1]."""
    largest = exponents.cummax(-2).values
    before = torch.cat((torch.full_like(largest[..., :1, :], LOWEST_EXPONENT), largest[..., :-1, :]), -2)
    old, new = _power_of_two(before - largest), _power_of_two(exponents - largest)
    products, totals, zeros = products * (scales * new), totals * new, zeros * new
    result, total, zero = (torch.zeros_like(part[..., 0, :]) for part in (products, totals, zeros))
    for i in range(products.shape[-2]):
        result = result * old[..., i, :] + products[..., i, :]
        total = total * old[..., i, :] + totals[..., i, :]
        zero = zero * old[..., i, :] + zeros[..., i, :]
    return (result + zero) / total
