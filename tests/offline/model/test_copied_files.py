"""A checkpoint copies its source's files that are neither weights nor code, and none from outside the source."""

from pathlib import Path

import pytest

import offline
from offline.errors import ToolError
from offline.model.copied_files import HUB_FILES, copied_files
from offline.progress import silent
from tests.common.tiny import write_source

KEPT = (
    *("LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE", "tekken.json", "tokenizer.model.v3", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates/tools.jinja", "generation_config.json", "qwen.tiktoken"),
)
LEFT = (
    *("pytorch_model.bin", "consolidated.00.pth", "model.gguf", "optimizer.pt", "training.pkl", "tokenizer.py"),
    *("modeling.py", "pytorch_model.bin.index.json", "params.json", "hf_quant_config.json", "quantize_config.json"),
    *("adapter_notes.json", ".gitattributes", "original/params.json", "onnx/config.json", "infoquant_report.json"),
    *("additional_chat_templates/run.py", "picture.png"),
)


def fill(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{{}} {name}")
    return folder


def test_checkpoint_keeps_what_is_neither_weights_nor_code(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    own = {str(name) for name in copied_files(source)}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= own
    fill(source, tuple(name for name in (*KEPT, *LEFT) if name not in own))
    offline.quantize(source, tmp_path / "out", preset="rtn", progress=silent)
    found = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    written = {"README.md", "config.json", "infoquant_recipe.yaml", "infoquant_report.json"}
    weights = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    weights |= {"adapter_basis/config.json", "adapter_basis/model.safetensors"}
    assert found == own | set(KEPT) | written | weights
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text().endswith("tools.jinja")


def test_copied_files_are_downloaded_from_the_hub() -> None:
    assert [name for name in KEPT if not any(Path(name).match(pattern) for pattern in HUB_FILES)] == []


@pytest.mark.parametrize("name", ["LICENSE", "token", "tokenizer_extra.txt", "additional_chat_templates/a.jinja"])
def test_link_out_of_the_folder_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ToolError, match=rf"source/{name}: a link to .*secret, outside the folder"):
        offline.quantize(source, tmp_path / "out", preset="rtn", progress=silent)
    assert not (tmp_path / "out").exists()


def test_unknown_file_is_not_followed_even_by_its_own_name(tmp_path: Path) -> None:
    fill(tmp_path / "home", ("token",))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "token").symlink_to(tmp_path / "home" / "token")
    with pytest.raises(ToolError, match="outside the folder"):
        copied_files(tmp_path / "source")


def test_folder_of_links_and_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    original = fill(tmp_path / "original", ("tokenizer.json", "LICENSE"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in original.iterdir():
        (linked / file.name).symlink_to(file)
    assert copied_files(linked) == [Path("LICENSE"), Path("tokenizer.json")]
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    fill(tmp_path / "models--a--b" / "blobs", ("4567",))
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/4567")
    assert copied_files(snapshot) == [Path("tokenizer.json")]


def test_more_bytes_than_a_model_needs_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "notes.txt").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(ToolError, match=r"1073741825 bytes in files beside the weights, notes\.txt the largest"):
        copied_files(tmp_path)
