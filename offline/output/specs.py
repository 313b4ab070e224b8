"""The tensors that a run is going to write, known before it begins."""

import re

from infoquant_vllm.format import QuantizationConfigData, TensorSpec, expected_tensors
from offline.model.source import Source
from offline.output.shards import NAMES

LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def checkpoint_specs(source: Source, config: QuantizationConfigData) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor, ends first, then layer by layer; FormatError where config and model disagree."""
    default, specs = source.unquantized_dtype, expected_tensors(config, source.shape)
    found = {}
    for name in sorted(specs, key=_layer):
        dtype = default if _layer(name) >= 0 or name not in source.weight_map else source.dtype(name)
        found[name] = specs[name].model_copy(update={"dtype": specs[name].dtype or NAMES[dtype]})
    return found


def _layer(name: str) -> int:
    found = LAYER.match(name)
    return -1 if found is None else int(found[1])
