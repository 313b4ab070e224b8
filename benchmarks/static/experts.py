"""The kernels of mixtures of experts: their calls for a model and the work of a launch.

Every routed row goes to any of the experts alike: so many have rows, and so many slots, on average.
"""

from collections.abc import Callable, Iterator
from functools import cache
from math import ceil
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.static.cases import MODELS, Case, Entry, Model, linear_in_flight, linear_loaded
from benchmarks.static.launches import Launch
from infoquant_vllm.format import LinearScheme, ModelShape
from infoquant_vllm.kernels.operands import ExpertChoice, ExpertLinear, InputQuant, PackedWeight
from infoquant_vllm.kernels.triton.experts import experts
from infoquant_vllm.kernels.triton.linear import prepare_linear, prepare_matrices
from offline.presets import PRESETS

TOKENS = (1, 16, 256, 2048)
SCHEMES = MappingProxyType({"fast": "W4A4", "best": "W4A4, weights in groups"})
"""Presets, and the names of their products."""
MIXTURES = MappingProxyType(
    {
        "Qwen3-30B-A3B": Model("Qwen3-30B-A3B", 2048, 6144, 32, 4).shape(
            "Qwen3MoeForCausalLM", 151_936, num_experts=128, num_experts_per_tok=8, expert_size=768
        ),
        "Mixtral-8x7B": MODELS[0].shape(  # but for the experts, the sizes of LLaMA-3-8B
            "MixtralForCausalLM", 32_000, num_experts=8, num_experts_per_tok=2, expert_size=MODELS[0].intermediate
        ),
    }
)


def experts_call(shape: ModelShape, preset: str, tokens: int) -> Callable[[], Any]:
    """Return the call of a mixture as a vLLM layer makes it; presets leave out what mixtures do not take."""
    recipe = PRESETS[preset]
    plain = recipe.model_copy(update={"distillation": None, "gptq": recipe.gptq.model_copy(update={"guided": False})})
    groups = plain.quantization_config(shape).config_groups
    count, hidden, inner = shape.num_experts, shape.hidden_size, shape.expert_size
    gate_up = _linear(groups["gate_up"], (count, 2 * inner, hidden), shared=True)
    down = _linear(groups["down"], (count, hidden, inner), shared=False)
    with torch.device("meta"):
        x, weights = torch.empty(tokens, hidden, dtype=torch.bfloat16), torch.empty(tokens, shape.num_experts_per_tok)
        choice = ExpertChoice(weights, torch.empty_like(weights, dtype=torch.int32))
    return lambda: experts(x, choice, gate_up, down)


def _linear(scheme: LinearScheme, sizes: tuple[int, int, int], shared: bool) -> ExpertLinear:
    """Return a linear of all experts, [experts, channels, features]; shared: they have one clip ratio."""
    weights, inputs, transform = scheme.weights, scheme.input_activations, scheme.input_transform
    hadamard = (transform.block_size or 0) if transform.type == "hadamard" else 0
    matrices = [matrix.to("meta") for matrix in prepare_matrices([], hadamard)]
    count, channels, features = sizes
    groups = 1 if weights.group_size is None else features // weights.group_size
    input_groups = 1 if inputs.group_size is None else features // inputs.group_size
    with torch.device("meta"):
        qparams = torch.empty(channels, groups, dtype=torch.uint8)
        packed = torch.empty(channels, features * weights.num_bits // 8, dtype=torch.uint8)
        scale, clip = torch.empty(channels, 1), torch.empty((input_groups, 2) if shared else (count, input_groups, 2))
    multiplier, zero = None if weights.group_size is None else qparams, None if weights.symmetric else qparams
    one = prepare_linear(PackedWeight(packed, scale, multiplier, zero), weights.num_bits, 1)
    stacked = PackedWeight(*(None if each is None else each.new_empty(count, *each.shape) for each in one))  # type: ignore[arg-type]
    clip_ratio = None if inputs.num_bits == 16 else clip
    return ExpertLinear(InputQuant(matrices, hadamard, clip_ratio, inputs.num_bits, inputs.symmetric), stacked)


@cache
def dealt(rows: int, experts: int, height: int) -> tuple[float, float]:
    """Return how many of `experts` have any of so many routed rows, and how many slots of `height` rows they take."""
    counts = torch.arange(1, rows + 1, dtype=torch.float64)
    chance = torch.distributions.Binomial(rows, torch.tensor(1 / experts, dtype=torch.float64)).log_prob(counts).exp()
    return experts * chance.sum().item(), experts * (chance * (counts / height).ceil()).sum().item()


def _dealt(launch: Launch) -> tuple[float, float]:
    """Return the share of experts with rows, and the slots with rows."""
    given = launch.arguments
    count = len(given["weight_scale_ptr"])
    having, slots = dealt(given["count"], count, given["rows_ptr"].shape[1])
    return having / count, slots


def grouped_trips(launch: Launch) -> float:
    """Return the steps of a program with work."""
    return float(launch.arguments["steps"] * launch.arguments["SEGMENTS"])


def grouped_busy(launch: Launch) -> int:
    """Count the programs whose slot has rows."""
    return ceil(launch.programs // len(launch.arguments["rows_ptr"]) * _dealt(launch)[1])


def grouped_macs(launch: Launch) -> float:
    """Count multiply-accumulates of slots with rows, in whole tiles."""
    given = launch.arguments
    return float(grouped_busy(launch) * given["BLOCK_N"] * given["BLOCK_M"] * given["values_stride"])


def grouped_moved(launch: Launch) -> int:
    """Return all bytes but the weights of experts without rows."""
    weights = [launch.arguments[f"{name}_ptr"] for name in ("weight", "weight_scale", "word", "weight_zero")]
    unread = 1 - _dealt(launch)[0]
    return launch.nbytes - int(unread * sum(each.nbytes for each in weights if each is not None))


def grouped_cases(model: Model) -> Iterator[Case]:
    """Yield, beside the first model, the first mixture by presets."""
    name, shape = next(iter(MIXTURES.items()))
    for preset, scheme in SCHEMES.items() if model is MODELS[0] else ():
        for tokens in TOKENS:
            macs = 3 * tokens * shape.num_experts_per_tok * shape.hidden_size * shape.expert_size
            yield Case(name, "experts", scheme, tokens, experts_call(shape, preset, tokens), macs)


EXPERT_ENTRIES: MappingProxyType[str, Entry] = MappingProxyType(
    {
        "align_kernel": Entry(
            lambda model: iter(()), trips=lambda launch: ceil(launch.arguments["count"] / launch.arguments["CHUNK"])
        ),
        "grouped_gemm_kernel": Entry(
            grouped_cases, grouped_trips, grouped_macs, linear_in_flight, grouped_busy, grouped_moved, linear_loaded
        ),
        "combine_kernel": Entry(lambda model: iter(())),
    }
)
