"""The kernels that are compiled; for those of linears their calls for a model and the work of a launch."""

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.static.cases import LAYER_TOKENS, MODELS, Case, Entry, Model, linear_in_flight, linear_loaded
from benchmarks.static.experts import EXPERT_ENTRIES
from benchmarks.static.kv_kernels import KV_ENTRIES
from benchmarks.static.launches import Launch
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.triton.linear import gemm
from infoquant_vllm.kernels.triton.rotate_quantize import Codes, prepare_matrices, rotate_quantize
from infoquant_vllm.kernels.triton.tiles import Tile
from infoquant_vllm.kernels.triton.weights import layout, prepare_linear

TOKENS = (16, 2048)


LAYER_SCHEMES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "W4A4": {},
        "W4A4, weights in groups": {"group_size": 64, "signed": False},
        "W4A8, weights in groups": {"group_size": 64, "signed": False, "num_bits": 8},
    }
)
"""Of a layer's linears: the product of `fast` (groups of activations do not change it), of `best` and of `w4a8kv4`."""
SCHEMES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "A8 per token": {"num_bits": 8},
        "W4A4, weights in groups of 32": {"group_size": 32},
        "W4A4 in two segments": {"segments": 2},
        "A16, weights in groups": {"group_size": 64, "signed": False, "num_bits": 16},
    }
)


def linear_cases(model: Model) -> Iterator[Case]:
    """Yield GEMMs of W4A4; of the first model other schemes too."""
    schemes = LAYER_SCHEMES if model is MODELS[0] else {"W4A4": {}}
    for scheme, given in schemes.items():
        for layer in model.linears:
            yield from (_linear_case(model, layer, scheme, tokens, given) for tokens in LAYER_TOKENS)
    if model is MODELS[0]:
        for tokens in TOKENS:
            yield from (_linear_case(model, "gate_up", scheme, tokens, given) for scheme, given in SCHEMES.items())


def _linear_case(model: Model, layer: str, scheme: str, tokens: int, given: dict[str, Any]) -> Case:
    features, channels = model.linears[layer]
    call = linear_call(tokens, features, channels, **given)
    return Case(model.name, layer, scheme, tokens, call, tokens * features * channels)


def linear_call(
    tokens: int,
    features: int,
    channels: int,
    group_size: int | None = None,
    signed: bool = True,
    num_bits: int = 4,
    segments: int = 1,
    tile: Tile | None = None,
) -> Callable[[], Any]:
    """Return a GEMM's call as `linear` makes it; group_size: of weights; tile: another than the table's."""
    device, groups = torch.device("meta"), 1 if group_size is None else features // group_size
    qparams = torch.empty(channels, groups, dtype=torch.uint8, device=device)
    packed = torch.empty(channels, features // 2, dtype=torch.uint8, device=device)
    given = PackedWeight(
        packed,
        torch.empty(channels, 1, device=device),
        None if group_size is None else qparams,
        None if signed else qparams,
    )
    weight = prepare_linear(given, 4, segments)
    inputs = InputQuant([], 0, torch.empty(segments, 2, device=device), num_bits, False, segments)
    padded = layout(features, segments, group_size).padded
    codes = Codes.empty(tokens, inputs, padded, weight.zero_point is not None, device)
    return lambda: gemm(codes, features, weight, None, torch.bfloat16, tile, num_bits == 16)


def linear_trips(launch: Launch) -> float:
    """Return the average steps of a program."""
    given = launch.arguments
    return given["steps"] * given["SEGMENTS"] / launch.grid[1]


def linear_macs(launch: Launch) -> float:
    """Count multiply-accumulates of all programs, in whole tiles."""
    given = launch.arguments
    return launch.grid[0] * given["BLOCK_N"] * given["BLOCK_M"] * given["values_stride"]


def reduce_moved(launch: Launch) -> int:
    """Return all bytes but the weight's, of which only the sums behind the rows are read."""
    given = launch.arguments
    held = [given[name] for name in ("weight_ptr", "word_ptr") if given[name] is not None]
    return launch.nbytes - sum(int(each.nbytes) for each in held)


def rotate_cases(model: Model) -> Iterator[Case]:
    """Yield quantizers as `fast` needs them; of the first model other transforms and groups too."""
    for layer, (features, _) in model.linears.items():
        hadamard, groups = features if layer == "down" else 0, features // model.head_size if layer == "o" else 1
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
            "A4 groups of 32": (128, 0),
            "Kronecker 64 x 64, A4 per token": (1, 0, pair),
        }
        for tokens in TOKENS:
            for name, given in others.items():
                yield Case(model.name, "qkv", name, tokens, rotate_call(tokens, features, *given))
            wide, _ = model.linears["down"]
            call = rotate_call(tokens, wide, wide // 32, wide)
            yield Case(model.name, "down", "Hadamard, A4 groups of 32", tokens, call)


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
    inputs = InputQuant(given, hadamard, torch.empty(groups, 2, device="meta"), num_bits, False)
    return lambda: rotate_quantize(x, inputs, layout(features, 1).padded, with_sums=False)


def rotate_in_flight(launch: Launch) -> float:
    """Return the bytes that a program reads of its tokens."""
    given = launch.arguments
    return 2 * given["ROWS"] * given["BLOCKS"] * given["OUTER"] * given["INNER"]


ENTRIES: MappingProxyType[str, Entry] = MappingProxyType(
    {
        "gemm_kernel": Entry(linear_cases, linear_trips, linear_macs, linear_in_flight, loaded=linear_loaded),
        "split_k_reduce_kernel": Entry(lambda model: iter(()), moved=reduce_moved),
        "rotate_quantize_kernel": Entry(rotate_cases, in_flight=rotate_in_flight),
        **EXPERT_ENTRIES,
        **KV_ENTRIES,
    }
)
