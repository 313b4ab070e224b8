"""What a folder is that is no model of transformers' own layout, and what to do about it."""

from collections.abc import Iterable
from pathlib import Path

ADAPTER = "adapter_config.json"
PREFIX = "model."


def other_kind(folder: Path) -> str | None:
    """A word on a folder that another tool wrote for another use, or None."""
    if (folder / ADAPTER).is_file():
        return "holds a PEFT adapter; merge it into its base model (`merge_and_unload` of peft) and quantize the result"
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not any(folder.glob("*.safetensors")):
        return f"holds the GGUF file {gguf[0].name}; give the folder of safetensors files that it was made from"
    return None


def missing_index(found: Iterable[str], index: str) -> str | None:
    """A word on shards that no index lists, by their names, or None."""
    shards = sorted(name for name in found if "-of-" in name)
    if not shards:
        return None
    return f"{index} is missing, which lists {shards[0]} ({len(shards)} such shards); download or copy it too"


def missing_prefix(wanted: str, names: Iterable[str]) -> str | None:
    """A word on tensors that lack the prefix of a model with a head, where that is why `wanted` is not among them."""
    if wanted.startswith(PREFIX) and wanted.removeprefix(PREFIX) in names:
        return (
            f"its tensors lack the prefix '{PREFIX}' ({wanted.removeprefix(PREFIX)}): they are those of a base model "
            "without a head; save it with `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`"
        )
    return None
