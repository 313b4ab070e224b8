"""InfoQuant for vLLM: 4-bit weights, activations and KV cache in stock vLLM."""


def register() -> None:
    """Register the plugin: the entry point of `vllm.general_plugins`, which may run twice in a vLLM process."""
    from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import infoquant_vllm.cpu_ops  # noqa: F401 (registers implementations before vLLM settles which it uses)
    from infoquant_vllm.config import InfoQuantConfig
    from infoquant_vllm.format import QUANT_METHOD

    register_backend(AttentionBackendEnum.CUSTOM, "infoquant_vllm.attention.InfoQuantAttentionBackend")
    try:
        registered = get_quantization_config(QUANT_METHOD)
    except ValueError:
        registered = None
    if registered is not InfoQuantConfig:
        register_quantization_config(QUANT_METHOD)(InfoQuantConfig)
