"""Write and check the Sentence Transformers modules of a checkpoint: the source's, and the projection out of R1.

vLLM reads from `modules.json` how embeddings are pooled, and which Dense modules follow. The source's entries are
kept. A checkpoint in a rotated basis inserts its projection before their Dense ones (infoquant_vllm.format.projection).
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from infoquant_vllm.format import (
    MODULES_FILE,
    PROJECTION_CONFIG,
    PROJECTION_FOLDER,
    PROJECTION_TENSOR,
    PROJECTION_WEIGHTS,
    Checkpoint,
    QuantizationConfigData,
    files_of,
    projection_config,
    read_projection,
)
from offline.errors import CheckError, ToolError
from offline.model.copied_files import copy_module, module_files
from offline.model.source import Source

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
DENSE = "sentence_transformers.models.Dense"
FOLDER = re.compile(r"^[\w-][\w.-]*$")
ROWS = 4096  # embeddings compared
LARGEST_ERROR = 0.02  # relative; embeddings and a projection in bfloat16 give 0.003


def projection_bytes(source: Source, config: QuantizationConfigData) -> int:
    """Return the size of the projection, 0 for a checkpoint that needs none."""
    return source.shape.hidden_size**2 * source.unquantized_dtype.itemsize if config.rotated_hidden_states else 0


def source_modules(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of the source's `modules.json`, [] where the file is missing; ToolError for a bad one."""
    file = folder / MODULES_FILE
    if not file.is_file():
        return []
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ToolError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(modules, list) or not all(isinstance(entry, dict) for entry in modules):
        raise ToolError(f"{file}: a list of modules was expected, found {str(modules)[:100]}")
    for entry in modules:
        path = entry.get("path")
        if not isinstance(path, str) or path == PROJECTION_FOLDER or (path and not FOLDER.match(path)):
            raise ToolError(f"{file}: the path {path!r} of a module is not the name of a folder beside it")
        if path and not (folder / path).is_dir():
            raise ToolError(f"{folder / path}: no such folder, but {MODULES_FILE} names it")
        if path:
            module_files(folder, path)
    return modules


def write_modules(folder: Path, source: Source, residual: torch.Tensor | None) -> None:
    """Write the source's modules to the checkpoint's folder, and the projection where R1 (`residual`) is given."""
    modules = source_modules(source.folder)
    for entry in modules:
        if entry["path"]:
            copy_module(source.folder, folder, entry["path"])
    if residual is not None:
        modules = modules or [TRANSFORMER]
        kinds = [str(entry.get("type")).rpartition(".")[2] for entry in modules]
        first = next((index for index, kind in enumerate(kinds) if kind in ("Dense", "Normalize")), len(modules))
        modules.insert(first, {"name": PROJECTION_FOLDER, "path": PROJECTION_FOLDER, "type": DENSE})
        _write_projection(folder, source, residual)
    if modules:
        numbered = [entry | {"idx": index} for index, entry in enumerate(modules)]
        (folder / MODULES_FILE).write_text(json.dumps(numbered, indent=2) + "\n", encoding="utf-8")


def check_projection(checkpoint: Checkpoint, source: Source | None) -> str:
    """Check that the projection maps the checkpoint's embeddings to the source's times the final norm's gain.

    Raises FormatError or CheckError, naming the file or the error.
    """
    if not checkpoint.config.rotated_hidden_states:
        return "in the source's basis"
    found = read_projection(files_of(checkpoint.folder), checkpoint.shape.hidden_size, str(checkpoint.folder))
    if found is None:
        return "in a rotated basis without a projection, so embeddings cannot be served"
    weight, tied = found.double(), checkpoint.config.online_r1
    if tied:
        rotation = checkpoint.tensor("model.embed_tokens.r1").double()
        gain = checkpoint.tensor("model.embed_tokens.final_norm_weight").double()
        _compare(weight, gain[:, None] * rotation)
    if source is not None:
        theirs = source.tensor("model.embed_tokens.weight")[:ROWS].double()
        ours = theirs @ rotation if tied else checkpoint.tensor("model.embed_tokens.weight")[:ROWS].double()
        _compare(ours @ weight.T, theirs * source.tensor("model.norm.weight").double())
    return "a projection maps them to the source's basis"


def _compare(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= LARGEST_ERROR:
        raise CheckError(
            f"{PROJECTION_WEIGHTS}: does not map to the source's hidden states, relative error {error:.2g}, "
            f"at most {LARGEST_ERROR:g}"
        )


def _write_projection(folder: Path, source: Source, residual: torch.Tensor) -> None:
    gain = source.tensor("model.norm.weight").double()
    weight = (gain[:, None] * residual).to(source.unquantized_dtype)
    (folder / PROJECTION_FOLDER).mkdir()
    (folder / PROJECTION_CONFIG).write_text(json.dumps(projection_config(len(weight)), indent=2) + "\n")
    # not save_file, whose files no other user can read
    (folder / PROJECTION_WEIGHTS).write_bytes(save({PROJECTION_TENSOR: weight}, metadata={"format": "pt"}))
