"""Read the matrix that maps final hidden states back to the basis of the source, to serve embeddings.

With R1 = Q and the gain g of the final norm it is W = diag(g) Q, [hidden, hidden], and h @ W.T = (h @ Q.T) * g is
the output of the source's final norm. It is stored as a Dense module of Sentence
Transformers, which vLLM applies to what it pools: `modules.json` lists the module before all other Dense modules, and
the folder `hidden_states` holds its config.json and its model.safetensors.
"""

from typing import Any

import torch

from infoquant_vllm.format.errors import FormatError
from infoquant_vllm.format.side_files import ReadFile, load_tensors, parse_json

MODULES_FILE = "modules.json"
PROJECTION_FOLDER = "hidden_states"
PROJECTION_CONFIG, PROJECTION_WEIGHTS = f"{PROJECTION_FOLDER}/config.json", f"{PROJECTION_FOLDER}/model.safetensors"
PROJECTION_TENSOR = "linear.weight"
MAX_HEADER_BYTES = 2**16
MAX_ERROR = 0.05  # relative error of vectors rotated forth and back; bfloat16 alone causes 0.005
PROBES = 8


def projection_config(hidden_size: int) -> dict[str, Any]:
    """Return config.json of the Dense module."""
    identity = "torch.nn.modules.linear.Identity"
    return {"in_features": hidden_size, "out_features": hidden_size, "bias": False, "activation_function": identity}


def read_projection(read: ReadFile, hidden_size: int, source: str) -> torch.Tensor | None:
    """Return W [hidden_size, hidden_size] as stored, or None if `modules.json` lists no such module.

    Raises FormatError, naming the file of `source`, for a matrix that is not a rotation with a gain per row.
    """
    listed = read(MODULES_FILE)
    if listed is None:
        return None
    modules = parse_json(listed, f"{source}/{MODULES_FILE}", MAX_HEADER_BYTES)
    entries = [entry for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    dense = [entry.get("path") for entry in entries if str(entry.get("type")).endswith(".Dense")]
    if PROJECTION_FOLDER not in dense:
        return None
    if dense[0] != PROJECTION_FOLDER:
        raise FormatError(f"{source}/{MODULES_FILE}: the first Dense module is {dense[0]!r}, not {PROJECTION_FOLDER!r}")
    content, expected = read(PROJECTION_CONFIG), projection_config(hidden_size)
    config = None if content is None else parse_json(content, f"{source}/{PROJECTION_CONFIG}", MAX_HEADER_BYTES)
    if config != expected:
        raise FormatError(f"{source}/{PROJECTION_CONFIG}: found {config}, expected {expected}")
    weight = _read_tensor(read, hidden_size, source)
    _check_rotation(weight, f"{source}/{PROJECTION_WEIGHTS}: {PROJECTION_TENSOR}")
    return weight


def _read_tensor(read: ReadFile, hidden_size: int, source: str) -> torch.Tensor:
    tensors = load_tensors(read, PROJECTION_WEIGHTS, source, f"{MODULES_FILE} names it")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected = {PROJECTION_TENSOR: [hidden_size, hidden_size]}
    if shapes != expected:
        raise FormatError(f"{source}/{PROJECTION_WEIGHTS}: holds {shapes}, expected {expected}")
    return tensors[PROJECTION_TENSOR]


def _check_rotation(weight: torch.Tensor, name: str) -> None:
    if not weight.is_floating_point() or not torch.isfinite(weight).all() or not weight.any():
        raise FormatError(f"{name} holds values that are not finite, or only zeros")
    gains = weight.float().norm(dim=1, keepdim=True)
    rotation = weight.float() / gains.clamp(min=torch.finfo(torch.float32).tiny)
    probes = torch.empty(len(weight), PROBES, dtype=torch.float32, device="cpu")  # inside vLLM's other defaults
    probes.normal_(generator=torch.Generator("cpu").manual_seed(0)).mul_(gains > 0)
    error = ((rotation @ (rotation.T @ probes) - probes).norm() / probes.norm()).item()
    if not error <= MAX_ERROR:
        raise FormatError(
            f"{name} is no rotation with a gain per row: vectors rotated forth and back are off by {error:.3g}, "
            f"expected at most {MAX_ERROR:g}; quantize the model again"
        )
