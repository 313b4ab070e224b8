"""The linears of a decoder layer, and W4A4 ones of random weights with their shapes."""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch

from benchmarks.gpu.timing import copies
from infoquant_vllm.format import ModelShape
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.triton.linear import gemm, linear, prepare_linear, prepare_matrices
from infoquant_vllm.kernels.triton.rotate_quantize import Codes, rotate_quantize
from infoquant_vllm.kernels.triton.weights import layout

MODULES = MappingProxyType(
    {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}
)
"""A linear of each site's scheme, under whose name all of the site is made."""


class Site(NamedTuple):
    """A linear as the preset `fast` serves it: input quantized in `groups`, through a Hadamard matrix (0: none).

    weight_group: features of a group of its weights (0: all)
    """

    features: int
    channels: int
    groups: int
    hadamard: int
    weight_group: int = 0

    def in_groups(self) -> "Site":
        """Return the linear as the preset `best` serves it."""
        return self._replace(groups=self.features // 32, weight_group=64)


class Heads(NamedTuple):
    """Attention heads of a layer."""

    queries: int
    keys: int
    size: int


LLAMA_HEADS, SMALL_HEADS = Heads(32, 8, 128), Heads(2, 1, 64)


def sites(dry_run: bool) -> dict[str, Site]:
    """Return the linears of LLaMA-3-8B, or of a tiny model of its kind."""
    hidden, intermediate, heads = (128, 256, SMALL_HEADS) if dry_run else (4096, 14336, LLAMA_HEADS)
    return {
        "qkv": Site(hidden, (heads.queries + 2 * heads.keys) * heads.size, 1, 0),
        "o": Site(hidden, hidden, heads.queries, 0),
        "gate_up": Site(hidden, 2 * intermediate, 1, 0),
        "down": Site(intermediate, hidden, 1, intermediate),
    }


def sizes(shape: ModelShape, site: str) -> tuple[int, int]:
    """Return (features, channels) of all that a site's linears make together."""
    linears = shape.linears()
    parts = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(site, (site,))
    found = [size for name, size in linears.items() if name.startswith("model.layers.0.")
             and name.split(".")[-1].removesuffix("_proj") in parts]  # fmt: skip
    return found[0][1], sum(channels for channels, _ in found)


def moved(weight: PackedWeight, device: torch.device | str) -> PackedWeight:
    """Return a prepared weight on a device."""
    packed, scale, *qparams = weight
    return PackedWeight(
        packed.to(device), scale.to(device), *(None if each is None else each.to(device) for each in qparams)
    )


class QuantizedLinear:
    """A W4A4 linear of random weights, in as many copies as it takes to miss the L2 cache."""

    def __init__(self, site: Site, device: str):
        self.site = site
        self.matrices = [matrix.to(device) for matrix in prepare_matrices([], site.hadamard)]
        self.clip = torch.full((site.groups, 2), 0.9, device=device)
        number = copies(site.channels * site.features // 2, device)
        self.weights = [self._weight(device) for _ in range(number)]

    def _weight(self, device: str) -> PackedWeight:
        channels, features, size = self.site.channels, self.site.features, self.site.weight_group
        packed = torch.randint(0, 256, (channels, features // 2), dtype=torch.uint8, device=device)
        scale = torch.rand(channels, 1, device=device) / 100 + 0.01
        if not size:
            return prepare_linear(PackedWeight(packed, scale, None, None), 4, 1)
        qparams = torch.randint(1, 9, (2, channels, features // size), dtype=torch.uint8, device=device)
        return prepare_linear(PackedWeight(packed, scale, *qparams), 4, 1)

    @property
    def inputs(self) -> InputQuant:
        """Return how its activations are quantized."""
        return InputQuant(self.matrices, self.site.hadamard, self.clip, 4, symmetric=False)

    def calls(self, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        """Return a call of the whole linear for each copy."""
        return [partial(linear, x, self.inputs, weight, None) for weight in self.weights]

    def quantize(self, x: torch.Tensor) -> Codes:
        """Run the quantizer alone."""
        return rotate_quantize(x, self.inputs, layout(self.site.features, 1).padded, with_sums=False)

    def quantizer_calls(self, x: torch.Tensor) -> list[Callable[[], Codes]]:
        """Return a call of the quantizer alone."""
        return [partial(self.quantize, x)]

    def product_calls(self, x: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        """Return a call of the product alone for each copy."""
        return self.products(self.quantize(x))

    def products(self, codes: Codes) -> list[Callable[[], torch.Tensor]]:
        """Return a call of the product alone for each copy."""
        return [partial(gemm, codes, self.site.features, weight, None, torch.bfloat16) for weight in self.weights]
