"""KL divergence over the whole vocabulary, from the simulation: a server does not give all log-probabilities."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from infoquant_vllm.format import read_json
from offline.evaluate.metrics import Figure, compare
from offline.evaluate.simulate import load_simulated
from offline.model.source import Source, config_dtype


class WholeVocabulary:
    """The reference on some windows (int64 [windows, tokens]), to which checkpoints are compared.

    Its decoder runs once per window, however many checkpoints there are: the last hidden states are
    kept, and the logits, which would not fit into memory, made of them again.
    """

    def __init__(self, reference: Path, windows: torch.Tensor):
        self.windows = windows
        source = Source.open(reference)
        self.reference = source.model(config_dtype(source.hf_config))
        self.reference.model = RememberedDecoder(self.reference.model)

    def kl(self, checkpoint: Path) -> Figure:
        """KL(reference || checkpoint) in nats per position, in the dtype that config.json names."""
        simulated = load_simulated(checkpoint, config_dtype(read_json(checkpoint / "config.json")))
        return compare(list(self.windows), simulated, self.reference)["kl"]


class RememberedDecoder(nn.Module):
    """A decoder that answers token ids it has seen from memory."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder
        self.remembered: dict[tuple[int, ...], torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> BaseModelOutputWithPast:
        """input_ids [1, tokens] to last_hidden_state [1, tokens, hidden]."""
        key = tuple(input_ids.flatten().tolist())
        if key not in self.remembered:
            self.remembered[key] = self.decoder(input_ids=input_ids, **arguments).last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=cast(torch.FloatTensor, self.remembered[key]))
