"""Make calibration tokens: sampled from the model itself, or windows of a text."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offline.errors import ToolError
from offline.mixture import SELF, parse_mixture, sequences_of
from offline.model.source import Source
from offline.output.atomic import atomic_file, check_writable
from offline.stages.sample import sample_text
from offline.text import text_windows

TOKENS_SUFFIX = ".safetensors"

Report = Callable[[int, int], None]


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
    return sample_text(source, num_sequences, sequence_length, seed, report)


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
