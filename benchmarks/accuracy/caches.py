"""Compare KV caches on one text: InfoQuant checkpoints and vLLM's own cache dtypes, against the unquantized model.

KL(reference || model) over the whole vocabulary, by position in a window. Checkpoints are simulated. vLLM's dtypes are
emulated on the reference, since `int4_per_token_head` runs on GPUs alone: keys and values go through the arithmetic of
vllm 0.32, v1/attention/ops/int4_per_token_head.py (`reshape_and_cache_int4`), or are rounded to float8_e4m3 with a
scale of 1, the default of --kv-cache-dtype fp8; queries stay as they are.
"""

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.common.provenance import provenance, write_rows
from infoquant_vllm.format import Checkpoint, ModelShape, hadamard
from offline.evaluate.simulate import load_simulated
from offline.model.architectures import CausalLM, head_of
from offline.model.source import Source, config_dtype
from offline.model.windowed_attention import register_attention, windowed_attention
from offline.output.report import kv_bytes_per_token
from offline.text import text_windows

BORDERS = (0, 128, 512, 2048, 8192, 32768)
"""Positions are summed up between these."""
ROWS_AT_A_TIME = 512
LARGEST_FP8 = 448.0
RoundTrip = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    """Measure all caches, write --json after each and print a line."""
    options = _options()
    source = Source.open(options.reference)
    count = options.tokens // options.window
    shape, windows = (
        source.shape,
        list(
            text_windows(options.text, source.tokenizer(), source.shape.vocab_size, count, options.window, options.seed)
        ),
    )
    dtype = config_dtype(source.hf_config)
    reference = source.model(dtype)
    targets = [_hidden(reference, ids) for ids in windows]
    rows: list[dict[str, Any]] = []
    for name in options.caches:
        folder = Path(name)
        model = source.model(dtype) if name in EMULATED else load_simulated(folder)
        if name in EMULATED:
            _emulate(model, EMULATED[name])
        found = [divergence(reference, target, model, ids) for target, ids in zip(targets, windows, strict=True)]
        row = {"model": options.reference.name, "cache": name if name in EMULATED else folder.name}
        row |= {"emulated": name in EMULATED, "bytes_per_token": _bytes_per_token(name, shape, folder)}
        row |= figures(found) | {"text": Path(options.text).name, "tokens": count * options.window}
        rows.append(row | {"window": options.window, **provenance(options.seed)})
        print(
            f"{row['cache']}: KL {row['kl']:.5f} ± {row['kl_se']:.5f}, by position {row['kl_by_position']}", flush=True
        )
        if options.json is not None:
            write_rows(rows, options.json)


@torch.inference_mode()
def divergence(reference: CausalLM, target: torch.Tensor, model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || model) in nats at every position of a window ids [tokens], float64 [tokens - 1].

    target: the reference's last hidden states [tokens, hidden]
    """
    head, found = head_of(reference), []
    for theirs, ours in zip(
        target[:-1].split(ROWS_AT_A_TIME), _hidden(model, ids)[:-1].split(ROWS_AT_A_TIME), strict=True
    ):
        outputs = reference.lm_head(theirs), model.lm_head(ours)
        p, q = (head.scaled(logits.float()).log_softmax(-1) for logits in outputs)
        found.append(functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    return torch.cat(found).double()


def figures(windows: list[torch.Tensor]) -> dict[str, Any]:
    """Return the mean over positions with its standard error over windows, and means between BORDERS."""
    means = torch.stack([window.mean() for window in windows])
    by_position = {}
    for start, end in pairwise(BORDERS):
        parts = [window[start:end].mean() for window in windows if len(window) > start]
        if parts:
            by_position[f"{start}-{min(end, max(map(len, windows)) + 1)}"] = round(float(torch.stack(parts).mean()), 6)
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None
    return {"kl": float(means.mean()), "kl_se": error, "kl_by_position": by_position}


def int4_per_token_head(x: torch.Tensor) -> torch.Tensor:
    """Return keys or values x [..., head_size] as vLLM's int4 cache reads them back.

    A randomized Hadamard, then asymmetric 4-bit codes per token and head whose zero-point takes the scale's last four
    bits. head_size is a power of two.
    """
    size = x.shape[-1]
    generator = torch.Generator().manual_seed(0x9E3779B9)
    signs = 2.0 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1.0
    matrix = hadamard(size).float() * math.sqrt(size)
    y = ((x.float() * signs) @ matrix).to(x.dtype).float()
    low, high = y.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    zero = _half_away(-low / scale).clamp(0, 15)
    codes = _half_away(y * (1 / scale) + zero).clamp(0, 15)
    stored = (scale.view(torch.int32) & -16 | zero.int()).view(torch.float32)
    return (((codes - zero) * stored) @ matrix / size * signs).to(x.dtype)


def fp8(x: torch.Tensor) -> torch.Tensor:
    """Return keys or values as vLLM's fp8 cache reads them back, with its default scale of 1."""
    return x.float().clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).to(x.dtype)


EMULATED: dict[str, RoundTrip] = {"int4_per_token_head": int4_per_token_head, "fp8": fp8, "auto": lambda x: x}
"""By vLLM's name; `auto`, the unquantized cache, shows what another order of roundings in attention does alone."""


def _half_away(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, (x + 0.5).floor(), (x - 0.5).ceil())


def _emulate(model: CausalLM, round_trip: RoundTrip) -> None:
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        rows = (query.float(), round_trip(key).float(), round_trip(value).float())
        out, _ = windowed_attention(module, *rows, attention_mask, **kwargs)
        return out.to(query.dtype), None

    model.set_attn_implementation(register_attention("infoquant_emulated_cache", attend))


@torch.inference_mode()
def _hidden(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the inputs of lm_head, [tokens, hidden]."""
    hidden: torch.Tensor = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return hidden


def _bytes_per_token(name: str, shape: ModelShape, folder: Path) -> int:
    """Return the cache's bytes per token; vLLM's int4 keeps a float32 scale of each key and value."""
    heads = 2 * shape.num_hidden_layers * shape.num_key_value_heads
    if name not in EMULATED:
        return kv_bytes_per_token(shape, Checkpoint(folder).config.kv_cache, 2)
    return {"fp8": heads * shape.head_dim, "auto": 2 * heads * shape.head_dim}.get(
        name, heads * (shape.head_dim // 2 + 4)
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.caches", description=__doc__)
    parser.add_argument("reference", type=Path, help="folder of the unquantized model")
    parser.add_argument("caches", nargs="+", help=f"InfoQuant checkpoints, or {', '.join(EMULATED)}")
    parser.add_argument("--text", required=True, help="text to measure on, never calibrated on")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of windows")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
