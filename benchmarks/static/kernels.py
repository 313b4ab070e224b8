"""The kernels that are compiled; for those of linears their calls for a model and the work of a launch."""

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.static.cases import LAYER_TOKENS, MODELS, Case, Entry, Model
from benchmarks.static.kv_kernels import KV_ENTRIES
from benchmarks.static.launches import Launch
from infoquant_vllm.kernels.operands import PackedWeight
from infoquant_vllm.kernels.triton.linear import gemm
from infoquant_vllm.kernels.triton.rotate_quantize import Codes, prepare_matrices, rotate_quantize
from infoquant_vllm.kernels.triton.tiles import Tile
from infoquant_vllm.kernels.triton.weights import layout, prepare_weight

TOKENS = (16, 2048)


def linear_cases(model: Model) -> Iterator[Case]:
    """Yield GEMMs of W4A4: input of o_proj per head, else per token; of the first model other schemes too."""
    for layer, (features, channels) in model.linears.items():
        groups = features // model.head_size if layer == "o" else 1
        for tokens in LAYER_TOKENS:
            scheme = "A4 per head" if layer == "o" else "A4 per token"
            yield Case(
                model.name,
                layer,
                scheme,
                tokens,
                linear_call(tokens, features, channels, groups),
                tokens * features * channels,
            )
    if model is MODELS[0]:
        features, channels = model.linears["gate_up"]
        for tokens in TOKENS:
            for name, given in SCHEMES.items():
                yield Case(
                    model.name,
                    "gate_up",
                    name,
                    tokens,
                    linear_call(tokens, features, channels, **given),
                    tokens * features * channels,
                )


SCHEMES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "A8 per token": {"num_bits": 8},
        "A4 groups of 64, weights of 64 with zeros": {"groups": 64, "weight_groups": 64, "signed": False},
        "A4 groups of 128": {"groups": 32},
        "A8 groups of 32, weights of 64 with zeros": {
            "groups": 128,
            "weight_groups": 64,
            "signed": False,
            "num_bits": 8,
        },
        "A16, weights of 64 with zeros": {"weight_groups": 64, "signed": False, "num_bits": 16},
    }
)


def linear_call(
    tokens: int,
    features: int,
    channels: int,
    groups: int = 1,
    weight_groups: int = 1,
    signed: bool = True,
    num_bits: int = 4,
    tile: Tile | None = None,
) -> Callable[[], Any]:
    """Return a GEMM's call as `linear` makes it; tile: another than the table's."""
    finer = max(groups, weight_groups)
    with torch.device("meta"):
        weight = prepare_weight(torch.empty(channels, features // 2, dtype=torch.uint8), 4, signed, finer)
        grid = torch.empty(weight_groups, channels).t()
        zero = None if signed else torch.empty(weight_groups, channels, dtype=torch.uint8).t()
        shape = layout(features, finer, 4)
        sum_groups = 0 if signed else finer
        codes = Codes.empty(tokens, groups, shape.padded, sum_groups, num_bits, False, torch.device("meta"))
    return lambda: gemm(codes, features, PackedWeight(weight, grid, zero), None, torch.bfloat16, tile, num_bits == 16)


def linear_trips(launch: Launch) -> float:
    """Return the average steps of a program."""
    return launch.arguments["steps"] / launch.grid[1]


def linear_macs(launch: Launch) -> float:
    """Count multiply-accumulates of all programs, in whole tiles."""
    given = launch.arguments
    return launch.grid[0] * given["BLOCK_N"] * given["BLOCK_M"] * given["codes_stride"]


def linear_loaded(launch: Launch) -> float:
    """Return the bytes of weights and codes of a step."""
    given = launch.arguments
    step = given["codes_stride"] // given["steps"]
    return given["BLOCK_N"] * step * given["WEIGHT_BITS"] // 8 + given["BLOCK_M"] * step


def linear_in_flight(launch: Launch) -> float:
    """Return the bytes of the stages in flight."""
    return (launch.options["num_stages"] - 1) * linear_loaded(launch)


def reduce_moved(launch: Launch) -> int:
    """Return all bytes but the weight's, of which only the sums behind the rows are read."""
    return launch.nbytes - int(launch.arguments["weight_ptr"].nbytes)


def rotate_cases(model: Model) -> Iterator[Case]:
    """Yield quantizers as `fast` needs them; of the first model other transforms too."""
    for layer, (features, _) in model.linears.items():
        groups = features // model.head_size if layer == "o" else 1
        hadamard = features if layer == "down" else 0
        for tokens in TOKENS:
            scheme = ("Hadamard, " if hadamard else "") + ("A4 per head" if layer == "o" else "A4 per token")
            yield Case(model.name, layer, scheme, tokens, rotate_call(tokens, features, groups, hadamard))
    if model is MODELS[0]:
        features = model.hidden
        pair = [torch.empty(size, size, device="meta") for size in (64, 64)]
        others: dict[str, tuple[Any, ...]] = {
            "Hadamard, A4 per token": (1, features),
            "Hadamard, A8 per token": (1, features, [], 8),
            "Hadamard of heads, A4 per head": (32, 128),
            "A4 groups of 64": (64, 0),
            "Kronecker 64 x 64, A4 per token": (1, 0, pair),
        }
        for tokens in TOKENS:
            for name, given in others.items():
                yield Case(model.name, "qkv", name, tokens, rotate_call(tokens, features, *given))


def blocks_cases(model: Model) -> Iterator[Case]:
    """Yield learned blocks: half a row each, as in the paper, and of a head's size."""
    if model is not MODELS[0]:
        return
    for size in (128, model.hidden // 2):
        blocks = [torch.empty(model.hidden // size, size, size, device="meta")]
        for tokens in TOKENS:
            call = rotate_call(tokens, model.hidden, 1, 0, blocks)
            yield Case(model.name, "qkv", f"blocks of {size}, A4 per token", tokens, call)


def rotate_call(
    tokens: int,
    features: int,
    groups: int,
    hadamard: int,
    matrices: list[torch.Tensor] | None = None,
    num_bits: int = 4,
) -> Callable[[], Any]:
    """Return a quantizer's call as `linear` makes it."""
    given = [matrix.to("meta") for matrix in prepare_matrices(list(matrices or []), hadamard)]
    x = torch.empty(tokens, features, dtype=torch.bfloat16, device="meta")
    clip = torch.empty(groups, 2, device="meta")
    padded = layout(features, groups, 4).padded
    return lambda: rotate_quantize(x, given, hadamard, clip, num_bits, False, padded, 0)


def blocks_trips(launch: Launch) -> float:
    """Count steps over the depth of a block, for each tile of columns, and twice if a group is wider than a tile."""
    given = launch.arguments
    columns = given["GROUP_SIZE"] // given["COLUMNS"]
    return given["BLOCK_SIZE"] / given["BLOCK_K"] * columns * (2 if columns > 1 else 1)


def rotate_in_flight(launch: Launch) -> float:
    """Return the bytes that a program reads of its tokens."""
    given = launch.arguments
    return 2 * given["ROWS"] * given["BLOCKS"] * given["OUTER"] * given["INNER"]


ENTRIES: MappingProxyType[str, Entry] = MappingProxyType(
    {
        "gemm_kernel": Entry(linear_cases, linear_trips, linear_macs, linear_in_flight, loaded=linear_loaded),
        "split_k_reduce_kernel": Entry(lambda model: iter(()), moved=reduce_moved),
        "rotate_quantize_kernel": Entry(rotate_cases, in_flight=rotate_in_flight),
        "rotate_blocks_kernel": Entry(blocks_cases, blocks_trips),
        **KV_ENTRIES,
    }
)
