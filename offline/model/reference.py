"""Load the source as transformers does, for comparisons, without this tool's own rules about names and ties."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from infoquant_vllm.format import read_json
from offline.errors import ToolError
from offline.model.architectures import CausalLM
from offline.model.source import config_dtype
from offline.model.windowed_attention import attention_of


def load_reference(folder: Path, dtype: torch.dtype | None = None) -> CausalLM:
    """Load the unquantized model in eval mode, in `dtype`, or None: in that of config.json.

    Raises ToolError where transformers does not find all of it.
    """
    if dtype is None:
        dtype = config_dtype(read_json(folder / "config.json"))
    disable_progress_bar()
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError and its own
        raise ToolError(f"{folder}: transformers does not load it ({error})") from None
    model, loaded = found
    model.set_attn_implementation(attention_of(model.config))
    absent = sorted({*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])})
    if absent:
        raise ToolError(f"{folder}: transformers finds no {absent[0]} of the right shape ({len(absent)} such tensors)")
    reference: CausalLM = model.eval().requires_grad_(False)
    return reference
