"""Open the model to quantize, a local folder or a hub id, and check it before anything is computed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from infoquant_vllm.format import (
    ARCHITECTURES,
    FUSED,
    INDEX_FILE,
    Experts,
    FormatError,
    ModelShape,
    check_values,
    read_header,
    read_json,
    read_weight_map,
)
from offline.errors import ToolError, first_line
from offline.model.architectures import CausalLM, empty_model, read_config
from offline.model.copied_files import HUB_FILES
from offline.model.folders import missing_index, missing_prefix, other_kind

SINGLE_FILE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS_AT_A_TIME = 8192
"""Rows of embedding and lm_head that are compared at once; bounds peak memory."""
UNUSED = re.compile(r"^model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""RoPE tables in old checkpoints, which transformers and vLLM compute themselves; every other tensor is used."""
LAYER = re.compile(r"^model\.layers\.(\d+)\.")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
SECOND_COPY = "consolidated*.safetensors"
"""A second copy of the weights, under the authors' own names, that Mistral's folders hold beside the shards."""

Headers = dict[str, tuple[Path, tuple[int, ...], str]]
"""File, shape and dtype of tensors by their names."""


@dataclass(frozen=True)
class Source:
    """An unquantized model of a known class whose headers agree with its config.

    `weight_map` gives the shard of every tensor that the architecture needs, and of no others; linears that the
    files fuse are apart here. Where config.json
    says that embedding and head are tied but the files hold a head of other values, `hf_config` and `shape`
    say untied: transformers and vLLM use the head of the files, and so does this tool.
    """

    folder: Path
    hf_config: dict[str, Any]
    shape: ModelShape
    weight_map: dict[str, str]

    @classmethod
    def open(cls, path_or_hub_id: str | Path, headers_only: bool = False) -> "Source":
        """Check config, tokenizer, index and shard headers; raises ToolError for the first thing wrong.

        With `headers_only` a folder that holds a config.json, and neither weights nor a tokenizer, will do:
        `weight_map` is empty then and no tensor can be read.
        """
        folder = _local_folder(path_or_hub_id)
        another = other_kind(folder)
        if another is not None:
            raise ToolError(f"{folder}: {another}")
        try:
            hf_config = read_json(folder / "config.json")
            _refuse_quantized(hf_config, folder / "config.json")
            shape = ModelShape.from_hf(hf_config, str(folder / "config.json"))
        except FormatError as error:
            raise ToolError(str(error)) from None
        read_config(shape, hf_config, folder / "config.json")
        if headers_only and not any(folder.glob("*.safetensors")) and not (folder / INDEX_FILE).is_file():
            return cls(folder, hf_config, shape, {})
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ToolError(f"{folder}: no tokenizer ({' or '.join(TOKENIZER_FILES)} was expected)")
        try:
            headers = _headers(folder)
            if shape.tie_word_embeddings and not _is_tied(headers):
                hf_config = hf_config | {"tie_word_embeddings": False}
                shape = ModelShape.from_hf(hf_config, f"{folder}: its lm_head.weight is another than the embedding")
        except FormatError as error:
            raise ToolError(str(error)) from None
        return cls(folder, hf_config, shape, _weight_map(folder, headers, shape))

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors, sorted; a tied model has no `lm_head.weight`."""
        return sorted(self.weight_map)

    def layer_names(self, layer: int, part: str = "") -> list[str]:
        """Return the names inside a decoder layer of the tensors of one of its parts.

        The part of no name is the layer without the experts that a router chooses.
        """
        return self._parts[layer].get(part, [])

    @cached_property
    def _parts(self) -> list[dict[str, list[str]]]:
        experts = self.shape.experts
        found: list[dict[str, list[str]]] = [{} for _ in range(self.shape.num_hidden_layers)]
        for name in self.names:
            layer = LAYER.match(name)
            if layer is None:
                continue
            inside = name[layer.end() :]
            block = "" if experts is None else experts.expert(0).removesuffix("0")
            part = ".".join(inside.split(".")[: block.count(".") + 1]) if block and inside.startswith(block) else ""
            found[int(layer[1])].setdefault(part, []).append(inside)
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored dtype; raises ToolError where it holds NaN or Inf."""
        file, (stored, index) = self.folder / self.weight_map[name], stored_part(self.shape, name)
        with safe_open(file, framework="pt") as shard:
            tensor = shard.get_slice(stored)[index] if index else shard.get_tensor(stored)
        try:
            check_values(tensor, name, str(file), norm_offset=self.shape.norm_offset)
        except FormatError as error:
            raise ToolError(str(error)) from None
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor, from its file's header; from the config where there is no file."""
        if not self.weight_map:
            return config_dtype(self.hf_config)
        with safe_open(self.folder / self.weight_map[name], framework="pt") as shard:
            return DTYPES[shard.get_slice(stored_part(self.shape, name)[0]).get_dtype()]

    @property
    def unquantized_dtype(self) -> torch.dtype:
        """Return the stored dtype of the norms, which the checkpoint keeps for every tensor that is not quantized."""
        return self.dtype("model.norm.weight")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer, from the model's own files only."""
        return read_tokenizer(self.folder)

    def model(self, dtype: torch.dtype) -> CausalLM:
        """Load the model in eval mode, with every weight read through `tensor` and none left as initialized."""
        config = read_config(self.shape, self.hf_config, self.folder / "config.json")
        state = {name: self.tensor(name).to(dtype) for name in self.names}
        model = empty_model(self.shape, config)
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        model.config.dtype = dtype
        return model.eval().requires_grad_(False)


def config_dtype(hf_config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that config.json names, in which the server computes unless told otherwise."""
    named = hf_config.get("dtype") or hf_config.get("torch_dtype")
    return {"float32": torch.float32, "float16": torch.float16}.get(str(named), torch.bfloat16)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from `folder`; raises ToolError where its files cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions for broken files
        raise ToolError(f"{folder}: the tokenizer cannot be read ({error})") from None


def _local_folder(path_or_hub_id: str | Path) -> Path:
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ToolError(f"{folder}: a model folder was expected, this is a file")
    if isinstance(path_or_hub_id, Path) or not HUB_ID.match(path_or_hub_id):
        raise ToolError(f"{folder}: no such folder, and not a hub id like organization/model")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path_or_hub_id, allow_patterns=["*.safetensors", *HUB_FILES], ignore_patterns=[SECOND_COPY]
            )
        )
    except Exception as error:  # network, authorization and missing repositories, each with a class of its own
        reason = first_line(error)
        raise ToolError(f"{path_or_hub_id}: no such folder, and the hub did not give it ({reason})") from None


def _refuse_quantized(hf_config: dict[str, Any], file: Path) -> None:
    found = hf_config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ToolError(
            f"{file}: the model is already quantized (quant_method {method!r}); give the unquantized original"
        )


def stored_part(shape: ModelShape, name: str) -> tuple[str, tuple[int | slice, ...]]:
    """Return the tensor of the files that holds tensor `name`, and the index of its part where files fuse linears."""
    if shape.experts is not None:
        return _stored_in_mixture(shape, shape.experts, name)
    if not ARCHITECTURES[shape.architecture].fused:
        return name, ()
    module, _, kind = name.rpartition(".")
    for fused, linears in FUSED.items():
        linear = next((linear for linear in linears if module.endswith(f".{linear}")), None)
        if linear is not None:
            layer, sizes = module.removesuffix(linear), shape.linears()
            start = sum(sizes[layer + before][0] for before in linears[: linears.index(linear)])
            return f"{layer}{fused}.{kind}", (slice(start, start + sizes[module][0]),)
    return name, ()


def _stored_in_mixture(shape: ModelShape, names: Experts, name: str) -> tuple[str, tuple[int | slice, ...]]:
    """Do the same for a mixture of experts, whose files may fuse the experts of a layer."""
    router = re.match(rf"(.*\.{names.block}\.)gate(\.weight)$", name)
    if router is not None:
        return f"{router[1]}{names.router}{router[2]}", ()
    expert = re.match(rf"(.*\.{names.block}\.)experts\.(\d+)\.(\w+)\.weight$", name)
    if names.fused is None or expert is None:
        return name, ()
    block, index, linear = expert[1], int(expert[2]), expert[3]
    gate_up, down = names.fused
    if linear == names.down:
        return block + down, (index,)
    start = 0 if linear == names.gate else shape.expert_size
    return block + gate_up, (index, slice(start, start + shape.expert_size))


def _stored(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that the files of an unquantized model of that shape hold."""
    stored: dict[str, tuple[int, ...]] = {}
    for name, size in _expected(shape).items():
        found, index = stored_part(shape, name)
        ends = tuple(part.stop if isinstance(part, slice) else part + 1 for part in index)
        kept = sum(isinstance(part, slice) for part in index)
        stored[found] = (*ends, *size[kept:])  # the last part comes last
    return stored


def _expected(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of an unquantized model of that shape."""
    hidden = shape.hidden_size
    tensors: dict[str, tuple[int, ...]] = {f"{norm}.weight": (size,) for norm, size in shape.norms().items()}
    tensors[EMBEDDING] = (shape.vocab_size, hidden)
    if not shape.tie_word_embeddings:
        tensors[HEAD] = (shape.vocab_size, hidden)
    for module, size in shape.linears().items():
        tensors[f"{module}.weight"] = size
        if shape.has_bias(module):
            tensors[f"{module}.bias"] = size[:1]
    for layer in range(shape.num_hidden_layers):
        tensors |= {f"model.layers.{layer}.{gate}.weight": size for gate, size in shape.gates.items()}
    return tensors


def _is_tied(headers: Headers) -> bool:
    """Return whether embedding and head are one matrix: the files hold no head, or one of equal values.

    Compared exactly: where a cast to the model's dtype makes them equal, an untied model is the same function.
    """
    if HEAD not in headers or EMBEDDING not in headers:
        return True
    (file, size, dtype), (head_file, head_size, head_dtype) = headers[EMBEDDING], headers[HEAD]
    if size != head_size or not {dtype, head_dtype} <= set(DTYPES):
        return False
    with safe_open(file, framework="pt") as first, safe_open(head_file, framework="pt") as second:
        embedding, head = first.get_slice(EMBEDDING), second.get_slice(HEAD)
        starts = range(0, size[0], ROWS_AT_A_TIME)
        parts = (slice(start, start + ROWS_AT_A_TIME) for start in starts)
        return all(torch.equal(embedding[part].float(), head[part].float()) for part in parts)


def _weight_map(folder: Path, headers: Headers, shape: ModelShape) -> dict[str, str]:
    expected = _stored(shape)
    for name, size in expected.items():
        if name not in headers:
            missing = (
                missing_prefix(name, headers) or f"tensor {name} {list(size)} is missing from its safetensors files"
            )
            raise ToolError(f"{folder}: {missing}")
        file, found, dtype = headers[name]
        if found != size:
            raise ToolError(f"{file}: {name} has shape {list(found)}, config.json asks for {list(size)}")
        if dtype not in DTYPES:
            raise ToolError(f"{file}: {name} is {dtype}, expected {', '.join(DTYPES)}")
    unused = {HEAD} if shape.tie_word_embeddings else set()
    extra = sorted(name for name in headers if name not in expected.keys() | unused and not UNUSED.match(name))
    if extra:
        raise ToolError(f"{headers[extra[0]][0]}: unexpected tensor {extra[0]} ({len(extra)} such tensors)")
    return {name: headers[stored_part(shape, name)[0]][0].name for name in _expected(shape)}


def _headers(folder: Path) -> Headers:
    """Read file, shape and dtype of every tensor; the index, if there is one, must agree."""
    shards, indexed = _shards(folder)
    headers: Headers = {}
    for shard in shards:
        for name, spec in read_header(shard).items():
            if name in headers:
                raise ToolError(f"{shard}: holds {name}, which {headers[name][0].name} holds too")
            if indexed is not None and indexed.get(name) != shard.name:
                place = indexed.get(name, "nowhere")
                raise ToolError(f"{shard}: holds {name}, which {INDEX_FILE} places {place!r}")
            headers[name] = (shard, spec.shape, str(spec.dtype))
    for name, place in (indexed or {}).items():
        if name not in headers:
            raise ToolError(f"{folder / place}: {INDEX_FILE} places {name} there, but the file does not hold it")
    return headers


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    second_copies = set(folder.glob(SECOND_COPY))
    found = {file.name for file in folder.glob("*.safetensors") if file not in second_copies}
    indexed: dict[str, str] | None = None
    if (folder / INDEX_FILE).is_file():
        indexed = read_weight_map(folder)
        listed = set(indexed.values())
    elif found:
        listed, missing = {SINGLE_FILE}, missing_index(found, INDEX_FILE)
        if missing is not None and SINGLE_FILE not in found:
            raise ToolError(f"{folder}: {missing}")
    else:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        held = f"it holds {pickles[0]}, and pickles are not read; convert the model" if pickles else "convert the model"
        raise ToolError(f"{folder}: no safetensors files ({held} with `save_pretrained` of transformers)")
    for name in sorted(listed - found):
        raise ToolError(f"{folder / name}: the shard is missing ({len(listed - found)} of {len(listed)} are)")
    for name in sorted(found - listed):
        raise ToolError(f"{folder / name}: an extra safetensors file that the model does not list; move it away")
    return [folder / name for name in sorted(listed)], indexed
