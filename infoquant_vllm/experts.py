"""Mixtures of experts: parameters, loading, and the forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from infoquant_vllm.format import (
    FormatError,
    LinearScheme,
    activation_groups,
    activation_segments,
    check_multipliers,
)
from infoquant_vllm.kernels.dispatch import Backend, backend
from infoquant_vllm.kernels.operands import ExpertChoice, ExpertLinear, InputQuant, PackedWeight
from infoquant_vllm.kernels.ops import experts
from infoquant_vllm.kernels.torch.experts import prepare_experts
from infoquant_vllm.linear import QPARAMS, check_sizes, frozen
from infoquant_vllm.loading import LoadTracker, Shard
from infoquant_vllm.summary import Summary

GATE_UP, DOWN = "w13_", "w2_"
"""Prefixes of parameters, by which vLLM loads the linears of experts: w1 (gate) and w3 (up) together, w2 (down)."""


class InfoQuantExpertsMethod(FusedMoEMethodBase):
    """Quantize the inputs of the experts that vLLM's router chooses, and multiply exactly by 4-bit or 8-bit weights.

    The experts read one input, whose clip ratios they share; each has its own for the input of its down projection.
    Tensor parallelism shards the features of every expert, expert parallelism the experts.
    """

    def __init__(self, prefix: str, layer: RoutedExperts, schemes: tuple[LinearScheme, LinearScheme], summary: Summary):
        """Serve the mixture `prefix`; schemes: of gate and up, and of down."""
        super().__init__(layer.moe_config)
        self.prefix, self.schemes, self.summary = prefix, dict(zip((GATE_UP, DOWN), schemes, strict=True)), summary
        names = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
        self.names = dict(zip(("w1", "w3", "w2"), names, strict=True))
        self._check_layer(layer)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors of this rank's experts."""
        inner, ranks = intermediate_size_per_partition, self.moe.tp_size
        sizes = {GATE_UP: (2 * inner, hidden_size), DOWN: (hidden_size, inner)}
        self._check_sizes(sizes, hidden_size, inner * ranks)
        self.features = {prefix: features for prefix, (_, features) in sizes.items()}
        all_experts, place = range(self.moe.num_experts), layer._map_global_expert_id_to_local_expert_id
        self.local = [expert for expert in all_experts if place(expert) >= 0]
        layer.infoquant_trackers = {}
        for prefix, (rows, features) in sizes.items():
            shards = ("w1", "w3") if prefix == GATE_UP else ("w2",)
            sources: dict[Shard, str] = {
                (expert, shard): f"{self.prefix}.{expert}.{self.names[shard]}"
                for expert in self.local
                for shard in shards
            }
            tracker = layer.infoquant_trackers[prefix] = LoadTracker(sources)
            self._create(layer, prefix, tracker, (num_experts, rows, features))
        self.summary.expect()

    def _create(self, layer: Any, prefix: str, tracker: LoadTracker, size: tuple[int, int, int]) -> None:
        """Register the parameters of a linear of all experts, [experts, rows, features]."""
        count, rows, features = size
        scheme = self.schemes[prefix]
        weights, activations = scheme.weights, scheme.input_activations
        groups = 1 if weights.group_size is None else features // weights.group_size
        tensors = {
            "weight_packed": torch.empty(count, rows, features * weights.num_bits // 8, dtype=torch.uint8),
            "weight_scale": torch.empty(count, rows, 1, dtype=torch.float32),
        }
        for name, needed in zip(QPARAMS, (weights.group_size is not None, not weights.symmetric), strict=True):
            if needed:
                tensors[name] = torch.empty(count, rows, groups, dtype=torch.uint8)
        if activations.num_bits != 16:
            shape = activation_groups(activations, features), 2
            clips = torch.empty(shape if prefix == GATE_UP else (count, *shape), dtype=torch.float32)
            tensors["input_clip_ratio"] = clips
        for name, data in tensors.items():
            largest = 2**weights.num_bits - 1 if name == "weight_zero_point" else None
            shared = name == "input_clip_ratio" and prefix == GATE_UP
            load = tracker.track(name, self._loader(layer, shared), shared, largest)
            param: Any = torch.nn.Parameter(data, requires_grad=False)
            param.weight_loader = _by_expert(layer, load)
            layer.register_parameter(f"{prefix}{name}", param)

    def _loader(self, layer: Any, shared: bool) -> Callable[[torch.nn.Parameter, torch.Tensor, tuple[int, str]], None]:
        """Return a function that copies this rank's part of a tensor of one expert into a parameter."""
        rank = self.moe.tp_rank

        def load(param: torch.nn.Parameter, loaded: torch.Tensor, shard: tuple[int, str]) -> None:
            expert, name = shard
            place = param.data if shared else param.data[layer._map_global_expert_id_to_local_expert_id(expert)]
            if name != "w2" and not shared:
                rows = len(place) // 2
                place = place[:rows] if name == "w1" else place[rows:]
            part = loaded
            for dim in range(loaded.dim()):
                if loaded.shape[dim] == place.shape[dim] * self.moe.tp_size:
                    part = part.narrow(dim, rank * place.shape[dim], place.shape[dim])
            if part.shape != place.shape:
                raise FormatError(
                    f"{self.prefix}.{expert}.{self.names[name]}: a tensor has shape {list(loaded.shape)}, this rank "
                    f"takes {list(place.shape)} of it; quantize or copy the model again"
                )
            place.copy_(part)

        return load

    def _check_layer(self, layer: RoutedExperts) -> None:
        """Refuse what vLLM's class asks of a mixture and these kernels do not compute."""
        asked = {
            f"activation {layer.activation.value}": layer.activation != MoEActivation.SILU,
            "router weights on the input": layer.apply_router_weight_on_input,
            "biases of experts": self.moe.has_bias,
            "a limit on the activation": layer.swiglu_limit is not None,
            "a mean of inputs": any(scheme.input_activations.mean for scheme in self.schemes.values()),
        }
        for transform in (scheme.input_transform.type for scheme in self.schemes.values()):
            asked[f"input_transform {transform}"] = transform not in ("none", "hadamard")
        found = next((name for name, is_asked in asked.items() if is_asked), None)
        if found is not None:
            raise FormatError(f"{self.prefix}: {found} is not served in mixtures of experts")

    def _check_sizes(self, sizes: dict[str, tuple[int, int]], hidden: int, inner: int) -> None:
        kernels = backend(current_platform.device_type)
        try:
            for prefix, features in ((GATE_UP, hidden), (DOWN, inner)):
                scheme = self.schemes[prefix]
                check_sizes(scheme, sizes[prefix][1], features, self.prefix)
                kernels.check_linear(scheme.weights.group_size, scheme.input_activations.group_size)
        except NotImplementedError as error:
            raise FormatError(f"{self.prefix}: {error}") from None

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        """Return None: vLLM's own kernels are not used."""
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse missing tensors, then convert the weights to the layout of the kernels."""
        held = bf16 = 0
        for prefix, scheme in self.schemes.items():
            layer.infoquant_trackers[prefix].finish(layer, scheme.weights.num_bits, prefix)
            bf16 += getattr(layer, f"{prefix}weight_packed").numel() * 8 // scheme.weights.num_bits * 2
            kernels = backend(layer.w2_weight_packed.device.type)
            self._prepare(layer, prefix, kernels)
            held += sum(p.nbytes for name, p in layer.named_parameters() if name.startswith(f"{prefix}weight_"))
        bits = self.schemes[GATE_UP].weights.num_bits, self.schemes[GATE_UP].input_activations.num_bits
        self.summary.experts(f"W{bits[0]}A{bits[1]} ({kernels.name})", self.moe.num_local_experts, held, bf16)

    def _prepare(self, layer: Any, prefix: str, kernels: Backend) -> None:
        """Convert the parameters of a linear of all experts to the layout of the kernels."""
        scheme, found = self.schemes[prefix], _tensors(layer, prefix)
        self._check_multipliers(found)
        segments = activation_segments(scheme.input_activations, self.features[prefix])
        given = PackedWeight(found["weight_packed"], found["weight_scale"], *(found.get(name) for name in QPARAMS))
        bits = scheme.weights.num_bits
        prepared = prepare_experts(given, lambda weight: kernels.prepare_linear(weight, bits, segments))
        for name, data in zip(("weight_packed", "weight_scale", *QPARAMS), prepared, strict=True):
            if name in found:
                setattr(layer, f"{prefix}{name}", None if data is None else frozen(data))
        setattr(layer, f"{prefix}matrices", kernels.prepare_matrices([], self._hadamard(prefix)))

    def _hadamard(self, prefix: str) -> int:
        transform = self.schemes[prefix].input_transform
        return transform.block_size or 0 if transform.type == "hadamard" else 0

    def _operands(self, layer: Any, prefix: str) -> ExpertLinear:
        args, found = self.schemes[prefix].input_activations, _tensors(layer, prefix)
        inputs = InputQuant(
            getattr(layer, f"{prefix}matrices"),
            self._hadamard(prefix),
            found.get("input_clip_ratio"),
            args.num_bits,
            args.symmetric,
            activation_segments(args, self.features[prefix]),
        )
        qparams = (found.get(name) for name in QPARAMS)
        return ExpertLinear(inputs, PackedWeight(found["weight_packed"], found["weight_scale"], *qparams))

    def _check_multipliers(self, found: dict[str, torch.Tensor]) -> None:
        """Refuse multipliers that are too large for their zero-points."""
        if "weight_multiplier" not in found:
            return
        multipliers, zeros = found["weight_multiplier"], found.get("weight_zero_point")
        for expert, multiplier in enumerate(multipliers):
            zero = None if zeros is None else zeros[expert]
            check_multipliers(multiplier, zero, f"{self.prefix}.{self.local[expert]}.*.weight_multiplier", "checkpoint")

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map x [tokens, hidden] through the chosen experts; outputs of other ranks' experts are left out."""
        local = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        choice = ExpertChoice(topk_weights.float(), local.to(torch.int32))
        return experts(x, choice, self._operands(layer, GATE_UP), self._operands(layer, DOWN))


def _by_expert(layer: Any, load: Callable[..., None]) -> Callable[..., bool | None]:
    """Return a loader with the arguments of vLLM's loader of experts; those of other ranks are left out."""

    def weight_loader(
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        is_local = layer._map_global_expert_id_to_local_expert_id(expert_id) >= 0
        if is_local:
            load(param, loaded_weight, (expert_id, shard_id))
        return is_local if return_success else None

    return weight_loader


def _tensors(layer: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return the layer's tensors of a linear of all experts by their names in the checkpoint."""
    names = ("weight_packed", "weight_scale", *QPARAMS, "input_clip_ratio")
    found = {name: getattr(layer, f"{prefix}{name}", None) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}
