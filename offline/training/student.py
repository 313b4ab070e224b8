"""A quantized model that can be trained: a factor per row of weights and clips as parameters, codes as they are.

Built from the tensors of a checkpoint, by layer, on the source's own transformers model. Everything
but the quantized parts stays fixed; it runs in float32, in the rotated basis of the residual stream.
"""

import torch
from torch import nn
from torch.nn import functional

from infoquant_vllm.format import SITES, KVCacheArgs, LinearScheme, QuantizationConfigData
from offline.algorithms.fake_quantize import dequantized_weight, fake_quantize
from offline.algorithms.rotations import Transforms, hadamard_product, transform_input
from offline.model.source import Source
from offline.stages.quantize_layer import local_tensors
from offline.training.fake_quant_cache import ATTENTION, TrainedCache, register_attention

CLIP_BOUNDS = (0.3, 1.0)

Layer = dict[str, torch.Tensor]


class Student(nn.Module):
    """The source model with every decoder layer's linears and KV cache quantized as `layers` say.

    layers: by decoder layer, the checkpoint's tensors by their names inside the layer
    """

    def __init__(
        self, source: Source, config: QuantizationConfigData, layers: list[Layer], transforms: Transforms | None
    ):
        super().__init__()
        model = source.model(torch.float32)
        register_attention()
        self.embedding: torch.Tensor = model.model.embed_tokens.weight
        self.head: torch.Tensor = model.lm_head.weight
        rotation = None if transforms is None else transforms.residual
        self._rotation = None if rotation is None else rotation.float()
        self._final_norm = model.model.norm.weight.clone()
        model.model.norm.weight.fill_(1.0)
        for index, tensors in enumerate(layers):
            self._quantize(model.model.layers[index], config, tensors)
        if config.kv_cache is not None:
            model.set_attn_implementation(ATTENTION)
        self.decoder = model.model

    def _quantize(self, layer: nn.Module, config: QuantizationConfigData, tensors: Layer) -> None:
        for name, tensor in tensors.items():
            if name in dict(layer.named_parameters()) and not name.endswith("_proj.weight"):
                layer.get_parameter(name).copy_(tensor)
        for linears in SITES.values():
            scheme = config.scheme(linears[0])
            assert scheme is not None  # every linear of a decoder layer is quantized
            local = [local_tensors(tensors, linear) for linear in linears]
            site = StudentInput(scheme, local[0])
            for linear, own in zip(linears, local, strict=True):
                parent, _, child = linear.rpartition(".")
                setattr(layer.get_submodule(parent), child, StudentLinear(site, scheme, own))
        if config.kv_cache is not None:
            layer.get_submodule("self_attn").attn = StudentCache(
                config.kv_cache, local_tensors(tensors, "self_attn.attn")
            )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [sequences, length] to what lm_head reads, [sequences, length, hidden] float32."""
        embedded = functional.embedding(tokens, self.embedding)
        if self._rotation is not None:
            embedded = embedded @ self._rotation
        hidden = self.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return (hidden if self._rotation is None else hidden @ self._rotation.T) * self._final_norm

    def log_scales(self) -> list[nn.Parameter]:
        """Logarithms of the factors on the rows of all linears' weights."""
        return [module.log_scale for module in self.modules() if isinstance(module, StudentLinear)]

    def clips(self) -> list[nn.Parameter]:
        """Clip factors of all inputs, keys and values."""
        return [p for name, p in self.named_parameters() if name.endswith("clip_ratio")]

    @torch.no_grad()
    def bound(self) -> None:
        """Bring clips back to where the format can hold them; after every step."""
        for clip in self.clips():
            clip.clamp_(*CLIP_BOUNDS)

    @torch.no_grad()
    def tensors(self, index: int) -> Layer:
        """What training changed of a decoder layer's checkpoint tensors."""
        found: Layer = {}
        for name, module in self.decoder.layers[index].named_modules():
            if isinstance(module, StudentLinear | StudentCache):
                found |= {f"{name}.{key}": tensor for key, tensor in module.tensors().items()}
        return found


class StudentInput(nn.Module):
    """Transform and quantizer of an input that several linears share."""

    def __init__(self, scheme: LinearScheme, tensors: Layer):
        super().__init__()
        self.scheme = scheme
        self._matrices = {name: tensors[name] for name in tensors if name.startswith("input_")}
        self.clip = nn.Parameter(self._matrices.pop("input_clip_ratio")) if "input_clip_ratio" in tensors else None
        self._seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] as the product sees it; computed once for the linears that come with the same tensor."""
        if self._seen is not x:
            self._seen, self._quantized = x, self._quantize(x)
        return self._quantized

    def _quantize(self, x: torch.Tensor) -> torch.Tensor:
        transform = self.scheme.input_transform
        y = transform_input(x.flatten(0, -2), transform, self._matrices, hadamard_product).view(x.shape)
        args = self.scheme.input_activations
        return y if self.clip is None else fake_quantize(y.contiguous(), self.clip, args.num_bits, args.symmetric)


class StudentLinear(nn.Module):
    """A linear whose weights, codes times scales, are multiplied by exp(log_scale) [N], row by row.

    One factor per row even where weights have a scale per group: those have hundreds of times as many,
    more than a few steps can tell apart, and they learn the text by heart (docs/method.md).
    """

    def __init__(self, site: StudentInput, scheme: LinearScheme, tensors: Layer):
        super().__init__()
        self.site = [site]  # a list: several linears share the module
        self._scale = tensors["weight_scale"]
        self._weight = dequantized_weight(tensors, scheme.weights)
        self.log_scale = nn.Parameter(torch.zeros(len(self._scale)))
        self._bias = tensors.get("bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] float32 to [..., N]."""
        out = functional.linear(self.site[0](x), self._weight) * self.log_scale.exp()
        return out if self._bias is None else out + self._bias.float()

    def tensors(self) -> Layer:
        """Scales and clips as the checkpoint holds them."""
        found, clip = {"weight_scale": self._scale * self.log_scale.exp()[:, None]}, self.site[0].clip
        return found if clip is None else found | {"input_clip_ratio": clip.detach().clone()}


class StudentCache(TrainedCache):
    """A layer's KV cache with the clips of keys and values as parameters."""

    def __init__(self, args: KVCacheArgs, tensors: Layer):
        super().__init__(args.num_bits, args.key_transform == "hadamard", tensors.get("key_mean"))
        self.key_clip_ratio, self.value_clip_ratio = (
            nn.Parameter(tensors[f"{name}_clip_ratio"].clone()) for name in ("key", "value")
        )

    def clips(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip factors [kv_heads, 2] of keys and of values."""
        return self.key_clip_ratio, self.value_clip_ratio

    def tensors(self) -> Layer:
        """The clips as the checkpoint holds them."""
        return {
            "key_clip_ratio": self.key_clip_ratio.detach().clone(),
            "value_clip_ratio": self.value_clip_ratio.detach().clone(),
        }
