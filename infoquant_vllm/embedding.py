"""Embedding and lm_head of a tied model whose residual stream is rotated."""

from typing import Any

import torch
import torch.nn.functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from infoquant_vllm.format import FormatError
from infoquant_vllm.loading import LoadTracker
from infoquant_vllm.ops.rotate_rows import rotate_rows

MAX_ROTATION_ERROR = 1e-3


class RotatedEmbeddingMethod(QuantizeMethodBase):
    """One matrix E [vocab, H] in its original basis for both ends of the model.

    The embedding rotates the looked-up rows into the residual basis (E[ids] @ Q); lm_head rotates
    the few rows that reach it back, applies the final norm's gain, and multiplies with E.
    Logits of a dtype of their own (head_dtype) are refused: vLLM goes past `apply` for them. For the
    same reason this is no subclass of vLLM's unquantised method.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix

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
        """Register E, sharded over the vocabulary, and the rotation and gain, whole on every rank."""
        model = get_current_vllm_config().model_config
        if model is not None and model.head_dtype != params_dtype:
            raise FormatError(
                f"{self.prefix}: head_dtype {model.head_dtype} is not served with a rotated tied embedding, "
                f"leave it at the model's {params_dtype}"
            )
        tracker = LoadTracker({None: self.prefix})
        layer.infoquant_tracker = tracker
        loader = extra_weight_attrs["weight_loader"]
        tensors = {
            "weight": torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype),
            "residual_rotation": torch.empty(input_size, input_size, dtype=torch.float32),
            "final_norm_weight": torch.empty(input_size, dtype=torch.float32),
        }
        for name, data in tensors.items():
            param = torch.nn.Parameter(data, requires_grad=False)
            layer.register_parameter(name, param)
            set_weight_attrs(param, {"weight_loader": tracker.track(name, loader)})
        set_weight_attrs(layer.weight, {"input_dim": 1, "output_dim": 0})

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let lm_head read the embedding's tensors."""
        for name in ("weight", "residual_rotation", "final_norm_weight", "infoquant_tracker"):
            setattr(layer, name, getattr(embed_tokens, name))
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse missing tensors and a rotation that is none."""
        layer.infoquant_tracker.require_all()
        rotation = layer.residual_rotation.data.double()
        error = (rotation @ rotation.t() - torch.eye(len(rotation))).abs().max().item()
        if error > MAX_ROTATION_ERROR:
            raise FormatError(
                f"{self.prefix}.residual_rotation is not orthogonal: |Q Q^T - I| is {error:.3g}, "
                f"expected at most {MAX_ROTATION_ERROR:g}; quantise the model again"
            )
        if layer.residual_rotation.dtype != torch.float64:  # lm_head shares what the embedding has converted
            layer.residual_rotation.data = rotation
            layer.final_norm_weight.data = layer.final_norm_weight.data.double()

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """ids [tokens] to rows [tokens, H] of the rotated residual stream."""
        return rotate_rows(F.embedding(input_, layer.weight), layer.residual_rotation, None)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [rows, H] in the rotated basis, normalised without gain, to logits [rows, vocab]."""
        rows = rotate_rows(x, layer.residual_rotation.t(), layer.final_norm_weight)
        return F.linear(rows, layer.weight, bias)
