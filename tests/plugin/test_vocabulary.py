"""An 8-bit vocabulary matrix in vLLM's own embedding and lm_head: lookup, logits, sharding, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_embedding
from vllm.config import ModelConfig

from infoquant_vllm import register
from infoquant_vllm.embedding import INT16_INPUT
from infoquant_vllm.format import FormatError, unpack_codes
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.kernels.operands import PackedWeight
from tests.common import oracles
from tests.common.checkpoints import write_random
from tests.plugin.test_layers import Model, _rank

VOCAB, HIDDEN = 500, 256  # vLLM pads it to 512 rows
QUANTIZATION: dict[str, Any] = {"lm_head_bits": 8, "ignore": []}
KINDS = {
    "tied, rotated": {"tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True, "rotated": False},
    "untied": {"tie_word_embeddings": False},
}


class Vocabulary:
    """The ends of a model with an 8-bit vocabulary, and what they must compute."""

    def __init__(self, folder: Path, tie_word_embeddings: bool, rotated: bool | None = None):
        register()
        quantization = QUANTIZATION if rotated is None else QUANTIZATION | {"online_r1": rotated}
        changes = {"tie_word_embeddings": tie_word_embeddings, "vocab_size": VOCAB}
        checkpoint = write_random(folder, quantization, **changes)
        self.vllm = ModelConfig(str(checkpoint), skip_tokenizer_init=True, dtype="float32")
        self.model, self.tied = Model(quantization, **changes), tie_word_embeddings
        self.module = "model.embed_tokens" if tie_word_embeddings else "lm_head"
        tensors = self.model.tensors
        self.packed, self.scale = (tensors[f"{self.module}.{name}"] for name in ("weight_packed", "weight_scale"))
        self.rotation = tensors.get("model.embed_tokens.r1")
        self.gain = tensors.get("model.embed_tokens.final_norm_weight")

    def served(self, leave_out: str = "") -> tuple[Any, Any]:
        """Embedding and lm_head, loaded and finished."""
        arguments = {"quant_config": self.model.config, "params_dtype": torch.float32}
        embed = vllm_embedding.VocabParallelEmbedding(VOCAB, HIDDEN, prefix="model.embed_tokens", **arguments)
        head = vllm_embedding.ParallelLMHead(VOCAB, HIDDEN, prefix="lm_head", **arguments)
        head = head.tie_weights(embed) if self.tied else head
        for name, layer in {"model.embed_tokens": embed, "lm_head": head}.items():
            for local, param in layer.named_parameters():
                if f"{name}.{local}" in self.model.tensors and local != leave_out:
                    param.weight_loader(param, self.model.tensors[f"{name}.{local}"])
        for layer in (embed, head):
            layer.quant_method.process_weights_after_loading(layer)
        return embed, head

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.tied:
            return self.model.tensors["model.embed_tokens.weight"].float()[ids]
        rows = (unpack_codes(self.packed, 8, signed=True) * self.scale)[ids]
        return rows if self.rotation is None else oracles.rotate_rows(rows, self.rotation, None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.rotation is not None:
            hidden = oracles.rotate_rows(hidden, self.rotation.T, self.gain)
        return oracles.linear(hidden, INT16_INPUT, PackedWeight(self.packed, self.scale, None, None), None)


@pytest.fixture(params=KINDS)
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> Vocabulary:
    return Vocabulary(tmp_path, **KINDS[request.param])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_together_look_up_and_score_what_the_reference_does(vocabulary: Vocabulary, ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids, hidden = torch.arange(VOCAB), torch.randn(7, HIDDEN, generator=generator)
    rows, logits = [], []
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    for rank in range(ranks):
        with (
            _rank(rank, ranks, vocabulary.vllm),
            torch.compiler.set_stance("force_eager"),
            mock.patch.object(vllm_embedding, "tensor_model_parallel_all_reduce", keep),
        ):
            embed, head = vocabulary.served()
            rows.append(embed(ids))
            logits.append(head.quant_method.apply(head, hidden))
    assert torch.equal(torch.stack(rows).sum(0), vocabulary.rows(ids))
    assert torch.equal(torch.cat(logits, 1)[:, :VOCAB], vocabulary.logits(hidden))


def test_no_unquantized_copy_is_kept_and_a_tied_model_has_one_matrix(vocabulary: Vocabulary) -> None:
    with _rank(0, 1, vocabulary.vllm):
        embed, head = vocabulary.served()
    held = {name: param.nbytes for name, param in head.named_parameters() if name.startswith("weight")}
    assert held == {"weight_packed": 512 * HIDDEN, "weight_scale": 512 * 4}
    if vocabulary.tied:
        assert head.weight_packed.data_ptr() == embed.weight_packed.data_ptr()
        assert not hasattr(embed, "weight")


def test_a_row_of_logits_is_the_same_bits_in_any_batch(vocabulary: Vocabulary) -> None:
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0))
    with _rank(0, 1, vocabulary.vllm):
        _, head = vocabulary.served()
    whole = head.quant_method.apply(head, hidden)
    for rows in range(1, 40):
        assert torch.equal(head.quant_method.apply(head, hidden[:rows]), whole[:rows])


@pytest.mark.parametrize("leave_out", ["weight_packed", "weight_scale"])
def test_a_missing_tensor_is_refused_by_name(vocabulary: Vocabulary, leave_out: str) -> None:
    message = rf"tensor {vocabulary.module}\.{leave_out} is missing"
    with _rank(0, 1, vocabulary.vllm), pytest.raises(FormatError, match=message):
        vocabulary.served(leave_out)


def test_a_scale_that_is_no_number_is_refused_by_place(vocabulary: Vocabulary) -> None:
    vocabulary.model.tensors[f"{vocabulary.module}.weight_scale"][77] = float("nan")
    message = rf"{vocabulary.module}\.weight_scale\[77, 0\] is nan"
    with _rank(0, 1, vocabulary.vllm), pytest.raises(FormatError, match=message):
        vocabulary.served()


def test_logits_of_another_dtype_are_refused(vocabulary: Vocabulary) -> None:
    vocabulary.vllm.hf_config.head_dtype = "bfloat16"
    with _rank(0, 1, vocabulary.vllm), pytest.raises(FormatError, match=r"head_dtype torch\.bfloat16 is not served"):
        vocabulary.served()


def test_the_start_up_line_names_the_vocabulary(vocabulary: Vocabulary) -> None:
    with _rank(0, 1, vocabulary.vllm):
        vocabulary.served()
    summary = vocabulary.model.config.summary
    assert summary.pending == 0
    assert summary.line().startswith(f"lm_head W8A16 ({backend('cpu').name}) holds 0.1 MiB, 0.2 MiB in bf16")
