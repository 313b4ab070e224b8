"""Compare a checkpoint with the model that it was made from: the same weights, and similar behavior."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from infoquant_vllm.format import Checkpoint, read_json
from offline.errors import CheckError
from offline.evaluate.metrics import compare
from offline.evaluate.passages import OWN_TEXT, PASSAGES
from offline.evaluate.routing import RecordedRouting
from offline.evaluate.simulate import load_simulated
from offline.model.architectures import CausalLM
from offline.model.reference import load_reference
from offline.model.source import Source, config_dtype, read_tokenizer
from offline.stages.lm_head import dequantized_lm_head
from offline.text import encode_texts

PROMPT_WORDS = 12
LARGEST_KL = 2.0  # nats per position; a usable 4-bit model is well below 1, one with a wrong rotation far above
LARGEST_BASIS_ERROR = 0.02  # relative; bfloat16 embeddings rounded twice have 0.003
LARGEST_ROUNDING_ERROR = 0.05  # relative, of 8-bit embeddings or lm_head; those of SmolLM2 have 0.012


def continuation(folder: str | Path, tokens: int = 24) -> tuple[str, str]:
    """Return the beginning of a passage, and its greedy continuation by the checkpoint."""
    dtype = config_dtype(read_json(Path(folder) / "config.json"))
    tokenizer, model = read_tokenizer(Path(folder)), load_simulated(folder, dtype)
    prompt = " ".join(PASSAGES[0].split()[:PROMPT_WORDS])
    (ids,) = encode_texts([prompt], tokenizer, model.config.vocab_size, OWN_TEXT)
    generated: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids.tolist(), *generated]])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        generated.append(token)
    return prompt, str(tokenizer.decode(generated))


class Comparison:
    """Compare a checkpoint with its source as transformers loads it, through the basis of the residual stream."""

    def __init__(self, checkpoint: Checkpoint, source: str | Path):
        self._checkpoint = checkpoint
        self._source = Source.open(source)
        self._basis: torch.Tensor
        self._moments: list[torch.Tensor] = []

    @cached_property
    def _reference(self) -> CausalLM:
        return load_reference(self._source.folder)

    def same_vocabulary(self) -> str:
        """Check that sizes agree, and that embeddings and lm_head are the source's, plain or in a rotated basis."""
        if self._checkpoint.shape != self._source.shape:
            raise CheckError(f"sizes differ: {self._checkpoint.shape} against {self._source.shape}")
        return f"{self._same_embeddings()}; {self._same_head()}"

    def _same_embeddings(self) -> str:
        theirs = self._source.tensor("model.embed_tokens.weight").double()
        if "model.embed_tokens.weight_packed" in self._checkpoint.weight_map:
            ours = dequantized_lm_head(self._checkpoint).double()
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
        self._basis = self._fit(theirs, ours)
        error = ((theirs @ self._basis - ours).norm() / ours.norm()).item()
        if not error <= LARGEST_BASIS_ERROR:
            raise CheckError(
                f"embeddings are not a rotation of the source's: relative error {error:.2g}, "
                f"at most {LARGEST_BASIS_ERROR:g}"
            )
        return f"embeddings are the source's in another basis, relative error {error:.1e}"

    def _same_head(self) -> str:
        """Compare lm_head times the gain of the final norm, which maps normalized hidden states to logits."""
        offset = self._checkpoint.shape.norm_offset
        module, norm = self._reference.lm_head.weight, self._reference.model.norm.weight.double() + offset
        if self._checkpoint.shape.tie_word_embeddings:
            if not torch.equal(module, self._reference.model.embed_tokens.weight):
                raise CheckError(
                    "lm_head is tied to the embeddings, but transformers loads the source with a separate lm_head"
                )
            return "lm_head tied in both"
        theirs, limit = module.double() * norm, LARGEST_BASIS_ERROR
        if "lm_head.weight_packed" in self._checkpoint.weight_map:
            ours, limit = dequantized_lm_head(self._checkpoint).double(), LARGEST_ROUNDING_ERROR
        else:
            ours = self._checkpoint.tensor("lm_head.weight").double()
        ours *= self._checkpoint.tensor("model.norm.weight").double() + offset
        if self._moments:  # the embeddings alone may not span the hidden size
            self._basis = self._fit(theirs, ours)
        error = ((theirs @ self._basis - ours).norm() / ours.norm()).item()
        if not error <= limit:
            raise CheckError(f"lm_head is not the source's: relative error {error:.2g}, at most {limit:g}")
        return f"lm_head is the source's, relative error {error:.1e}"

    def _fit(self, theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
        """Fit the basis [hidden, hidden] that maps all rows seen so far to ours, by least squares.

        Rows may not span the hidden size, if a channel of all is zero; LAPACK's gelsy, the default, fails then.
        """
        moments = [theirs.T @ x / theirs.square().sum() for x in (theirs, ours)]
        self._moments = [x + y for x, y in zip(self._moments, moments, strict=True)] if self._moments else moments
        return torch.linalg.lstsq(*self._moments, driver="gelsd").solution

    def _stored_basis(self) -> torch.Tensor:
        if self._checkpoint.config.online_r1:
            return self._checkpoint.tensor("model.embed_tokens.r1").double()
        return torch.eye(self._source.shape.hidden_size).double()

    def behavior(self, layer_errors: dict[str, float], routing_agreement: dict[str, float]) -> str:
        """Compare predictions on the project's own passages; fill `layer_errors`, means over tokens.

        Of a mixture of experts fill `routing_agreement` too.
        """
        windows = encode_texts(PASSAGES, self._source.tokenizer(), self._source.shape.vocab_size, OWN_TEXT)
        reference = self._reference
        model = load_simulated(self._checkpoint.folder, config_dtype(self._source.hf_config))
        ours, theirs = _record_layers(model), _record_layers(reference)
        with RecordedRouting(model) as chosen, RecordedRouting(reference) as wanted:
            figures = compare(windows, model, reference)
        for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            back, plain = torch.cat(a).double() @ self._basis.T, torch.cat(b).double()
            layer_errors[f"model.layers.{layer}"] = ((back - plain).norm(dim=1) / plain.norm(dim=1)).mean().item()
        for layer, share in chosen.agreement(wanted).items():
            routing_agreement[f"model.layers.{layer}"] = share
        kl, agreement = figures["kl"].mean, figures["top1_agreement"].mean
        found = f"KL {kl:.3f}, top-1 agreement {agreement:.1%} over {sum(map(len, windows))} tokens"
        if "routing_agreement" in figures:
            found += f", {figures['routing_agreement'].mean:.1%} of the experts chosen alike"
        if not kl <= LARGEST_KL:
            raise CheckError(f"{found}; expected a KL of at most {LARGEST_KL:g}")
        return found


def _record_layers(model: CausalLM) -> Sequence[list[torch.Tensor]]:
    """Return lists that fill with each decoder layer's output, [tokens, hidden] float32, as the model runs."""
    records: list[list[torch.Tensor]] = []
    for layer in model.model.layers:
        record: list[torch.Tensor] = []

        def keep(_: nn.Module, args: object, output: torch.Tensor, record: list[torch.Tensor] = record) -> None:
            record.append(output.flatten(0, -2).float())

        layer.register_forward_hook(keep)
        records.append(record)
    return records
