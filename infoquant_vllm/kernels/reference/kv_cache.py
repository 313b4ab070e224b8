"""The quantized KV cache: what is stored for a token, and attention over it.

The cache is [blocks, kv_heads, block, bytes] uint8, a block being a multiple of 16 tokens. Sixteen
tokens of a block and kv-head are a tile of 16 * bytes, in which features and tokens stand as
products of four bytes at a time need them. With 4-bit codes:

1. keys [head_size / 8, 16 tokens, 4]: byte j of features 8 i .. 8 i + 7 holds feature 8 i + j in its
   low nibble and 8 i + 4 + j in its high one
2. values [4, head_size / 2, 4 tokens]: the byte of feature d and of d + head_size / 2, likewise
3. float16 [4, 16 tokens]: key scales, key zeros, value scales, value zeros

With 8-bit codes keys are [head_size / 4, 16 tokens, 4] and values [4, head_size, 4 tokens]. `num_bits`
says how many keys have, and how many values.
"""

import math

import torch
from torch.nn import functional

from infoquant_vllm.format import apply_hadamard

TILE = 16
CHUNK = 128  # tokens that are summed together
LEVELS = 32512  # 127 * 256: whole numbers up to here are 256 a + b with signed bytes a and b
TINY = 2.0**-100
CUT = -64  # weights below 2^CUT of the largest count as none
POWER = (0.009600395, 0.055916894, 0.24023719, 0.69312197, 1.0)  # of 2^f on [-1/2, 1/2], to 3e-6


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
    """Write key, value [tokens, kv_heads, head_size] into the cache.

    Slot s is place s % block of block s // block; tokens with a negative slot are skipped.
    key_clip_ratio, value_clip_ratio [kv_heads, 2]; key_mean [kv_heads, head_size] is subtracted from keys, which then
    go through `apply_hadamard` where `hadamard` says so.
    """
    block, size = cache.shape[2], key.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        k, v = key[token].float(), value[token].float()
        k = k if key_mean is None else k - key_mean
        tiles = cache[slot // block].view(cache.shape[1], block // TILE, -1)[:, slot % block // TILE]
        keys, values, params = tile_parts(tiles, size, num_bits)
        lane = slot % TILE
        k_codes, params[:, 0, lane], params[:, 1, lane] = quantize(
            apply_hadamard(k) if hadamard else k, key_clip_ratio, num_bits[0]
        )
        v_codes, params[:, 2, lane], params[:, 3, lane] = quantize(v, value_clip_ratio, num_bits[1])
        if num_bits[0] == 4:
            k_codes = k_codes.unflatten(-1, (-1, 2, 4))
            k_codes = k_codes[:, :, 0] | (k_codes[:, :, 1] << 4)
        if num_bits[1] == 4:
            v_codes = v_codes[:, : size // 2] | (v_codes[:, size // 2 :] << 4)
        keys[:, :, lane] = k_codes.view(len(tiles), -1, 4)
        values[:, lane // 4, :, lane % 4] = v_codes


def tile_parts(
    tiles: torch.Tensor, size: int, num_bits: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of tiles [..., bytes]: keys [..., features, 16, 4], values [..., 4, features, 4], float16 [..., 4, 16]."""
    key_bytes, value_bytes = (TILE * size * bits // 8 for bits in num_bits)
    keys = tiles[..., :key_bytes].unflatten(-1, (-1, TILE, 4))
    values = tiles[..., key_bytes : key_bytes + value_bytes].unflatten(-1, (4, -1, 4))
    return keys, values, tiles[..., key_bytes + value_bytes :].view(torch.float16).unflatten(-1, (4, TILE))


def quantize(x: torch.Tensor, clip: torch.Tensor, num_bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 of x [..., kv_heads, head_size] float32, their scales and zeros float16 [..., kv_heads]."""
    largest = 2**num_bits - 1
    low = x.amin(-1).clamp(max=0) * clip[:, 0]
    high = x.amax(-1).clamp(min=0) * clip[:, 1]
    scale = ((high - low) / largest).clamp(2**-20, 65504).half()
    zero = low.clamp(-65504, 65504).half()
    codes = torch.round((x - zero.float()[..., None]) / scale.float()[..., None]).clamp(0, largest)
    return codes.to(torch.uint8), scale, zero


def kv_read(
    cache: torch.Tensor, blocks: torch.Tensor, size: int, num_bits: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Key and value codes uint8 [kv_heads, tokens, head_size] of some blocks, parameters [4, kv_heads, tokens] float16.

    A key (rotated as it was stored) or a value is code * scale + zero; see the tile for the parameters' order.
    """
    tiles = cache[blocks.long()].transpose(0, 1).reshape(cache.shape[1], -1, TILE * cache.shape[3])
    keys, values, params = tile_parts(tiles, size, num_bits)
    keys, values = keys.permute(0, 1, 3, 2, 4), values.permute(0, 1, 2, 4, 3)  # [heads, tiles, 16, n, 4], [.., 4, 4, n]
    if num_bits[0] == 4:
        keys = torch.stack((keys & 15, keys >> 4), -2)
    if num_bits[1] == 4:
        values = torch.cat((values & 15, values >> 4), -1)
    tokens = tiles.shape[1] * TILE
    return (
        keys.reshape(len(tiles), tokens, size),
        values.reshape(len(tiles), tokens, size),
        params.permute(2, 0, 1, 3).flatten(2),
    )


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
    soft_cap: float | None = None,
) -> None:
    """Causal attention of query [tokens, heads, head_size] over the cache, sequence by sequence.

    Sequence i has the queries query_starts[i] .. query_starts[i + 1], which are its last tokens,
    and its seq_lens[i] cells in the blocks block_table[i]; all three int32. A query sees itself and
    the tokens before it, with a window only the last `window` of these. A score s counts as
    soft_cap * tanh(s / soft_cap) where there is one (Gemma 2, 2024, section 2). Writes `out`, shaped
    as query, in its dtype; see `attend` for what is computed.
    """
    for i, length in enumerate(seq_lens.tolist()):
        start, end = query_starts[i : i + 2].tolist()
        if start == end:
            continue
        keys, values, params = kv_read(cache, block_table[i], query.shape[2], num_bits)
        age = torch.arange(length - end + start, length)[:, None] - torch.arange(length)
        visible = (age >= 0) & (age < window) if window is not None else age >= 0
        q = query[start:end].float()
        q = apply_hadamard(q) if hadamard else q
        for head in range(query.shape[1]):
            h = head * len(keys) // query.shape[1]
            cells = (keys[h, :length], values[h, :length], params[:, h, :length])
            out[start:end, head] = attend(q[:, head], *cells, visible, scale, soft_cap).to(out.dtype)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    params: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """One head: q [queries, head_size] float32, keys and values [tokens, head_size] codes, params [4, tokens].

    softmax(scale * q @ k.T) @ v, where visible [queries, tokens], with queries and weights rounded
    to whole numbers. The products with codes are exact then, in any order; all else is float32, and
    every operation rounds, in the order stated here. So a row is the same bits in every batch,
    chunk, split of the context and number of threads.

    Tokens are summed in chunks of CHUNK, counted from the sequence's first token. The weights of a
    chunk are relative to 2^exponent, its greatest score in powers of two; sums over chunks
    (`result`, `total`, `zero`) are relative to 2^largest, the greatest exponent so far. Going from
    one to the other is a factor that is a power of two, so it does not round. After Dao et al.,
    FlashAttention, 2022, and Milakov and Gimelshein, Online normalizer calculation, 2018.
    """
    padding = -len(keys) % CHUNK
    key_scale, key_zero, value_scale, value_zero = params.float()
    whole_q, step = whole_numbers(q)
    products = (whole_q @ keys.double().T).float() * key_scale + whole_q.sum(-1, keepdim=True).float() * key_zero
    scores = products * (step * (scale * math.log2(math.e)))
    if soft_cap:
        cap = soft_cap * math.log2(math.e)
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, -math.inf)
    scores = functional.pad(scores, (0, padding), value=-math.inf)
    value_scale, value_zero = (functional.pad(x, (0, padding)) for x in (value_scale, value_zero))
    values = functional.pad(values.double(), (0, 0, 0, padding))
    largest = torch.full((len(q), 1), -math.inf)
    result, total, zero = torch.zeros_like(q), torch.zeros(len(q), 1), torch.zeros(len(q), 1)
    for start in range(0, len(values), CHUNK):
        chunk = slice(start, start + CHUNK)
        exponent = scores[:, chunk].amax(-1, keepdim=True).round()
        weights = powers(scores[:, chunk], exponent)
        whole, step = whole_numbers(weights * value_scale[chunk])
        before, largest = largest, torch.maximum(largest, exponent)
        old, new = power_of_two(before - largest), power_of_two(exponent - largest)
        result = result * old + (whole @ values[chunk]).float() * (step * new)
        total = total * old + sum_by_halves(weights) * new
        zero = zero * old + sum_by_halves(weights * value_zero[chunk]) * new
    return (result + zero) / total


def whole_numbers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., n] as whole numbers up to LEVELS, float64 for exact sums of products, times steps [..., 1]."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=TINY)
    return torch.round(x * (torch.full_like(largest, LEVELS) / largest)).double(), largest / LEVELS


def powers(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """2^(x - exponent) for a whole exponent, by a polynomial in what x is above or below a whole number."""
    whole = x.round()
    fraction, power = x - whole, power_of_two(whole - exponent)
    y = torch.full_like(x, POWER[0])
    for coefficient in POWER[1:]:
        y = y * fraction + coefficient
    return torch.where(power > 0, y * power, 0)


def power_of_two(k: torch.Tensor) -> torch.Tensor:
    """2^k for whole k <= 0; 0 below CUT, and for what is not a number (of a chunk of which nothing is visible)."""
    return torch.where(k >= CUT, torch.exp2(k.double()).float(), 0)


def sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    """Sums [..., 1] of x [..., CHUNK]: entries 64 apart first, of the sums those 32 apart, and so on."""
    while x.shape[-1] > 1:
        first, second = x.chunk(2, -1)
        x = first + second
    return x
