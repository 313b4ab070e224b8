"""A checkpoint has its source's Sentence Transformers modules, with the projection among them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infoquant_vllm.format import (
    FORMAT_VERSION,
    MODULES_FILE,
    PROJECTION_FOLDER,
    PROJECTION_TENSOR,
    PROJECTION_WEIGHTS,
    Checkpoint,
    FormatError,
    QuantizationConfigData,
    files_of,
    read_projection,
)
from offline import PRESETS, Recipe, ToolError, quantize
from offline.evaluate.verify import verify
from offline.model.source import Source
from offline.progress import silent
from tests.common.tiny import SIZES, write_source

ROTATED = Recipe(name="hadamard-rtn", transform="hadamard", rounding="rtn")


def module(kind: str, path: str) -> dict[str, Any]:
    return {"idx": 0, "name": path, "path": path, "type": f"sentence_transformers.models.{kind}"}


def with_modules(source: Path, *modules: dict[str, Any]) -> Path:
    (source / MODULES_FILE).write_text(json.dumps(modules))
    for entry in modules:
        if entry["path"] and ".." not in entry["path"]:
            (source / entry["path"]).mkdir(exist_ok=True)
            (source / entry["path"] / "config.json").write_text(json.dumps(entry))
    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["tied", "untied"])
def test_the_projection_maps_rotated_embeddings_to_the_sources_times_the_gain(
    tmp_path: Path, size: str, dtype: torch.dtype
) -> None:
    source = Source.open(write_source(tmp_path / "source", dtype=dtype, **SIZES[size]))
    quantize(source.folder, tmp_path / "out", recipe=ROTATED, progress=silent)
    checkpoint = Checkpoint(tmp_path / "out")
    weight = read_projection(files_of(tmp_path / "out"), 256, "out")
    assert weight is not None
    assert weight.dtype == dtype
    embeddings = checkpoint.tensor("model.embed_tokens.weight").double()
    if size == "tied":
        embeddings = embeddings @ checkpoint.tensor("model.embed_tokens.r1").double()
    expected = source.tensor("model.embed_tokens.weight").double() * source.tensor("model.norm.weight").double()
    error = (embeddings @ weight.double().T - expected).norm() / expected.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 5e-3)


def test_a_checkpoint_in_the_sources_basis_says_so_and_has_no_projection(tmp_path: Path) -> None:
    quantize(write_source(tmp_path / "source"), tmp_path / "out", recipe=PRESETS["rtn"], progress=silent)
    assert not Checkpoint(tmp_path / "out").config.rotated_hidden_states
    assert not (tmp_path / "out" / MODULES_FILE).exists()


def test_the_sources_modules_are_kept_with_the_projection_before_their_dense_ones(tmp_path: Path) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    source = with_modules(write_source(tmp_path / "source"), *(module(kind, path) for path, kind in kinds.items()))
    quantize(source, tmp_path / "out", recipe=ROTATED, progress=silent)
    written = json.loads((tmp_path / "out" / MODULES_FILE).read_text())
    assert [entry["path"] for entry in written] == ["", "1_Pooling", PROJECTION_FOLDER, "2_Dense", "3_Normalize"]
    assert [entry["idx"] for entry in written] == list(range(5))
    for folder in ("1_Pooling", "2_Dense", "3_Normalize"):
        assert (tmp_path / "out" / folder / "config.json").read_text() == (source / folder / "config.json").read_text()


def test_code_and_pickles_of_a_module_are_not_copied(tmp_path: Path) -> None:
    source = with_modules(write_source(tmp_path / "source"), module("Transformer", ""), module("Dense", "2_Dense"))
    for name in ("modeling.py", "pytorch_model.bin", ".hidden.json.py"):
        (source / "2_Dense" / name).write_text("import os")
    save_file({"linear.weight": torch.zeros(2, 2)}, source / "2_Dense" / "model.safetensors")
    quantize(source, tmp_path / "out", recipe=ROTATED, progress=silent)
    assert {file.name for file in (tmp_path / "out" / "2_Dense").iterdir()} == {"config.json", "model.safetensors"}


def test_a_module_with_pickled_weights_alone_is_refused_before_any_work(tmp_path: Path) -> None:
    source = with_modules(write_source(tmp_path / "source"), module("Transformer", ""), module("Dense", "2_Dense"))
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ToolError, match=r"pytorch_model\.bin: weights of a module are read from safetensors"):
        quantize(source, tmp_path / "out", recipe=ROTATED, progress=silent)
    assert not (tmp_path / "out").exists()


def test_link_out_of_a_module_is_refused(tmp_path: Path) -> None:
    source = with_modules(write_source(tmp_path / "source"), module("Transformer", ""), module("Dense", "2_Dense"))
    (tmp_path / "secret").write_text("{}")
    (source / "2_Dense" / "more.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ToolError, match=r"more\.json: a link to .*secret, outside the folder"):
        quantize(source, tmp_path / "out", recipe=ROTATED, progress=silent)


@pytest.mark.parametrize("path", ["../elsewhere", "a/b", PROJECTION_FOLDER, ".hidden"])
def test_module_without_a_folder_is_refused_before_any_work(tmp_path: Path, path: str) -> None:
    source = write_source(tmp_path / "source")
    (source / MODULES_FILE).write_text(json.dumps([module("Pooling", path)]))
    with pytest.raises(ToolError, match=rf"{MODULES_FILE}: the path '{path}' of a module is not the name of a folder"):
        quantize(source, tmp_path / "out", recipe=ROTATED, progress=silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("against", [False, True])
def test_another_rotation_as_the_projection_fails_verification(tmp_path: Path, against: bool) -> None:
    size = "untied" if against else "tied"
    source = write_source(tmp_path / "source", **SIZES[size])
    quantize(source, tmp_path / "out", recipe=ROTATED, progress=silent)
    assert verify(tmp_path / "out").passed
    file = tmp_path / "out" / PROJECTION_WEIGHTS
    save_file({PROJECTION_TENSOR: load_file(file)[PROJECTION_TENSOR].flip(1).contiguous()}, file)
    found = verify(tmp_path / "out", against=source if against else None)
    failed = [check for check in found.checks if not check.passed]
    assert [check.name for check in failed] == ["hidden states"]
    assert f"{PROJECTION_WEIGHTS}: does not map to the source's hidden states" in failed[0].detail


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (MODULES_FILE, "[", "not readable as JSON"),
        (MODULES_FILE, " " * 2**17, "131072 bytes, expected at most 65536"),
        (MODULES_FILE, json.dumps([module("Dense", "x"), module("Dense", PROJECTION_FOLDER)]), "first Dense module"),
        (f"{PROJECTION_FOLDER}/config.json", '{"bias": true}', r"found \{'bias': True\}, expected"),
        (PROJECTION_WEIGHTS, "no tensors", "not a whole safetensors file"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    quantize(write_source(tmp_path / "source"), tmp_path / "out", recipe=ROTATED, progress=silent)
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(FormatError, match=f"^out/{name}.*{message}"):
        read_projection(files_of(tmp_path / "out"), 256, "out")


def test_a_config_that_contradicts_itself_is_refused() -> None:
    fields: dict[str, Any] = {"quant_method": "infoquant", "format_version": FORMAT_VERSION, "config_groups": {}}
    with pytest.raises(ValueError, match="online_r1 is true but rotated_hidden_states is false"):
        QuantizationConfigData(**fields, online_r1=True, rotated_hidden_states=False)
