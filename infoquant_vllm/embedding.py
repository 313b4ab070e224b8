"""Embedding and lm_head of a model with an 8-bit lm_head, or with a tied one and a rotated residual stream (R1)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from infoquant_vllm.format import FormatError
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.ops import dense_linear, linear, rotate_rows, weight_rows
from infoquant_vllm.loading import LoadTracker
from infoquant_vllm.summary import Summary

MAX_ROTATION_ERROR = 1e-3
MATRIX_TENSORS = ("weight", "weight_packed", "weight_scale")
INT16_INPUT = InputQuant([], 0, None, 16, True)


@dataclass
class InverseRotation:
    """R1^T, which leads out of the residual basis: made for the first logits, since an embedding alone needs none.

    A tied lm_head shares the embedding's, which drops it when a new R1 has been loaded.
    """

    matrix: torch.Tensor | None = None


class InfoQuantEmbeddingMethod(QuantizeMethodBase):
    """Serve a matrix E [vocab, H] as embedding or lm_head, one for both where the model is tied.

    rotated: E is in its original basis. The embedding rotates the looked-up rows into the residual basis (E[ids] @ R1);
    lm_head rotates the few rows that reach it back and applies the final norm's gain before it multiplies with E.
    num_bits: E stays in 8-bit codes with a scale per row, which a lookup dequantizes into the model's dtype; the
    logits are a W8A16 product.

    head_dtype, a dtype for the logits, is refused: vLLM bypasses `apply` for it. For the same reason this is no
    subclass of vLLM's unquantized method. Pooling models have no logits: vLLM drops their lm_head, whose tensors are on
    the meta device then.
    """

    def __init__(self, prefix: str, rotated: bool, num_bits: int | None, summary: Summary):
        """Serve the layer `prefix`; num_bits: 8, or None for a matrix in the model's dtype."""
        self.prefix, self.rotated, self.num_bits, self.summary = prefix, rotated, num_bits, summary
        self.tied = False

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
        """Register E, sharded over the vocabulary, and R1 and the gain, whole on every rank."""
        model = get_current_vllm_config().model_config
        if model is not None and model.runner_type != "pooling" and model.head_dtype != params_dtype:
            raise FormatError(
                f"{self.prefix}: head_dtype {model.head_dtype} is not served with a rotated tied embedding "
                f"or an 8-bit lm_head, leave it at the model's {params_dtype}"
            )
        tracker = LoadTracker({None: self.prefix})
        layer.infoquant_tracker, layer.infoquant_inverse = tracker, InverseRotation()
        layer.infoquant_dtype, layer.infoquant_hidden = params_dtype, input_size
        loader = extra_weight_attrs["weight_loader"]
        for name, data in self._tensors(sum(output_partition_sizes), input_size, params_dtype).items():
            param = torch.nn.Parameter(data, requires_grad=False)
            layer.register_parameter(name, param)
            set_weight_attrs(param, {"weight_loader": tracker.track(name, loader)})
            if name in MATRIX_TENSORS:
                set_weight_attrs(param, {"input_dim": 1, "output_dim": 0})
        if self.num_bits is not None:
            self.summary.expect()

    def _tensors(self, rows: int, hidden: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors = {}
        if self.num_bits is not None:
            tensors["weight_packed"] = torch.empty(rows, hidden, dtype=torch.uint8)
            tensors["weight_scale"] = torch.empty(rows, 1, dtype=torch.float32)
        else:
            tensors["weight"] = torch.empty(rows, hidden, dtype=dtype)
        if self.rotated:
            tensors["r1"] = torch.empty(hidden, hidden, dtype=torch.float32)
            tensors["final_norm_weight"] = torch.empty(hidden, dtype=torch.float32)
        return tensors

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let lm_head read the embedding's tensors."""
        for name, param in embed_tokens.named_parameters(recurse=False):
            setattr(layer, name, param)
        layer.infoquant_tracker = embed_tokens.infoquant_tracker
        layer.infoquant_inverse = embed_tokens.infoquant_inverse
        self.tied = True
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse missing tensors and an R1 that is not orthogonal; pack E, which a tied lm_head shares."""
        if (layer.weight_packed if self.num_bits is not None else layer.weight).is_meta:
            if self.num_bits is not None:
                self.summary.dropped()
            return
        layer.infoquant_tracker.finish(layer, self.num_bits)
        layer.infoquant_inverse.matrix = None
        if self.rotated:
            self._check_rotation(layer.r1.double())
        if self.num_bits is not None:
            packed, kernels = layer.weight_packed, backend(layer.weight_packed.device.type)
            bf16 = 2 * packed.numel()
            if not self.tied:
                weight = PackedWeight(packed.data, layer.weight_scale.data, None, None)
                packed.data = kernels.prepare_linear(weight, 8, 1).packed
            self.summary.lm_head(f"W8A16 ({kernels.name})", packed.nbytes + layer.weight_scale.nbytes, bf16)

    def _check_rotation(self, rotation: torch.Tensor) -> None:
        error = (rotation @ rotation.t() - torch.eye(len(rotation)).to(rotation)).abs().max().item()
        if error > MAX_ROTATION_ERROR:
            raise FormatError(
                f"{self.prefix}.r1 is not orthogonal: |R1 R1^T - I| is {error:.3g}, "
                f"expected at most {MAX_ROTATION_ERROR:g}; quantize the model again"
            )

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Look up ids [...]: rows [..., H] of the residual stream; vLLM's Transformers backend passes [1, tokens]."""
        ids = input_.flatten()
        if self.num_bits is not None:
            codes = weight_rows(layer.weight_packed, ids, layer.infoquant_hidden)
            rows = (codes * F.embedding(ids, layer.weight_scale)).to(layer.infoquant_dtype)
        else:
            rows = F.embedding(ids, layer.weight)
        rows = rotate_rows(rows, layer.r1, None) if self.rotated else rows
        return rows.view(*input_.shape, -1)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map hidden states [rows, H], without the final norm's gain if rotated, to logits [rows, vocab]."""
        rows = rotate_rows(x, _inverse_rotation(layer), layer.final_norm_weight) if self.rotated else x
        if self.num_bits is not None:
            return linear(rows, INT16_INPUT, PackedWeight(layer.weight_packed, layer.weight_scale, None, None), bias)
        logits = dense_linear(rows, layer.weight)
        return logits if bias is None else logits + bias


def _inverse_rotation(layer: Any) -> torch.Tensor:
    if layer.infoquant_inverse.matrix is None:
        layer.infoquant_inverse.matrix = layer.r1.t().contiguous()
    return layer.infoquant_inverse.matrix
