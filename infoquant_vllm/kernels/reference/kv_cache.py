"""The quantised KV cache: what is stored for a token, and attention over it."""

import torch

from infoquant_vllm.format import apply_hadamard, pack_codes, unpack_codes


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
    """Write key, value [tokens, kv_heads, head_size] into cache [blocks, kv_heads, block, bytes].

    Slot s is place s % block of block s // block; tokens with a negative slot are skipped.
    key_clip, value_clip [kv_heads, 2]; keys go through `apply_hadamard` where `hadamard` says so.
    A cell: key codes | value codes | float16 key scale, key zero, value scale, value zero.
    """
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        k, v = key[token].float(), value[token].float()
        k_codes, k_params = _quantise(apply_hadamard(k) if hadamard else k, key_clip, num_bits)
        v_codes, v_params = _quantise(v, value_clip, num_bits)
        params = torch.cat((k_params, v_params), -1).view(torch.uint8)
        cache[slot // cache.shape[2], :, slot % cache.shape[2]] = torch.cat((k_codes, v_codes, params), -1)


def _quantise(x: torch.Tensor, clip: torch.Tensor, num_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    qmax = 2**num_bits - 1
    low = x.amin(-1).clamp(max=0) * clip[:, 0]
    high = x.amax(-1).clamp(min=0) * clip[:, 1]
    scale = ((high - low) / qmax).clamp(2**-20, 65504).half()
    zero = low.clamp(-65504, 65504).half()
    codes = torch.round((x - zero.float()[:, None]) / scale.float()[:, None]).clamp(0, qmax)
    return pack_codes(codes, num_bits, signed=False), torch.stack((scale, zero), -1)


def kv_read(cells: torch.Tensor, head_size: int, num_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (rotated as they were stored) and values [..., head_size] float64 of cells [..., bytes]."""
    width = head_size * num_bits // 8
    params = cells[..., 2 * width :].contiguous().view(torch.float16).double()
    key = unpack_codes(cells[..., :width], num_bits, signed=False) * params[..., 0:1] + params[..., 1:2]
    value = unpack_codes(cells[..., width : 2 * width], num_bits, signed=False) * params[..., 2:3] + params[..., 3:4]
    return key, value


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
    """Causal attention of query [tokens, heads, head_size] over the cache, sequence by sequence.

    Sequence i has the queries query_starts[i] .. query_starts[i + 1], which are its last tokens,
    and its seq_lens[i] cells in the blocks block_table[i]. A query sees itself and the tokens
    before it, with a window only the last `window` of these. Returns float64, shaped as query.
    """
    out = torch.zeros(query.shape, dtype=torch.float64)
    for i, length in enumerate(seq_lens):
        start, end = query_starts[i], query_starts[i + 1]
        cells = cache[block_table[i].long()].transpose(0, 1).flatten(1, 2)[:, :length]  # [kv_heads, length, bytes]
        key, value = kv_read(cells, query.shape[2], num_bits)
        q = query[start:end].float()
        q = (apply_hadamard(q) if hadamard else q).double()
        share = query.shape[1] // len(key)
        scores = torch.einsum("thd,hld->htl", q, key.repeat_interleave(share, 0)) * scale
        age = torch.arange(length - end + start, length)[:, None] - torch.arange(length)
        hidden = (age < 0) | (age >= window) if window is not None else age < 0
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = torch.einsum("htl,hld->thd", weights, value.repeat_interleave(share, 0))
    return out
