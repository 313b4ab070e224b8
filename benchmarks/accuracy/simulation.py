"""Compute the KL divergence over the whole vocabulary by simulation: a server returns only top-k log-probabilities."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from offline.evaluate.metrics import Figure, compare
from offline.evaluate.simulate import load_simulated
from offline.model.source import Source, config_dtype


class WholeVocabulary:
    """Compare checkpoints with a reference on some windows (int64 [windows, tokens]).

    The reference's decoder runs once per window for all checkpoints: its last hidden states are kept, and the
    logits, which would not fit into memory, are computed from them again.
    """

    def __init__(self, reference: Path, windows: torch.Tensor):
        self.windows = windows
        source = Source.open(reference)
        self.reference = source.model(config_dtype(source.hf_config))
        self.reference.model = RememberedDecoder(self.reference.model)

    def kl(self, checkpoint: Path) -> Figure:
        """Return KL(reference || checkpoint) in nats per position, computed in the dtype that config.json names."""
        simulated = load_simulated(checkpoint)
        return compare(list(self.windows), simulated, self.reference)["kl"]


class RememberedDecoder(nn.Module):
    """Cache the output of a decoder by its token ids."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder
        self.remembered: dict[tuple[int, ...], torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> BaseModelOutputWithPast:
        """Map input_ids [1, tokens] to last_hidden_state [1, tokens, hidden]."""
        key = tuple(input_ids.flatten().tolist())
        if key not in self.remembered:
            self.remembered[key] = self.decoder(input_ids=input_ids, **arguments).last_hidden_state
        return BaseModelOutputWithPast(last_hidden_state=cast(torch.FloatTensor, self.remembered[key]))
