"""The plugin costs nothing until vLLM asks for it, and may be asked twice."""

import json
import subprocess
import sys
from typing import Any

import pytest

REGISTER_TWICE = """
import json, sys
from infoquant_vllm import register
register()
register()
import infoquant_vllm.linear
from infoquant_vllm.kernels.dispatch import backend
backend("cpu")
kernels = [name for name in sys.modules if name.startswith("infoquant_vllm.kernels.triton")]
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print(json.dumps({
    "kernels of Triton": kernels,
    "methods": QUANTIZATION_METHODS.count("infoquant"),
    "config": get_quantization_config("infoquant").__module__,
    "attention": AttentionBackendEnum.CUSTOM.get_class().__name__,
}))
"""


def _python(code: str) -> str:
    """Return the last line that a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=240, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().rpartition("\n")[2]


@pytest.fixture(scope="module")
def registered() -> dict[str, Any]:
    """What there is where the plugin was registered twice and serves a CPU; importing vLLM takes ten seconds."""
    found: dict[str, Any] = json.loads(_python(REGISTER_TWICE))
    return found


def test_importing_the_package_imports_neither_vllm_nor_triton() -> None:
    _python(
        "import sys, infoquant_vllm, infoquant_vllm.format; "
        "heavy = {'vllm', 'triton', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )


def test_registering_twice_leaves_one_quantization_method(registered: dict[str, Any]) -> None:
    assert registered["methods"] == 1
    assert registered["config"] == "infoquant_vllm.config"
    assert registered["attention"] == "InfoQuantAttentionBackend"


def test_serving_a_cpu_imports_no_kernels_of_triton(registered: dict[str, Any]) -> None:
    assert registered["kernels of Triton"] == []
