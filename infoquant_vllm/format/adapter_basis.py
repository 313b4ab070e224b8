"""Read what quantization folded into a model's linears, which LoRA adapters of its source have to follow.

An adapter adds B A to a weight W of the source. Folding replaced W by D W C, where D and C are products of diagonal and
orthogonal matrices, so a turned adapter is D B and A C. The folder `adapter_basis` holds these matrices, only where
something was folded; its config.json holds a fingerprint of all of them. A turned adapter has the fingerprint in the
names of its tensors: no other model loads it, and no other adapter is loaded in its place.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from infoquant_vllm.format.architectures import SITE_NORMS
from infoquant_vllm.format.checkpoint import Checkpoint
from infoquant_vllm.format.errors import FormatError
from infoquant_vllm.format.side_files import AGAIN, ReadFile, files_of, load_tensors, parse_json
from infoquant_vllm.format.tensors import ModelShape, TensorSpec

BASIS_FOLDER = "adapter_basis"
BASIS_CONFIG, BASIS_WEIGHTS = f"{BASIS_FOLDER}/config.json", f"{BASIS_FOLDER}/model.safetensors"
R1, R2, KEY_SCALE, DOWN_SCALE = "r1", "self_attn.r2", "self_attn.key_scale", "mlp.down_scale"
MAX_CONFIG_BYTES = 2**12
FINGERPRINT = re.compile(r"[0-9a-f]{16}")
TURNED = re.compile(rf"(?P<module>.+)\.infoquant_(?P<fingerprint>{FINGERPRINT.pattern})\.(?P<part>lora_[AB]\.weight)")


@dataclass(frozen=True)
class AdapterBasis:
    """What was folded into the weights, float32 by names; nothing where the basis is the source's.

    `r1` [H, H] is the basis of the residual stream; the others follow `model.layers.N.`:

    - input_layernorm.weight, post_attention_layernorm.weight [H]: gains, folded into the linears behind them
    - self_attn.r2 [KV heads, head size, head size]: basis of the values
    - self_attn.key_scale [KV heads, head size]: factors on rows of k_proj; rows of q_proj have the inverse
    - mlp.down_scale [I]: factors on rows of up_proj; columns of down_proj have the inverse
    """

    tensors: Mapping[str, torch.Tensor]

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a decoder layer by their names inside it, and R1."""
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}
        return own | ({R1: self.tensors[R1]} if R1 in self.tensors else {})

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that differ between bases."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(f"{name} {list(self.tensors[name].shape)}\n".encode())
            digest.update(self.tensors[name].contiguous().numpy().data)
        return digest.hexdigest()[:16]


def layer_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    """Return every tensor that a layer of a basis may have, by its name inside the layer."""
    heads, hidden = (shape.num_key_value_heads, shape.head_dim), shape.hidden_size
    sizes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (hidden,) for norm in SITE_NORMS.values()}
    sizes |= {R2: (*heads, shape.head_dim), KEY_SCALE: heads, DOWN_SCALE: (shape.intermediate_size,)}
    return {name: TensorSpec(shape=size, dtype="F32") for name, size in sizes.items()}


def turned_name(module: str, fingerprint: str, part: str) -> str:
    """Return the name of a turned adapter's tensor without its prefix `base_model.model.`; part: lora_A.weight, ..."""
    return f"{module}.infoquant_{fingerprint}.{part}"


def source_name(name: str, fingerprint: str) -> str:
    """Return the name that a turned adapter's tensor had before; FormatError for others than of that basis."""
    found = TURNED.fullmatch(name)
    if found is None:
        raise FormatError(
            f"LoRA adapter: {name} is in the basis of the source model, which this checkpoint has left; run "
            "`infoquant lora CHECKPOINT ADAPTER OUTPUT` and serve OUTPUT"
        )
    if found["fingerprint"] != fingerprint:
        raise FormatError(
            f"LoRA adapter: {name} was turned for the basis {found['fingerprint']}, this checkpoint has {fingerprint}; "
            "run `infoquant lora` on the adapter as it was trained, with this checkpoint"
        )
    return f"{found['module']}.{found['part']}"


def read_fingerprint(read: ReadFile, source: str) -> str | None:
    """Return the fingerprint in the checkpoint's `adapter_basis/config.json`, or None if it has none."""
    content = read(BASIS_CONFIG)
    if content is None:
        return None
    config = parse_json(content, f"{source}/{BASIS_CONFIG}", MAX_CONFIG_BYTES)
    found = config.get("fingerprint") if isinstance(config, dict) else None
    if not isinstance(found, str) or not FINGERPRINT.fullmatch(found):
        raise FormatError(f"{source}/{BASIS_CONFIG}: fingerprint is {found!r}, expected 16 hexadecimal digits; {AGAIN}")
    return found


def read_basis(checkpoint: Checkpoint) -> AdapterBasis | None:
    """Return the basis of a checkpoint, None for one without; FormatError for values that no tool wrote."""
    read, source = files_of(checkpoint.folder), str(checkpoint.folder)
    fingerprint = read_fingerprint(read, source)
    if fingerprint is None:
        return None
    file, tensors = f"{source}/{BASIS_WEIGHTS}", load_tensors(read, BASIS_WEIGHTS, source, f"{BASIS_CONFIG} is there")
    _check_tensors(tensors, checkpoint, file)
    if checkpoint.config.online_r1:
        tensors[R1] = checkpoint.tensor("model.embed_tokens.r1")
    basis = AdapterBasis(tensors)
    if basis.fingerprint() != fingerprint:
        raise FormatError(
            f"{file}: its fingerprint is {basis.fingerprint()}, {BASIS_CONFIG} says {fingerprint}; {AGAIN}"
        )
    return basis


def _check_tensors(tensors: dict[str, torch.Tensor], checkpoint: Checkpoint, file: str) -> None:
    shape, config = checkpoint.shape, checkpoint.config
    kinds = {name: spec for name, spec in layer_specs(shape).items() if f"model.layers.0.{name}" in tensors}
    layers = range(shape.num_hidden_layers)
    expected = {f"model.layers.{layer}.{name}": spec.shape for layer in layers for name, spec in kinds.items()}
    if config.rotated_hidden_states and not config.online_r1:
        expected[R1] = (shape.hidden_size, shape.hidden_size)
    for name in sorted(expected.keys() | tensors.keys()):
        found = tensors.get(name)
        if found is None or name not in expected:
            raise FormatError(f"{file}: {name} is {'missing' if found is None else 'not expected'}; {AGAIN}")
        if found.dtype != torch.float32 or tuple(found.shape) != expected[name]:
            raise FormatError(
                f"{file}: {name} is {found.dtype} {list(found.shape)}, expected float32 {list(expected[name])}"
            )
        if not torch.isfinite(found).all() or (name.endswith("_scale") and not (found > 0).all()):
            raise FormatError(f"{file}: {name} holds values that are not finite, or scales that are not above 0")
