"""Find the fastest tiles of the GEMM on this GPU for a checkpoint's linears, as a file for INFOQUANT_TILES.

Every linear as vLLM fuses it, at each of TOKENS; candidates are the table's own tile, FEW and MANY. A tile that gives
other results than the table's is an error.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from pydantic import TypeAdapter
from rich.console import Console

from benchmarks.common.provenance import write_whole
from benchmarks.gpu.sites import MODULES, moved, sizes
from benchmarks.gpu.timing import copies, microseconds
from infoquant_vllm.format import Checkpoint
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.triton.common import architecture
from infoquant_vllm.kernels.triton.linear import gemm
from infoquant_vllm.kernels.triton.rotate_quantize import Codes
from infoquant_vllm.kernels.triton.tiles import FEW_TOKENS, Measured, Tile, linear_tile
from infoquant_vllm.kernels.triton.weights import Layout, layout, prepare_linear

TOKENS = (1, 16, FEW_TOKENS, 64, 128, 256, 512, 2048)
MANY = tuple(
    Tile(n, m, 128, warps, stages)
    for n, m, warps in ((128, 64, 8), (128, 128, 4), (128, 128, 8), (128, 256, 8))
    for stages in (3, 4)
)
FEW = tuple(
    Tile(n, 32, k, 4, stages, splits)
    for n, k in ((64, 256), (64, 128), (128, 128))
    for stages in (3, 4)
    for splits in (1, 2, 4, 8)
)


def main() -> None:
    """Time all tiles, print the best and write --output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a W4A4KV4 checkpoint; no weights are read")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    found = []
    for linear in linears(Checkpoint(options.checkpoint)):
        for tokens in TOKENS:
            found.append(best(linear, tokens, torch.device("cuda")))
            Console().print(found[-1])
    write_whole(TypeAdapter(list[Measured]).dump_json(found, indent=1).decode() + "\n", options.output)


@dataclass(frozen=True)
class Linear:
    """The shape of a linear, by which its tile is chosen."""

    features: int
    channels: int
    group_size: int | None
    """of the weights"""
    symmetric: bool
    num_bits: int
    """of the inputs"""

    @property
    def layout(self) -> Layout:
        """Return the layout of its weights."""
        return layout(self.features, 1, self.group_size)

    def products(self, tokens: int, device: torch.device) -> list[Callable[[Tile], torch.Tensor]]:
        """Return calls of random codes and weights with a tile, which differ in where the weights are."""
        torch.manual_seed(0)
        packed = torch.randint(0, 256, (self.channels, self.features // 2), dtype=torch.uint8)
        groups = 1 if self.group_size is None else self.features // self.group_size
        multiplier, zero = torch.randint(1, 9, (2, self.channels, groups), dtype=torch.uint8)
        scale, has_groups = torch.rand(self.channels, 1), self.group_size is not None
        given = PackedWeight(packed, scale, multiplier if has_groups else None, None if self.symmetric else zero)
        weight = moved(prepare_linear(given, 4, 1), device)
        weights = [weight._replace(packed=weight.packed.clone()) for _ in range(copies(packed.nbytes, device.type))]
        inputs = InputQuant([], 0, torch.empty(1, 2), self.num_bits, symmetric=False)
        codes = Codes.empty(tokens, inputs, self.layout.padded, weight.zero_point is not None, device)
        codes.values.random_(-127, 128)
        codes.scale.uniform_(0.5, 1.5)
        for part in (codes.zp_offset, codes.sums):
            if part is not None:
                part.random_(0, 8)
        return [partial(gemm, codes, self.features, each, None, torch.bfloat16) for each in weights]


def linears(checkpoint: Checkpoint) -> list[Linear]:
    """Return each fused linear of vLLM once; those of 8-bit weights or 16-bit inputs keep the table's tiles."""
    found = []
    for site, module in MODULES.items():
        scheme = checkpoint.config.scheme(f"model.layers.0.{module}")
        if scheme is None or scheme.input_activations.num_bits == 16 or scheme.weights.num_bits != 4:
            continue
        features, channels = sizes(checkpoint.shape, site)
        weights, num_bits = scheme.weights, scheme.input_activations.num_bits
        found.append(Linear(features, channels, weights.group_size, weights.symmetric, num_bits))
    return list(dict.fromkeys(found))


def best(linear: Linear, tokens: int, device: torch.device) -> Measured:
    """Return the fastest tile for up to so many tokens; raise ValueError where a tile gives other results."""
    shape, arch = linear.layout, architecture(device)
    own, calls = linear_tile(arch, tokens, linear.channels, shape), linear.products(tokens, device)
    expected, times = calls[0](own).float(), {own: time_of(calls, own, device)}
    for tile in candidates(tokens, shape):
        try:
            found = calls[0](tile).float()
        except (RuntimeError, triton.TritonError):  # it does not compile, or does not fit in shared memory
            continue
        if not found.equal(expected):
            raise ValueError(f"{linear}, {tokens} tokens: results of {tile} are not those of {own}")
        times[tile] = time_of(calls, tile, device)
    fastest = min(times, key=lambda tile: times[tile])
    sizes = {"channels": linear.channels, "features": linear.features}
    return Measured(arch=arch, tokens=tokens, grouped=shape.grouped, tile=fastest, **sizes)


def candidates(tokens: int, shape: Layout) -> Iterator[Tile]:
    """Return the tiles that suit the shape, each once."""
    found = dict.fromkeys(
        tile._replace(
            block_m=16 if tokens <= 16 else tile.block_m,
            block_k=shape.block_k(tile.block_k),
            splits=min(tile.splits, shape.steps(shape.block_k(tile.block_k))),
        )
        for tile in (FEW if tokens <= FEW_TOKENS else MANY)
    )
    yield from found


def time_of(calls: list[Callable[[Tile], torch.Tensor]], tile: Tile, device: torch.device) -> float:
    """Return microseconds of a call in a CUDA graph."""
    found = microseconds([partial(call, tile) for call in calls], device.type)
    return 0.0 if found is None else found


if __name__ == "__main__":
    main()
