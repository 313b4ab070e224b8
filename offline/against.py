"""A checkpoint beside the model it was made from: the same model, and behaving like it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from infoquant_vllm.format import Checkpoint
from offline.architectures import CausalLM
from offline.errors import CheckError
from offline.evaluate import compare, stored_dtype
from offline.prompts import OWN_TEXT, PASSAGES
from offline.simulate import load_simulated
from offline.source import Source, read_tokenizer
from offline.text import encode_texts
from offline.vocabulary import vocabulary_rows

PROMPT_WORDS = 12
LARGEST_KL = 2.0
"""Nats per position. A usable 4-bit model is well below 1; one with a wrong rotation or layer far above."""
LARGEST_BASIS_ERROR = 0.02
"""Relative; bfloat16 embeddings rounded once more give 0.003."""
LARGEST_ROUNDING_ERROR = 0.05
"""Relative, of embeddings in 8 bits; those of SmolLM2 have 0.012."""


def continuation(folder: str | Path, tokens: int = 24) -> tuple[str, str]:
    """The beginning of a passage, and how the checkpoint goes on from there when it takes the likeliest token."""
    tokenizer, model = read_tokenizer(Path(folder)), load_simulated(folder, stored_dtype(Path(folder)))
    prompt = " ".join(PASSAGES[0].split()[:PROMPT_WORDS])
    (ids,) = encode_texts([prompt], tokenizer, model.config.vocab_size, OWN_TEXT)
    written: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids.tolist(), *written]])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    return prompt, str(tokenizer.decode(written))


class Comparison:
    """A checkpoint and its source, with the residual basis that leads from one to the other."""

    def __init__(self, checkpoint: Checkpoint, source: str | Path):
        self._checkpoint = checkpoint
        self._source = Source.open(source)
        self._basis: torch.Tensor

    def same_ends(self) -> str:
        """Sizes agree, and the embeddings are the source's, as they are or in a rotated basis."""
        if self._checkpoint.shape != self._source.shape:
            raise CheckError(f"sizes differ: {self._checkpoint.shape} against {self._source.shape}")
        theirs = self._source.tensor("model.embed_tokens.weight").double()
        if "model.embed_tokens.weight_packed" in self._checkpoint.weight_map:
            ours = vocabulary_rows(self._checkpoint).double()
            error = ((ours - theirs).norm() / theirs.norm()).item()
            if not error <= LARGEST_ROUNDING_ERROR:
                raise CheckError(
                    f"8-bit embeddings are not the source's: relative error {error:.2g}, "
                    f"at most {LARGEST_ROUNDING_ERROR:g}"
                )
            self._basis = self._stored_basis()
            return f"embeddings are the source's in 8 bits, relative error {error:.1e}"
        ours = self._checkpoint.tensor("model.embed_tokens.weight").double()
        if torch.equal(ours, theirs):
            self._basis = self._stored_basis()
            return "embeddings equal"
        self._basis = torch.linalg.lstsq(theirs.T @ theirs, theirs.T @ ours).solution
        error = ((theirs @ self._basis - ours).norm() / ours.norm()).item()
        if not error <= LARGEST_BASIS_ERROR:
            raise CheckError(
                f"embeddings are no rotation of the source's: relative error {error:.2g}, "
                f"at most {LARGEST_BASIS_ERROR:g}"
            )
        return f"embeddings are the source's in another basis, relative error {error:.1e}"

    def _stored_basis(self) -> torch.Tensor:
        if self._checkpoint.config.tied_residual_rotation:
            return self._checkpoint.tensor("model.embed_tokens.residual_rotation").double()
        return torch.eye(self._source.shape.hidden_size).double()

    def behaviour(self, layer_errors: dict[str, float]) -> str:
        """Compare predictions on the project's own passages; fills `layer_errors`, mean over tokens."""
        windows = encode_texts(PASSAGES, self._source.tokenizer(), self._source.shape.vocab_size, OWN_TEXT)
        dtype = stored_dtype(self._source.folder)
        model, reference = load_simulated(self._checkpoint.folder, dtype), self._source.model(dtype)
        ours, theirs = _record_layers(model), _record_layers(reference)
        figures = compare(windows, model, reference)
        for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            back, plain = torch.cat(a).double() @ self._basis.T, torch.cat(b).double()
            layer_errors[f"model.layers.{layer}"] = ((back - plain).norm(dim=1) / plain.norm(dim=1)).mean().item()
        kl, agreement = figures["kl"].mean, figures["top1_agreement"].mean
        found = f"KL {kl:.3f}, top-1 agreement {agreement:.1%} over {sum(map(len, windows))} tokens"
        if not kl <= LARGEST_KL:
            raise CheckError(f"{found}; KL of at most {LARGEST_KL:g} was expected")
        return found


def _record_layers(model: CausalLM) -> Sequence[list[torch.Tensor]]:
    """Lists that fill with each decoder layer's output, [tokens, hidden] float32, as the model runs."""
    records: list[list[torch.Tensor]] = []
    for layer in model.model.layers:
        record: list[torch.Tensor] = []

        def keep(_: nn.Module, args: object, output: torch.Tensor, record: list[torch.Tensor] = record) -> None:
            record.append(output.flatten(0, -2).float())

        layer.register_forward_hook(keep)
        records.append(record)
    return records
