"""Turn a LoRA adapter of the source into the basis of a checkpoint, for vLLM to serve beside it."""

import json
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save

from infoquant_vllm.format import BASIS_CONFIG, Checkpoint, read_basis, turned_name
from offline.algorithms.turn_adapter import turn
from offline.errors import ToolError
from offline.model.adapter import CONFIG, PREFIX, WEIGHTS, A, Adapter, B
from offline.output.atomic import atomic_folder


class TurnedAdapter(BaseModel):
    """An adapter that was turned."""

    model_config = ConfigDict(frozen=True)

    output: str
    fingerprint: str
    """Of the checkpoint's basis."""
    linears: int
    rank: int
    """The largest."""
    bytes: int


def turn_adapter(checkpoint: str | Path, adapter: str | Path, output: str | Path) -> TurnedAdapter:
    """Write the adapter that does to the checkpoint what `adapter` does to its source.

    Args:
        checkpoint: folder that `quantize` wrote.
        adapter: folder of a LoRA adapter of the checkpoint's source, as PEFT saves it.
        output: folder to write; must not exist yet.

    The turned one has the dtypes of the given one, and its scale is in B.

    Raises ToolError or FormatError, naming what is wrong, before anything is written.
    """
    output, opened = Path(output), Checkpoint(checkpoint)
    if output.exists() or output.is_symlink():
        raise ToolError(f"{output}: exists already; choose another folder")
    basis = read_basis(opened)
    if basis is None:
        raise ToolError(
            f"{checkpoint}: no {BASIS_CONFIG}, which mixtures of experts and checkpoints of earlier releases have not; "
            "merge the adapter into the source and quantize that, or quantize the source again"
        )
    given, fingerprint = Adapter.open(Path(adapter), opened.shape), basis.fingerprint()
    tensors: dict[str, torch.Tensor] = {}
    for module, (layer, linear, _) in given.linears.items():
        a, b = given.matrices(module)
        turned = turn(linear, a, b.double() * given.scale(module), basis.layer(layer), opened.shape)
        for part, tensor, stored in zip((A, B), turned, (a, b), strict=True):
            tensors[PREFIX + turned_name(module, fingerprint, part)] = tensor.to(stored.dtype).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": str(checkpoint),
        "target_modules": sorted({linear.rpartition(".")[2] for _, linear, _ in given.linears.values()}),
        "r": given.largest_rank,
        "lora_alpha": given.largest_rank,
        "bias": "none",
    }
    with atomic_folder(output) as partial:
        (partial / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))  # other users may read it
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return TurnedAdapter(
        output=str(output),
        fingerprint=fingerprint,
        linears=len(given.linears),
        rank=given.largest_rank,
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )
