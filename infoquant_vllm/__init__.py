"""InfoQuant for vLLM: 4-bit weights, activations and KV cache in stock vLLM."""


def register() -> None:
    """Entry point of `vllm.general_plugins`; runs in every vLLM process and may run twice."""
