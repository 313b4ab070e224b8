"""Recognize folders that do not have the layout of a transformers model, and say what to do about them."""

from collections.abc import Iterable
from pathlib import Path

ADAPTER = "adapter_config.json"
PREFIX = "model."


def other_kind(folder: Path) -> str | None:
    """Return the message for a folder that another tool wrote for another use, or None."""
    if (folder / ADAPTER).is_file():
        return "holds a PEFT adapter; merge it into its base model (`merge_and_unload` of peft) and quantize the result"
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not any(folder.glob("*.safetensors")):
        return f"holds the GGUF file {gguf[0].name}; give the folder of safetensors files that it was made from"
    return None


def missing_index(found: Iterable[str], index: str) -> str | None:
    """Return the message for shards that no index lists, by their names, or None."""
    shards = sorted(name for name in found if "-of-" in name)
    if not shards:
        return None
    return f"{index} is missing, which lists {shards[0]} ({len(shards)} such shards); download or copy it too"


def missing_prefix(expected: str, names: Iterable[str]) -> str | None:
    """Return the message for tensors that lack the prefix of a model with a head, `expected` among them, or None."""
    if expected.startswith(PREFIX) and expected.removeprefix(PREFIX) in names:
        return (
            f"its tensors lack the prefix '{PREFIX}' ({expected.removeprefix(PREFIX)}): they are those of a base model "
            "without a head; save it with `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`"
        )
    return None
