"""Specify the InfoQuant checkpoint format, version 3: `config.json` and the safetensors files.

Both halves of the project share this package. It imports neither vllm nor triton. Everything that comes from a
checkpoint is hostile input: numbers are bounded before anything is allocated, unknown fields are refused by name, and
every error names file and tensor.
"""

from infoquant_vllm.format.architectures import (
    ARCHITECTURES,
    FUSED,
    NORMS,
    ROW_PARALLEL_SITES,
    SITE_NORMS,
    SITES,
    Experts,
)
from infoquant_vllm.format.checkpoint import (
    INDEX_FILE,
    Checkpoint,
    check_multipliers,
    check_values,
    is_checkpoint,
    read_header,
    read_json,
    read_weight_map,
)
from infoquant_vllm.format.errors import FormatError
from infoquant_vllm.format.hadamard import apply_hadamard, hadamard, hadamard_dense
from infoquant_vllm.format.packing import pack_codes, unpack_codes
from infoquant_vllm.format.projection import (
    MODULES_FILE,
    PROJECTION_CONFIG,
    PROJECTION_FOLDER,
    PROJECTION_TENSOR,
    PROJECTION_WEIGHTS,
    files_of,
    projection_config,
    read_projection,
)
from infoquant_vllm.format.schema import (
    FORMAT_VERSION,
    MAX_VALUE,
    QUANT_METHOD,
    ActivationArgs,
    ConfigGroup,
    InputTransform,
    KVCacheArgs,
    LinearScheme,
    QuantizationConfigData,
    StrictModel,
    WeightArgs,
    parse_config,
)
from infoquant_vllm.format.tensor_parallel import check_tp_divisible
from infoquant_vllm.format.tensors import (
    ModelShape,
    TensorSpec,
    activation_groups,
    activation_segments,
    cache_tensors,
    expected_tensors,
    kv_bytes_per_token_head,
    linear_tensors,
)

__all__ = [
    "ARCHITECTURES",
    "FORMAT_VERSION",
    "FUSED",
    "INDEX_FILE",
    "MAX_VALUE",
    "MODULES_FILE",
    "NORMS",
    "PROJECTION_CONFIG",
    "PROJECTION_FOLDER",
    "PROJECTION_TENSOR",
    "PROJECTION_WEIGHTS",
    "QUANT_METHOD",
    "ROW_PARALLEL_SITES",
    "SITES",
    "SITE_NORMS",
    "ActivationArgs",
    "Checkpoint",
    "ConfigGroup",
    "Experts",
    "FormatError",
    "InputTransform",
    "KVCacheArgs",
    "LinearScheme",
    "ModelShape",
    "QuantizationConfigData",
    "StrictModel",
    "TensorSpec",
    "WeightArgs",
    "activation_groups",
    "activation_segments",
    "apply_hadamard",
    "cache_tensors",
    "check_multipliers",
    "check_tp_divisible",
    "check_values",
    "expected_tensors",
    "files_of",
    "hadamard",
    "hadamard_dense",
    "is_checkpoint",
    "kv_bytes_per_token_head",
    "linear_tensors",
    "pack_codes",
    "parse_config",
    "projection_config",
    "read_header",
    "read_json",
    "read_projection",
    "read_weight_map",
    "unpack_codes",
]
