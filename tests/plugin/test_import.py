"""The plugin costs nothing until vLLM asks for it, and may be asked twice."""

import subprocess
import sys


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package_imports_neither_vllm_nor_triton() -> None:
    _python(
        "import sys, infoquant_vllm, infoquant_vllm.format; "
        "heavy = {'vllm', 'triton', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )


def test_registering_twice_leaves_one_quantization_method() -> None:
    _python(
        "from infoquant_vllm import register; register(); register(); "
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config as get; "
        "assert QUANTIZATION_METHODS.count('infoquant') == 1; "
        "assert get('infoquant').__module__ == 'infoquant_vllm.config'; "
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E; "
        "assert E.CUSTOM.get_class().__name__ == 'InfoQuantAttentionBackend'"
    )
