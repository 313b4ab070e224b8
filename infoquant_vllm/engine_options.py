"""Refuse engine options that a checkpoint cannot serve, before the first layer is built.

With `rotated_hidden_states` the residual stream is in a basis of the checkpoint's own (R1). Tokens and
log-probabilities do not depend on it; embeddings and hidden states do. docs/hidden-states.md lists every option of
vLLM that reads or writes hidden states.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from infoquant_vllm.format import (
    BASIS_CONFIG,
    INDEX_FILE,
    FormatError,
    QuantizationConfigData,
    read_fingerprint,
    read_projection,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

TOKEN_DRAFTS = ("ngram", "ngram_gpu", "suffix", "draft_model", "custom_class")
"""Methods of speculative decoding whose drafts read tokens alone."""
INSTEAD = "serve the unquantized model for that"


def check_engine_options(data: QuantizationConfigData, config: "VllmConfig", no_weights: Path | None) -> None:
    """Raise FormatError for an option that the checkpoint cannot serve, naming it and what to do.

    no_weights: the checkpoint's folder if it has a config.json and no weights, which only dummy weights can serve.
    """
    if no_weights is not None and config.load_config.load_format != "dummy":
        raise FormatError(
            f"{no_weights}: holds no weights ({INDEX_FILE} is missing); copy the checkpoint "
            "again, or pass --load-format dummy to time its shape with random ones"
        )
    model = config.model_config
    if model is None:
        return
    _check_implementation(model)
    if model.runner_type == "pooling":
        _check_pooling(data, model)
    if data.rotated_hidden_states:
        _check_hidden_states(model, config)


def _check_implementation(model: "ModelConfig") -> None:
    scaling = getattr(model.hf_text_config, "logits_scaling", 1)
    if model.using_transformers_backend() and scaling != 1:
        raise FormatError(
            f"{model.model}: --model-impl transformers is not served, vLLM does not divide logits by logits_scaling "
            f"{scaling} there; leave the option out"
        )


def _check_hidden_states(model: "ModelConfig", config: "VllmConfig") -> None:
    if model.enable_prompt_embeds:
        raise FormatError(
            f"{model.model}: --enable-prompt-embeds is not served, the checkpoint's residual stream is in a rotated "
            f"basis and embeddings in the prompt are not; send tokens, or {INSTEAD}"
        )
    speculation = config.speculative_config
    if speculation is not None and speculation.method not in TOKEN_DRAFTS:
        raise FormatError(
            f"{model.model}: --speculative-config with method {speculation.method!r} is not served, it reads hidden "
            f"states, which are in a rotated basis; use a draft that reads tokens (draft_model, ngram, suffix), "
            f"or {INSTEAD}"
        )


def _check_pooling(data: QuantizationConfigData, model: "ModelConfig") -> None:
    asked = f"{model.model}: --runner pooling --convert {model.convert_type}"
    if model.convert_type == "embed":
        if data.rotated_hidden_states and not _has_projection(model):
            raise FormatError(
                f"{asked} is not served, the checkpoint's hidden states are in a rotated basis and modules.json lists "
                f"no module hidden_states that leads out of it; quantize the model again, or {INSTEAD}"
            )
        return
    if not (model.convert_type == "classify" and _scores_tokens(model)):
        raise FormatError(
            f"{asked} ({', '.join(model.architectures)}) is not served, the checkpoint holds no head for it "
            f"and hidden states may be in a rotated basis; {INSTEAD}"
        )
    if data.online_r1 or data.lm_head_bits is not None:
        kind = "rotated and tied to lm_head" if data.online_r1 else "of 8 bits"
        raise FormatError(
            f"{asked} with classifier_from_token is not served, vLLM takes rows out of a vocabulary matrix that is "
            f"{kind}; score by the tokens' log-probabilities (logprobs of max_tokens 1), or {INSTEAD}"
        )


def adapter_fingerprint(model: "ModelConfig") -> str:
    """Return the fingerprint of the basis that adapters of a checkpoint are in; FormatError where none are served."""
    asked = f"{model.model}: LoRA adapters are not served"
    merge = "merge the adapter into the source model and quantize that"
    found = read_fingerprint(lambda name: get_hf_file_bytes(name, model.model, model.revision), model.model)
    if found is None:
        raise FormatError(
            f"{asked}, the checkpoint has no {BASIS_CONFIG} to turn them by (mixtures of experts and checkpoints of "
            f"earlier releases have none); {merge}, or quantize the source again"
        )
    if model.using_transformers_backend():
        raise FormatError(f"{asked} by the Transformers backend; {merge}")
    if model.runner_type == "pooling":
        raise FormatError(f"{asked} with --runner pooling; {merge}")
    return found


def _has_projection(model: "ModelConfig") -> bool:
    def read(name: str) -> bytes | None:
        return get_hf_file_bytes(name, model.model, model.revision)

    return read_projection(read, model.get_hidden_size(), model.model) is not None


def _scores_tokens(model: "ModelConfig") -> bool:
    """Return whether vLLM makes the classifier from rows of lm_head, as for rerankers that are language models."""
    return any(
        getattr(config, "classifier_from_token", None) is not None for config in (model.hf_config, model.hf_text_config)
    )
