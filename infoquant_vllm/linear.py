"""Linear layers: parameters, their sharding, and the forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)
from vllm.platforms import current_platform

from infoquant_vllm.format import (
    MAX_VALUE,
    FormatError,
    LinearScheme,
    activation_groups,
    activation_segments,
    check_multipliers,
    check_tp_divisible,
)
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.ops import linear
from infoquant_vllm.loading import LoadTracker, Shard
from infoquant_vllm.summary import Summary

QPARAMS = ("weight_multiplier", "weight_zero_point")
MATRICES = ("input_blocks", "input_left", "input_right")
INPUT_TENSORS = ("input_clip_ratio", "input_mean", *MATRICES)


@register_weight_loader_v2_supported_method
class InfoQuantLinearMethod(LinearMethodBase):
    """Rotate and quantize the input, then multiply it exactly by 4-bit or 8-bit weights.

    16-bit activations have no clip ratios. A row-parallel layer computes on each TP rank what one rank would compute
    of its shard of the features, or is refused (see `check_tp_divisible`).
    """

    def __init__(self, prefix: str, scheme: LinearScheme, sources: list[str], summary: Summary):
        """Serve the layer `prefix`, which holds the checkpoint's linears `sources` side by side."""
        self.prefix, self.scheme, self.sources, self.summary = prefix, scheme, sources, summary
        activations, transform = scheme.input_activations, scheme.input_transform
        self.hadamard = transform.block_size or 0 if transform.type == "hadamard" else 0
        self.num_bits, self.symmetric = activations.num_bits, activations.symmetric
        self.has_clip_ratio, self.has_mean = activations.num_bits != 16, activations.mean
        self.has_multiplier, self.has_zero_point = scheme.weights.group_size is not None, not scheme.weights.symmetric

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors of this layer, sharded as vLLM shards the layer."""
        check_sizes(self.scheme, input_size_per_partition, input_size, self.prefix)
        self._check_kernel()
        tracker = LoadTracker(self._shards(len(output_partition_sizes)))
        loader = extra_weight_attrs["weight_loader"]
        layer.infoquant_tracker, layer.infoquant_rows = tracker, output_partition_sizes
        layer.infoquant_segments = activation_segments(self.scheme.input_activations, input_size_per_partition)
        layer.infoquant_adds_mean = input_size_per_partition == input_size or layer.tp_rank == 0
        self._create_weight(layer, tracker, loader, sum(output_partition_sizes), input_size_per_partition)
        self._create_input(layer, tracker, loader, input_size_per_partition)
        self.summary.expect()

    def _create_weight(
        self, layer: Any, tracker: LoadTracker, loader: Callable[..., None], rows: int, features: int
    ) -> None:
        weights = self.scheme.weights
        groups = 1 if weights.group_size is None else features // weights.group_size
        packed = PackedvLLMParameter(
            data=torch.empty(rows, features * weights.num_bits // 8, dtype=torch.uint8),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=8 // weights.num_bits,
            weight_loader=tracker.track("weight_packed", loader),
        )
        layer.register_parameter("weight_packed", packed)
        scale = ChannelQuantScaleParameter(
            data=torch.empty(rows, 1, dtype=torch.float32),
            output_dim=0,
            weight_loader=tracker.track("weight_scale", loader),
        )
        layer.register_parameter("weight_scale", scale)
        if self.has_mean:
            mean = ChannelQuantScaleParameter(
                data=torch.empty(rows, dtype=torch.float32),
                output_dim=0,
                weight_loader=tracker.track("output_mean", loader),
            )
            layer.register_parameter("output_mean", mean)
        qparams = ("weight_multiplier",) * self.has_multiplier + ("weight_zero_point",) * self.has_zero_point
        for name in qparams:
            largest = 2**weights.num_bits - 1 if name == "weight_zero_point" else None
            data, load = torch.empty(rows, groups, dtype=torch.uint8), tracker.track(name, loader, largest_code=largest)
            if weights.group_size is None:
                param: BasevLLMParameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=load)
            else:
                param = GroupQuantScaleParameter(data=data, output_dim=0, input_dim=1, weight_loader=load)
            layer.register_parameter(name, param)

    def _create_input(self, layer: Any, tracker: LoadTracker, loader: Callable[..., None], features: int) -> None:
        activations, transform = self.scheme.input_activations, self.scheme.input_transform
        is_whole = activations.group_size is None and activations.segment_size is None
        sharded = {"input_clip_ratio": not is_whole, "input_mean": True, "input_blocks": True}
        shapes: dict[str, tuple[int, ...]] = {}
        if self.has_clip_ratio:
            shapes["input_clip_ratio"] = (activation_groups(activations, features), 2)
        if self.has_mean:
            shapes["input_mean"] = (features,)
        if transform.type == "blocks" and transform.block_size is not None:
            shapes["input_blocks"] = (features // transform.block_size, transform.block_size, transform.block_size)
        if transform.factors is not None:
            shapes |= {"input_left": (transform.factors[0],) * 2, "input_right": (transform.factors[1],) * 2}
        for name, shape in shapes.items():
            data, load = torch.empty(shape, dtype=torch.float32), tracker.track(name, loader, shared=True)
            if sharded.get(name, False):
                param: BasevLLMParameter = RowvLLMParameter(data=data, input_dim=0, weight_loader=load)
            else:
                param = BasevLLMParameter(data=data, weight_loader=load)
            layer.register_parameter(name, param)

    def _shards(self, partitions: int) -> dict[Shard, str]:
        if partitions == 1:
            return {None: self.sources[0]}
        if len(self.sources) != partitions:
            raise FormatError(f"{self.prefix}: vLLM fuses {partitions} linears, its model class names {self.sources}")
        is_qkv = self.prefix.endswith("qkv_proj")
        return dict(zip("qkv" if is_qkv else range(partitions), self.sources, strict=True))

    def _check_kernel(self) -> None:
        groups = self.scheme.weights.group_size, self.scheme.input_activations.group_size
        try:
            backend(current_platform.device_type).check_linear(*groups)
        except NotImplementedError as error:
            raise FormatError(f"{self.prefix}: {error}") from None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse missing tensors, then convert the weights to the layout of the kernels."""
        weights = self.scheme.weights
        layer.infoquant_tracker.finish(layer, weights.num_bits)
        self._check_multipliers(layer)
        packed = layer.weight_packed.data
        kernels = backend(packed.device.type)
        matrices = [getattr(layer, name).data for name in MATRICES if hasattr(layer, name)]
        layer.infoquant_matrices = kernels.prepare_matrices(matrices, self.hadamard)
        qparams = (getattr(layer, name).data if hasattr(layer, name) else None for name in QPARAMS)
        given = PackedWeight(packed, layer.weight_scale.data, *qparams)
        prepared = kernels.prepare_linear(given, weights.num_bits, layer.infoquant_segments)
        for name, data in zip(("weight_packed", "weight_scale", *QPARAMS), prepared, strict=True):
            if hasattr(layer, name):
                setattr(layer, name, None if data is None else frozen(data))
        for name in INPUT_TENSORS:
            if hasattr(layer, name):
                setattr(layer, name, frozen(getattr(layer, name).data))
        self._add_bias_to_mean(layer)
        held = sum(param.nbytes for name, param in layer.named_parameters() if name.startswith("weight_"))
        kind = f"W{weights.num_bits}A{self.num_bits} ({kernels.name})"
        self.summary.linear(kind, held, packed.numel() * 8 // weights.num_bits * 2)

    def _add_bias_to_mean(self, layer: Any) -> None:
        """Make `output_mean` all that is added to a product: of a row-parallel layer, on the first rank."""
        if not self.has_mean:
            return
        added = layer.output_mean.data if layer.infoquant_adds_mean else torch.zeros_like(layer.output_mean.data)
        if layer.bias is not None and layer.infoquant_adds_mean and not layer.skip_bias_add:
            added = added + layer.bias.data.float()
        layer.output_mean = frozen(added)

    def _check_multipliers(self, layer: Any) -> None:
        """Refuse multipliers that are too large for their zero-points."""
        if not self.has_multiplier:
            return
        multipliers = layer.weight_multiplier.data.split(layer.infoquant_rows)
        zeros = [None] * len(multipliers)
        if self.has_zero_point:
            zeros = layer.weight_zero_point.data.split(layer.infoquant_rows)
        for source, multiplier, zero in zip(self.sources, multipliers, zeros, strict=True):
            check_multipliers(multiplier, zero, f"{source}.weight_multiplier", "checkpoint")

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map x [..., K] to [..., N], both in the model's dtype."""
        clip_ratio = layer.input_clip_ratio if self.has_clip_ratio else None
        multiplier = layer.weight_multiplier if self.has_multiplier else None
        zero_point = layer.weight_zero_point if self.has_zero_point else None
        input_mean, added = (layer.input_mean, layer.output_mean) if self.has_mean else (None, bias)
        quantizer = clip_ratio, self.num_bits, self.symmetric, layer.infoquant_segments, input_mean
        is_flat = x.dim() == 2
        out = linear(
            x if is_flat else x.reshape(-1, x.shape[-1]),
            InputQuant(layer.infoquant_matrices, self.hadamard, *quantizer),
            PackedWeight(layer.weight_packed, layer.weight_scale, multiplier, zero_point),
            added,
        )
        return out if is_flat else out.view(*x.shape[:-1], out.shape[-1])


def check_sizes(scheme: LinearScheme, features: int, all_features: int, prefix: str) -> None:
    """Raise FormatError where a rank cannot serve `features` of the input, or its sums may overflow."""
    try:
        check_tp_divisible(scheme, all_features, tp_size=all_features // features)
    except FormatError as error:
        raise FormatError(f"{prefix}: {error}") from None
    inputs, weights = scheme.input_activations, scheme.weights
    largest_input = MAX_VALUE if inputs.num_bits == 4 else 2**8
    largest_weight = MAX_VALUE if weights.num_bits == 4 else 2**8
    summed = inputs.segment_size or features
    if largest_input * largest_weight * summed >= 2**31:
        raise FormatError(f"{prefix}: sums over {summed} features may overflow 32 bits")


def frozen(data: torch.Tensor) -> torch.nn.Parameter:
    """Return a parameter without gradients."""
    return torch.nn.Parameter(data, requires_grad=False)
