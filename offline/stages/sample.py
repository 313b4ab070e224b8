"""Sample calibration text from the model itself, in batches with a KV cache."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from offline.errors import ToolError
from offline.memory import ROWS_PER_DRAW, SAMPLED_TOGETHER, sampling_dtype
from offline.model.architectures import CausalLM
from offline.model.source import Source
from offline.model.windowed_attention import register_attention, soft_capped_attention
from offline.text import check_tokens, leading_tokens

SEPARATOR = "<|endoftext|>"
"""End of a document in the pre-training text of models whose BOS is a chat token, or that have no BOS."""
ATTENTION = "infoquant_sampling"
VOCABULARY_BLOCK = 256  # tokens whose probabilities are summed up before one is drawn

Pair = tuple[torch.Tensor, torch.Tensor]


def sample_text(
    source: Source, num_sequences: int, length: int, seed: int, report: Callable[[int, int], None] | None = None
) -> torch.Tensor:
    """Sample documents from the model at temperature 1, int64 [num_sequences, length].

    Where a document ends, the next begins in the same sequence. Data from the model itself as in LLM-QAT
    (Liu et al., arXiv 2305.17888, section 3.1), but the model samples the first token too: small models do not
    recover from a random one. KL on two texts fell by 9% and 7%.

    report: called with (tokens done, tokens in total).
    """
    tokenizer, vocab_size = source.tokenizer(), source.shape.vocab_size
    begin = _document_start(tokenizer)
    check_tokens([begin], tokenizer, vocab_size, "the start of a text sampled from the model")
    rows, total = min(SAMPLED_TOGETHER, num_sequences), num_sequences * length
    generator, batches, done = torch.Generator().manual_seed(seed), [], 0

    def report_step(tokens: int) -> None:
        if report is not None:
            report(done + tokens, total)

    report_step(0)  # so that the time left is estimated from here
    model = _model(source, rows)
    for start in range(0, num_sequences, rows):
        size = min(rows, num_sequences - start), length
        batches.append(_sample(model, (begin, tokenizer.eos_token_id), size, generator, report_step))
        done += batches[-1].numel()
    return torch.cat(batches)


@torch.no_grad()
def _sample(
    model: CausalLM,
    ends: tuple[int, int | None],
    size: tuple[int, int],
    generator: torch.Generator,
    report: Callable[[int], None],
) -> torch.Tensor:
    """Sample one batch of `size` [rows, length]; `ends` are the tokens that begin and end a document."""
    rows, length = size
    begin, end = ends
    cache = Cache(layers=[_PreallocatedLayer(length) for _ in range(model.config.num_hidden_layers)])
    tokens = torch.full((rows, length), begin)
    for position in range(1, length):
        step = tokens[:, position - 1 : position]
        logits = model(step, past_key_values=cache).logits[:, 0]
        drawn = torch.cat([_draw(part, generator) for part in logits.split(ROWS_PER_DRAW)])
        tokens[:, position] = drawn if end is None else drawn.masked_fill(step[:, 0] == end, begin)
        report(rows * (position + 1))
    return tokens


def _model(source: Source, rows: int) -> CausalLM:
    """Load the model in the dtype that is fastest here, with its weights reordered for batches of `rows`."""
    dtype = sampling_dtype()
    model = source.model(dtype)
    model.set_attn_implementation(register_attention(ATTENTION, _attend_with_one_token))
    if dtype == torch.bfloat16:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, _PackedLinear(child, rows))
    return model


class _PackedLinear(nn.Module):
    """A linear in bfloat16 with its weight in oneDNN's layout, which `functional.linear` would make at each call."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self._bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of `x`, bfloat16 [..., features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def _attend_with_one_token(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from the last token of each row to all others, or those in its window (transformers' interface).

    query [rows, heads, 1, head_size]; key, value [rows, kv_heads, tokens, head_size]. The query
    heads of a GQA group take the place of tokens, so that keys and values need not be copied for each of them.
    """
    window = kwargs.get("sliding_window") or key.shape[2]
    key, value = key[:, :, -window:], value[:, :, -window:]
    grouped, soft_cap = query.view(len(query), key.shape[1], -1, query.shape[3]), kwargs.get("softcap")
    if soft_cap is not None:
        out = soft_capped_attention(grouped, key, value, None, kwargs["scaling"], soft_cap).transpose(1, 2)
    else:
        out = functional.scaled_dot_product_attention(grouped, key, value, scale=kwargs.get("scaling"))
    return out.reshape(len(query), 1, -1, query.shape[3]), None


class _PreallocatedLayer(DynamicLayer):
    """A preallocated KV cache, written in place: appending to a growing tensor would copy all of it each step."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> Pair:
        """Append [rows, kv-heads, tokens, head_size]; returns views of all keys and values so far."""
        start = self.get_seq_length()
        if start == 0:
            rows, heads, _, head_size = key_states.shape
            self._both = key_states.new_empty(2, rows, heads, self._length, head_size)
            self.is_initialized = True
        end = start + key_states.shape[2]
        self._both[0, :, :, start:end], self._both[1, :, :, start:end] = key_states, value_states
        self.keys, self.values = self._both[0, :, :, :end], self._both[1, :, :, :end]
        return self.keys, self.values


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sample once per row from softmax(logits [rows, vocab]) by the inverse CDF: first a block of tokens, then one.

    Only the sums of blocks and one block are summed up one by one, which takes longer than the softmax.
    """
    block = math.gcd(logits.shape[1], VOCABULARY_BLOCK)
    probabilities = logits.softmax(-1, dtype=torch.float32).unflatten(-1, (-1, block))
    ends = probabilities.sum(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator) * ends[:, -1:]
    chosen = _first_above(ends, uniform)
    before = functional.pad(ends, (1, 0)).gather(1, chosen)
    inside = probabilities[torch.arange(len(logits)), chosen[:, 0]].cumsum(-1)
    return (chosen * block + _first_above(inside, uniform - before))[:, 0]


def _first_above(cumulative: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the first place of each row of `cumulative` [rows, n] above its value [rows, 1]; the last, if none is."""
    return torch.searchsorted(cumulative, values, right=True).clamp(max=cumulative.shape[1] - 1)


def _document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that documents began with in pre-training.

    That is BOS where the tokenizer starts texts with it, else the separator if there is one, else BOS or EOS.
    """
    candidates: tuple[int | None, ...] = (
        *leading_tokens(tokenizer),
        tokenizer.get_vocab().get(SEPARATOR),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    for token in candidates:
        if token is not None:
            return token
    raise ToolError(f"{tokenizer.name_or_path}: no BOS, EOS or {SEPARATOR} to begin a text with; give a text file")
