"""Naive versions of the kernels, token by token and group by group: what all implementations are tested against.

They import the checkpoint format and the tuples of operands, and no kernel: an error in a helper cannot hide in both.
"""

import math

import torch
from torch.nn import functional

from infoquant_vllm.format import apply_hadamard, unpack_codes
from infoquant_vllm.kernels.operands import InputQuant, KVCalibration, KVScheme, PackedWeight, ScoreParams, Sequences

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes, scales and zeros of keys or values."""
Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Values int8 [tokens, K], scales float32 and offsets int32 [tokens, segments]; x is about (value - offset) * scale."""

SUB_BLOCK = 16
STEP = 128
MAX_INT16 = 32512
POLYNOMIAL = (0.009600395, 0.055916894, 0.24023719, 0.69312197, 1.0)


def apply_transform(x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int) -> torch.Tensor:
    """Apply the input transform to x [tokens, K] float32, one block after the other."""
    if hadamard:
        return torch.cat([apply_hadamard(part) for part in x.split(hadamard, 1)], 1)
    if not matrices:
        return x
    if matrices[0].dim() == 3:
        parts = zip(x.split(matrices[0].shape[1], 1), matrices[0], strict=True)
        return torch.cat([(part.double() @ matrix.double()).float() for part, matrix in parts], 1)
    left, right = (matrix.double() for matrix in matrices)
    halfway = (left.T @ x.unflatten(1, (len(left), -1)).double()).float()
    return (halfway.double() @ right).float().flatten(1)


def rotate_quantize(x: torch.Tensor, inputs: InputQuant) -> Quantized:
    """Transform and quantize x [tokens, K], one segment after the other, as `InputQuant` says."""
    y = apply_transform(x.float(), inputs.matrices, inputs.hadamard)
    if inputs.mean is not None:
        y = torch.stack([row - inputs.mean for row in y]) if len(y) else y
    if inputs.clip_ratio is None:
        return quantize_int16(y)
    clips = inputs.clip_ratio.chunk(inputs.segments)
    found = [_quantize_segment(part, clip, inputs) for part, clip in zip(y.chunk(len(clips), 1), clips, strict=True)]
    values, scales, offsets = zip(*found, strict=True)
    offset = torch.stack(offsets, 1) if inputs.num_bits == 8 else None
    return torch.cat(values, 1), torch.stack(scales, 1), offset


def _quantize_segment(
    y: torch.Tensor, clip: torch.Tensor, inputs: InputQuant
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize y [tokens, features] with one scale: values int8, scale float32 [tokens], offset int32 [tokens]."""
    qmax = 2**inputs.num_bits - 1
    parts = y.chunk(len(clip), 1)
    steps, zeros = zip(*(_range(part, factors, inputs) for part, factors in zip(parts, clip, strict=True)), strict=True)
    if len(parts) == 1:
        codes = torch.clamp(torch.round(y * (1 / steps[0])[:, None]) + zeros[0][:, None], 0, qmax)
        center = zeros[0] if inputs.num_bits == 4 else torch.full_like(zeros[0], 128)
        return (codes - center[:, None]).to(torch.int8), steps[0], (zeros[0] - center).int()
    far = [step * torch.maximum(zero, qmax - zero) for step, zero in zip(steps, zeros, strict=True)]
    scale = torch.stack(far).amax(0) / 120
    values = []
    for part, step, zero in zip(parts, steps, zeros, strict=True):
        codes = torch.clamp(torch.round(part * (1 / step)[:, None]) + zero[:, None], 0, qmax)
        values.append(torch.round((codes - zero[:, None]) * (step * (1 / scale))[:, None]))
    return torch.cat(values, 1).to(torch.int8), scale, torch.zeros(len(y), dtype=torch.int32)


def _range(y: torch.Tensor, clip: torch.Tensor, inputs: InputQuant) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the step and the zero-point of each token's group y [tokens, size]."""
    low, high = y.amin(1).clamp(max=0) * clip[0], y.amax(1).clamp(min=0) * clip[1]
    if inputs.symmetric:
        step = (torch.maximum(-low, high) / (2 ** (inputs.num_bits - 1) - 1)).clamp(min=1e-12)
        return step, torch.full_like(step, 2 ** (inputs.num_bits - 1))
    step = ((high - low) / (2**inputs.num_bits - 1)).clamp(min=1e-12)
    return step, torch.round(-low * (1 / step))


def quantize_int16(y: torch.Tensor) -> Quantized:
    """Quantize y [tokens, K] float32 to int16: a row of high bytes and one of low bytes for each token."""
    step = (y.abs().amax(1, keepdim=True) / 32767).clamp(min=1e-12)
    codes = torch.round(y * (1 / step)).int() + 32768
    scale = torch.stack((step * 256, step), 1)
    offset = torch.tensor([[0], [-128]], dtype=torch.int32).expand(len(y), 2, 1)
    values = torch.stack((codes // 256, codes % 256), 1) - 128
    return values.flatten(0, 1).to(torch.int8), scale.flatten(0, 1), offset.flatten(0, 1)


def quantized_linear(x: Quantized, weight: PackedWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Multiply quantized activations [tokens, K] by a checkpoint's weight in int64, segment by segment."""
    values, scale, offset = x
    features, segments = values.shape[1], scale.shape[1]
    num_bits = 8 * weight.packed.shape[1] // features
    integers = unpack_codes(weight.packed, num_bits, signed=weight.zero_point is None).long()
    if weight.zero_point is not None:
        integers = integers - weight.zero_point.long().repeat_interleave(features // weight.zero_point.shape[1], 1)
    if weight.multiplier is not None:
        integers = integers * weight.multiplier.long().repeat_interleave(features // weight.multiplier.shape[1], 1)
    centered = values.long()
    if offset is not None:
        centered = centered - offset.long().repeat_interleave(features // segments, 1)
    out = torch.zeros(len(values), len(integers))
    for s, (part, rows) in enumerate(zip(centered.chunk(segments, 1), integers.chunk(segments, 1), strict=True)):
        out += (part @ rows.T).float() * scale[:, s, None]
    out *= weight.scale[:, 0]
    return (out if bias is None else out + bias.float()).to(dtype)


def linear(x: torch.Tensor, inputs: InputQuant, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute a whole linear layer of x [tokens, K] and a checkpoint's tensors."""
    quantized = rotate_quantize(x, inputs)
    if inputs.clip_ratio is not None:
        return quantized_linear(quantized, weight, bias, x.dtype)
    products = quantized_linear(quantized, weight, None, torch.float32)
    out = products[0::2] + products[1::2]  # of high and of low bytes
    return (out if bias is None else out + bias.float()).to(x.dtype)


def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply x [tokens, K] by weight [N, K] in float64, rounded once."""
    return (x.double() @ weight.double().T).to(x.dtype)


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """Multiply rows [tokens, H] by rotation [H, H] in float32, each product and each sum rounded, in feature order."""
    sums = torch.zeros(rows.shape)
    for column, row in zip(rows.float().T, rotation, strict=True):
        sums += column[:, None] * row
    return (sums if gain is None else sums * gain).to(rows.dtype)


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    calibration: KVCalibration,
    scheme: KVScheme,
) -> None:
    """Write key, value [tokens, kv_heads, head_size] into the cache, token by token."""
    key_clip_ratio, value_clip_ratio, key_mean, feedback = calibration
    num_bits, hadamard = scheme
    block, size = cache.shape[2], key.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        k, v = key[token].float(), value[token].float()
        k = k if key_mean is None else k - key_mean
        sub_blocks = cache[slot // block].view(cache.shape[1], block // SUB_BLOCK, -1)[:, slot % block // SUB_BLOCK]
        keys, values, params = _parts(sub_blocks, size, num_bits)
        t = slot % SUB_BLOCK
        k = apply_hadamard(k) if hadamard else k
        k_codes, params[:, 0, t], params[:, 1, t] = _quantize_kv(k, key_clip_ratio, num_bits[0])
        if feedback is not None:
            k_codes = _codes_with_feedback(k, params[:, 0, t], params[:, 1, t], feedback, 2 ** num_bits[0] - 1)
        v_codes, params[:, 2, t], params[:, 3, t] = _quantize_kv(v, value_clip_ratio, num_bits[1])
        if num_bits[0] == 4:
            k_codes = k_codes.unflatten(-1, (-1, 2, 4))
            k_codes = k_codes[:, :, 0] | (k_codes[:, :, 1] << 4)
        if num_bits[1] == 4:
            v_codes = v_codes[:, : size // 2] | (v_codes[:, size // 2 :] << 4)
        keys[:, :, t] = k_codes.view(len(sub_blocks), -1, 4)
        values[:, t // 4, :, t % 4] = v_codes


def _codes_with_feedback(
    k: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, feedback: torch.Tensor, largest: int
) -> torch.Tensor:
    """Round k [kv_heads, head_size], feature by feature: what a code misses goes to the later ones, by `feedback`."""
    codes = torch.zeros(k.shape, dtype=torch.uint8)
    for head, one in enumerate(k):
        left, step, offset = one.clone(), scale[head].float(), zero[head].float()
        for i in range(len(one)):
            code = ((left[i] - offset) / step).round().clamp(0, largest)
            missed = left[i] - (code * step + offset)
            for j in range(i + 1, len(one)):
                left[j] = left[j] + missed * feedback[head, i, j]
            codes[head, i] = code.to(torch.uint8)
    return codes


def _parts(
    sub_blocks: torch.Tensor, size: int, num_bits: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View sub-blocks [..., bytes] as keys [..., n, 16, 4], values [..., 4, n, 4] and float16 [..., 4, 16]."""
    key_bytes, value_bytes = (SUB_BLOCK * size * bits // 8 for bits in num_bits)
    keys = sub_blocks[..., :key_bytes].unflatten(-1, (-1, SUB_BLOCK, 4))
    values = sub_blocks[..., key_bytes : key_bytes + value_bytes].unflatten(-1, (4, -1, 4))
    return keys, values, sub_blocks[..., key_bytes + value_bytes :].view(torch.float16).unflatten(-1, (4, SUB_BLOCK))


def _quantize_kv(x: torch.Tensor, clip: torch.Tensor, num_bits: int) -> Codes:
    """Quantize x [kv_heads, head_size] float32: codes uint8, scales and zeros float16 [kv_heads]."""
    largest = 2**num_bits - 1
    low = x.amin(-1).clamp(max=0) * clip[:, 0]
    high = x.amax(-1).clamp(min=0) * clip[:, 1]
    scale = ((high - low) / largest).clamp(2**-20, 65504).half()
    zero = low.clamp(-65504, 65504).half()
    codes = torch.round((x - zero.float()[..., None]) / scale.float()[..., None]).clamp(0, largest)
    return codes.to(torch.uint8), scale, zero


def kv_read(cache: torch.Tensor, blocks: torch.Tensor, size: int, num_bits: tuple[int, int]) -> Codes:
    """Read key and value codes [kv_heads, tokens, head_size] uint8 of some blocks, and params [4, kv_heads, tokens].

    A key (after R3) or a value is code * scale + zero. Params are float16: key scales, key zeros, value scales, value
    zeros.
    """
    sub_blocks = cache[blocks.long()].transpose(0, 1).reshape(cache.shape[1], -1, SUB_BLOCK * cache.shape[3])
    keys, values, params = _parts(sub_blocks, size, num_bits)
    keys, values = keys.permute(0, 1, 3, 2, 4), values.permute(0, 1, 2, 4, 3)  # [.., 16, n, 4], [.., 4, 4, n]
    if num_bits[0] == 4:
        keys = torch.stack((keys & 15, keys >> 4), -2)
    if num_bits[1] == 4:
        values = torch.cat((values & 15, values >> 4), -1)
    shape = (len(sub_blocks), sub_blocks.shape[1] * SUB_BLOCK, size)
    return keys.reshape(shape), values.reshape(shape), params.permute(2, 0, 1, 3).flatten(2)


def kv_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    sequences: Sequences,
    score: ScoreParams,
    scheme: KVScheme,
    out: torch.Tensor,
) -> None:
    """Attend from query [tokens, heads, head_size], sequence by sequence and head by head."""
    query_starts, seq_lens, block_table = sequences
    scale, window, soft_cap = score
    num_bits, hadamard = scheme
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
            context = (keys[h, :length], values[h, :length], params[:, h, :length])
            out[start:end, head] = _attend(q[:, head], *context, visible, scale, soft_cap).to(out.dtype)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    params: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    soft_cap: float | None,
) -> torch.Tensor:
    """Attend from one head, q [queries, head_size] float32, by an online softmax of STEP tokens at a time."""
    padding = -len(keys) % STEP
    key_scale, key_zero, value_scale, value_zero = params.float()
    int16, step = _round_to_int16(q)
    products = (int16 @ keys.double().T).float() * key_scale + int16.sum(-1, keepdim=True).float() * key_zero
    scores = products * (step * (scale * math.log2(math.e)))
    if soft_cap:
        scores = _soft_capped(scores, soft_cap * math.log2(math.e))
    scores = functional.pad(scores.masked_fill(~visible, -math.inf), (0, padding), value=-math.inf)
    value_scale, value_zero = (functional.pad(x, (0, padding)) for x in (value_scale, value_zero))
    values = functional.pad(values.double(), (0, 0, 0, padding))
    largest = torch.full((len(q), 1), -math.inf)
    result, total, zero = torch.zeros_like(q), torch.zeros(len(q), 1), torch.zeros(len(q), 1)
    for start in range(0, len(values), STEP):
        part = slice(start, start + STEP)
        exponent = scores[:, part].amax(-1, keepdim=True).round()
        weights = _exp2(scores[:, part], exponent)
        int16, step = _round_to_int16(weights * value_scale[part])
        before, largest = largest, torch.maximum(largest, exponent)
        old, new = _power_of_two(before - largest), _power_of_two(exponent - largest)
        result = result * old + (int16 @ values[part]).float() * (step * new)
        total = total * old + _sum_by_halves(weights) * new
        zero = zero * old + _sum_by_halves(weights * value_zero[part]) * new
    return (result + zero) / total


def _round_to_int16(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    return torch.round(x * (torch.full_like(largest, MAX_INT16) / largest)).double(), largest / MAX_INT16


def _exp2(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Compute 2^(x - exponent) for an integer exponent."""
    integer = x.round()
    fraction, power = x - integer, _power_of_two(integer - exponent)
    y = torch.full_like(x, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        y = y * fraction + coefficient
    return torch.where(power > 0, y * power, 0)


def _soft_capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Compute cap * tanh(x / cap) by an exponential function; the polynomial's error is some 2e-6 of cap."""
    cap32 = torch.tensor(cap, dtype=torch.float32)
    exponent = (x * (torch.tensor(2 * math.log2(math.e), dtype=torch.float32) / cap32)).clamp(-60, 60)
    integer = exponent.round()
    power = _exp2(exponent - integer, torch.zeros(())) * torch.exp2(integer.double()).float()
    result = cap32 - torch.full_like(x, 1) / (power + 1) * (2 * cap32)
    torch.testing.assert_close(result.double(), cap * torch.tanh(x.double() / cap), rtol=0, atol=3e-6 * cap)
    return result


def _power_of_two(k: torch.Tensor) -> torch.Tensor:
    """Compute 2^k for integers k <= 0; 0 below -64, and for NaN (of a step in which no token is visible)."""
    return torch.where(k >= -64, torch.exp2(k.double()).float(), 0)


def _sum_by_halves(x: torch.Tensor) -> torch.Tensor:
    """Sum x [..., STEP]: entries 64 apart first, of the sums those 32 apart, and so on."""
    while x.shape[-1] > 1:
        first, second = x.chunk(2, -1)
        x = first + second
    return x
