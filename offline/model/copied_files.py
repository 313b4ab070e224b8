"""Copy the files of a source that a checkpoint keeps as they are: tokenizer, templates, license and the like.

A downloaded folder is hostile input: names decide what is copied, never contents, and no code or pickle is copied.
"""

import shutil
from fnmatch import fnmatch
from pathlib import Path

from offline.errors import ToolError

FOLDERS = (".", "additional_chat_templates")
"""Other folders hold copies of the model in other formats, or the state of its training."""
SUFFIXES = ("", ".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".pdf")
TOKENIZER = ("tokenizer*", "tekken.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
TEXTS = ("*.jinja", "chat_template.json", "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
CODE_AND_WEIGHTS = ("*.py", "*.so", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.safetensors", "*.gguf", "*.npz")
"""Never copied, whatever other pattern matches."""
WRITTEN = ("config.json", "README.md", "infoquant_*", "*.index.json")
"""Files that this tool writes about the checkpoint."""
OTHER_LOADERS = ("params.json", "*quant*config*.json", "adapter_*")
"""Files that describe the source to loaders of other formats."""
MODULE_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
"""Copied from a folder that `modules.json` names: configs, weights and tokenizers."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
LARGEST_TOTAL = 2**30
HUB_FILES = ("*.json", "*.model", "*.tiktoken", *TOKENIZER, *TEXTS)
"""Patterns to download from the hub beside weights."""


def copied_files(source: Path) -> list[Path]:
    """Return the files to copy, relative to `source`, sorted.

    Links inside the folder or the hub's cache are followed. So is a link to elsewhere whose target is a well-known
    file of the same name: a folder of links to a model is a source too. Raises ToolError for other links, and for
    more than LARGEST_TOTAL bytes.
    """
    found = [file for folder in FOLDERS for file in (source / folder).glob("*") if _is_kept(file)]
    for file in found:
        _check_link(file, source)
    total = sum(file.stat().st_size for file in found)
    if total > LARGEST_TOTAL:
        largest = max(found, key=lambda file: file.stat().st_size)
        raise ToolError(
            f"{source}: {total} bytes in files beside the weights, {largest.name} the largest, at most {LARGEST_TOTAL} "
            "are copied into a checkpoint; move files that do not belong to the model elsewhere"
        )
    return sorted(file.relative_to(source) for file in found)


def copy_files(source: Path, folder: Path) -> None:
    """Copy the `copied_files` of a source into a checkpoint's folder."""
    for name in copied_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def module_files(source: Path, name: str) -> list[Path]:
    """Return the files to copy from a module's folder `name`, relative to `source`, sorted.

    Raises ToolError for pickled weights, which would be lost, and for links that lead outside.
    """
    files = [file for file in (source / name).iterdir() if file.is_file()]
    kept = [file for file in files if file.suffix.lower() in MODULE_SUFFIXES]
    pickled = sorted(file for file in files if file.suffix.lower() in PICKLES)
    if pickled and not any(file.suffix.lower() == ".safetensors" for file in kept):
        raise ToolError(
            f"{pickled[0]}: weights of a module are read from safetensors files only; save {name} as "
            "model.safetensors, or remove its entry from modules.json"
        )
    for file in kept:
        _check_link(file, source)
    return sorted(file.relative_to(source) for file in kept)


def copy_module(source: Path, folder: Path, name: str) -> None:
    """Copy the `module_files` of a source into a checkpoint's folder."""
    (folder / name).mkdir()
    for file in module_files(source, name):
        shutil.copyfile(source / file, folder / file)


def _is_kept(file: Path) -> bool:
    name = file.name
    if not file.is_file() or name.startswith(".") or _matches(name, CODE_AND_WEIGHTS + WRITTEN + OTHER_LOADERS):
        return False
    return file.suffix.lower() in SUFFIXES or _matches(name, TOKENIZER + TEXTS)


def _check_link(file: Path, source: Path) -> None:
    target, root = file.resolve(), source.resolve()
    inside = target.is_relative_to(root)
    cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    known = target.name == file.name and _matches(file.name, TOKENIZER + TEXTS)
    if not (inside or cached or known):
        raise ToolError(
            f"{file}: a link to {target}, outside the folder; this file would be copied into the checkpoint: "
            "replace the link by the file, or remove it"
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)
