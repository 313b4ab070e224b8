"""A quantized model for distillation, whose row scales and cache clip ratios can be trained; codes stay as they are.

Built layer by layer from the tensors of a checkpoint, on the source's own transformers model. Everything but the
quantized parts stays fixed; it runs in float32, in the rotated basis of the residual stream.
"""

import torch
from torch import nn

from infoquant_vllm.format import QuantizationConfigData
from offline.algorithms.rotations import Transforms
from offline.model.architectures import head_of
from offline.model.source import Source
from offline.training.fake_quant import CLIP_BOUNDS, ClampedClip, FakeQuantLinear
from offline.training.fake_quant_layer import DISTILLED, FakeQuantLayer, Layer


class Student(nn.Module):
    """The source model with the linears and the KV cache of every decoder layer quantized.

    layers: by decoder layer, the checkpoint's tensors by their names inside the layer
    """

    def __init__(
        self, source: Source, config: QuantizationConfigData, layers: list[Layer], transforms: Transforms | None
    ):
        super().__init__()
        model = source.model(torch.float32)
        self.head = head_of(model)
        rotation = None if transforms is None else transforms.residual
        self._rotation = None if rotation is None else rotation.float()
        offset = source.shape.norm_offset
        self._final_norm = model.model.norm.weight + offset
        model.model.norm.weight.fill_(1.0 - offset)
        self._layers = [
            FakeQuantLayer(index, layer, tensors, config, DISTILLED)
            for index, (layer, tensors) in enumerate(zip(model.model.layers, layers, strict=True))
        ]
        self.decoder = model.model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [sequences, length] to the inputs of lm_head, [sequences, length, hidden] float32."""
        embedded = self.decoder.embed_tokens(tokens)
        if self._rotation is not None:
            embedded = embedded @ self._rotation
        hidden = self.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return (hidden if self._rotation is None else hidden @ self._rotation.T) * self._final_norm

    def log_scales(self) -> list[nn.Parameter]:
        """Return the logarithms of the factors on the rows of all linears' weights."""
        linears = [module for module in self.modules() if isinstance(module, FakeQuantLinear)]
        return [linear.log_scale for linear in linears if linear.log_scale is not None]

    def clips(self) -> list[nn.Parameter]:
        """Return the clip ratios of keys and values."""
        return [module.ratio for module in self.modules() if isinstance(module, ClampedClip)]

    @torch.no_grad()
    def clamp_clips(self) -> None:
        """Clamp the clip ratios to CLIP_BOUNDS, after every step."""
        for clip in self.clips():
            clip.clamp_(*CLIP_BOUNDS)

    def tensors(self, index: int) -> Layer:
        """Return the trained tensors of a decoder layer as the checkpoint stores them."""
        return self._layers[index].scales() | self._layers[index].clips()
