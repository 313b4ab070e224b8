"""Make calibration tokens: sampled from the model itself, or windows of a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import Cache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from offline.errors import ToolError
from offline.memory import SELF_BATCH
from offline.mixture import SELF, parse_mixture, sequences_of
from offline.model.architectures import CausalLM
from offline.model.source import Source
from offline.model.windowed_attention import register_attention
from offline.output.atomic import atomic_file, check_writable
from offline.text import check_tokens, text_windows

SEPARATOR = "<|endoftext|>"
"""End of a document in the pre-training text of models whose BOS is a chat token, or that have no BOS."""
ATTENTION = "infoquant_sampling"
TOKENS_SUFFIX = ".safetensors"

Report = Callable[[int, int], None]
Pair = tuple[torch.Tensor, torch.Tensor]


def calibration_tokens(
    spec: str, source: Source, num_sequences: int, sequence_length: int, seed: int, report: Report | None = None
) -> torch.Tensor:
    """Return the calibration set, int64 [num_sequences, sequence_length].

    Args:
        spec: "self", a `.safetensors` file of `save_tokens`, what `text_windows` reads, or a mixture of these (see
            `parse_mixture`), whose sequences are shuffled.
        source: the model, for its tokenizer and, with "self", its text.
        num_sequences: number of sequences.
        sequence_length: tokens in each; bounded by the model's positions.
        seed: the same seed gives the same tokens on the same machine.
        report: called with (tokens done, tokens in total) while the model samples.
    """
    limit = source.hf_config.get("max_position_embeddings", sequence_length)
    if sequence_length > limit:
        raise ToolError(f"{source.folder}: sequences of {sequence_length} tokens, the model takes {limit}")
    parts = parse_mixture(spec)
    if len(parts) == 1:
        return _tokens_of(parts[0].spec, source, num_sequences, sequence_length, seed, report)
    counts = sequences_of(parts, num_sequences, spec)
    texts = [
        _tokens_of(part.spec, source, count, sequence_length, seed, report)
        for part, count in zip(parts, counts, strict=True)
    ]
    order = torch.randperm(num_sequences, generator=torch.Generator().manual_seed(seed))
    return torch.cat(texts)[order]


def _tokens_of(
    spec: str, source: Source, num_sequences: int, sequence_length: int, seed: int, report: Report | None
) -> torch.Tensor:
    """Return the tokens of one text, int64 [num_sequences, sequence_length]."""
    if spec.endswith(TOKENS_SUFFIX):
        return read_tokens(Path(spec), num_sequences, sequence_length, source.shape.vocab_size)
    if spec != SELF:
        return text_windows(spec, source.tokenizer(), source.shape.vocab_size, num_sequences, sequence_length, seed)
    generator = torch.Generator().manual_seed(seed)
    model, tokenizer = source.model(torch.float32), source.tokenizer()  # faster than bf16 on CPUs without AMX
    total, batches = num_sequences * sequence_length, []
    for start in range(0, num_sequences, SELF_BATCH):
        rows = min(SELF_BATCH, num_sequences - start)

        def report_batch(position: int, start: int = start, rows: int = rows) -> None:
            if report is not None:
                report(start * sequence_length + rows * position, total)

        batches.append(_sample(model, tokenizer, rows, sequence_length, generator, report_batch))
    return torch.cat(batches)


def check_tokens_file(file: Path) -> None:
    """Refuse a file that `save_tokens` could not write, before minutes are spent on its tokens; make its folder."""
    if file.suffix != TOKENS_SUFFIX:
        raise ToolError(f"{file}: a name that ends in {TOKENS_SUFFIX} was expected")
    if file.exists():
        raise ToolError(f"{file}: exists already; choose another name")
    check_writable(file)


def save_tokens(file: Path, tokens: torch.Tensor) -> None:
    """Save calibration tokens [sequences, length] int64, so that several runs can read the same ones."""
    check_tokens_file(file)
    with atomic_file(file) as partial:
        save_file({"tokens": tokens.contiguous()}, partial)


def read_tokens(file: Path, num_sequences: int, sequence_length: int, vocab_size: int) -> torch.Tensor:
    """Read the first sequences of a file of `save_tokens`; raises ToolError for one that does not hold enough."""
    try:
        with safe_open(file, framework="pt") as opened:
            tokens = opened.get_tensor("tokens")
    except (OSError, SafetensorError) as error:
        raise ToolError(f"{file}: no file of calibration tokens ({error}); make one with `infoquant sample`") from None
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise ToolError(f"{file}: tokens are {tokens.dtype} {list(tokens.shape)}, expected int64 [sequences, length]")
    if len(tokens) < num_sequences or tokens.shape[1] < sequence_length:
        raise ToolError(
            f"{file}: {len(tokens)} sequences of {tokens.shape[1]} tokens, "
            f"the recipe reads {num_sequences} of {sequence_length}"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ToolError(
            f"{file}: tokens {tokens.min()} .. {tokens.max()}, the model knows 0 .. {vocab_size - 1}; "
            "sample them from this model"
        )
    return tokens[:num_sequences, :sequence_length]


@torch.no_grad()
def _sample(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> torch.Tensor:
    """Sample documents from the model at temperature 1, from their first token on, [rows, length].

    Where a document ends, the next begins in the same row. Data from the model itself as in LLM-QAT
    (Liu et al., arXiv 2305.17888, section 3.1), but the model samples the first token too: small models do not
    recover from a random one. KL on two texts fell by 9% and 7%.
    """
    begin = _document_start(tokenizer)
    check_tokens([begin], tokenizer, model.config.vocab_size, "the start of a text sampled from the model")
    model.set_attn_implementation(register_attention(ATTENTION, _attend_with_one_token))
    cache = Cache(layers=[_PreallocatedLayer(length) for _ in range(model.config.num_hidden_layers)])
    tokens = step = torch.full((rows, 1), begin)
    while tokens.shape[1] < length:
        logits = model(step, past_key_values=cache).logits[:, -1].float()
        step = _draw(logits, generator)[:, None].masked_fill(step == tokenizer.eos_token_id, begin)
        tokens = torch.cat((tokens, step), dim=1)
        report(tokens.shape[1])
    return tokens


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
    grouped = query.view(len(query), key.shape[1], -1, query.shape[3])
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
    """Sample once per row from softmax(logits [rows, vocab]) by the inverse CDF, ten times as fast as multinomial."""
    cumulative = logits.softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, uniform, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that documents began with in pre-training: the separator if there is one, else BOS or EOS."""
    candidates: tuple[int | None, ...] = (
        tokenizer.get_vocab().get(SEPARATOR),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    for token in candidates:
        if token is not None:
            return token
    raise ToolError(f"{tokenizer.name_or_path}: no BOS, EOS or {SEPARATOR} to begin a text with; give a text file")
