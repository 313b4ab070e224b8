"""Which backend serves: by device, compute capability, and INFOQUANT_KERNELS; and what it refuses."""

from collections.abc import Callable, Iterator

import pytest
import torch

from infoquant_vllm import doctor
from infoquant_vllm.config import InfoQuantConfig
from infoquant_vllm.kernels.dispatch import BACKENDS, FORCE, backend, forced_kernels
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.summary import Summary


@pytest.fixture(autouse=True)
def _fresh_choice() -> Iterator[None]:
    forced_kernels.cache_clear()
    backend.cache_clear()
    yield
    forced_kernels.cache_clear()
    backend.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def module(function: Callable[..., object]) -> str:
    return function.__module__.removeprefix("infoquant_vllm.kernels.")


@pytest.mark.parametrize("word", BACKENDS)
def test_kernels_can_be_forced(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv(FORCE, word)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = backend("cpu")
    expected = {"reference": "torch.", "cpu": ("cpu.", "torch."), "triton": "triton."}[word]
    assert module(found.linear).startswith(expected)
    assert module(found.kv_attention).startswith(expected)
    assert f"kernels forced by {FORCE}={word}" in Summary().line()


@pytest.mark.parametrize("hadamard", [0, 64, 192])
def test_the_forced_reference_runs_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch, hadamard: int) -> None:
    monkeypatch.setenv(FORCE, "reference")
    kernels = backend("meta")
    with torch.device("meta"):  # in a GPU's place: whatever is made on the CPU would not go with these
        x, clip, scale = torch.empty(3, 192), torch.empty(1, 2), torch.empty(8, 1)
        weight = PackedWeight(torch.empty(8, 96, dtype=torch.uint8), scale, None, None)
        weight = kernels.prepare_linear(weight, 4, 1)
    out = kernels.linear(x, InputQuant([], hadamard, clip, 4, symmetric=False), weight, None)
    assert out.device.type == "meta"
    assert kernels.rms_norm(x, torch.empty(192, device="meta"), 1e-5).device.type == "meta"


def test_forced_triton_is_the_interpreter_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, "triton")
    with pytest.raises(NotImplementedError, match="set TRITON_INTERPRET=1"):
        backend("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend("cpu").name == "Triton, interpreted"


def test_an_unknown_word_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, "cutlass")
    with pytest.raises(ValueError, match="cutlass: expected one of reference, cpu, triton"):
        InfoQuantConfig()
    finding = next(doctor.forced())
    assert not finding.in_order
    assert finding.advice == f"unset {FORCE}"


@pytest.mark.usefixtures("hopper")
def test_a_gpu_gets_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    found = backend("cuda")
    assert found.name == "Triton"
    for function in (found.linear, found.experts, found.kv_store, found.kv_attention, found.kv_decode):
        assert function is not None
        assert module(function).startswith("triton.")
    assert backend("cpu").kv_decode is None
    monkeypatch.setenv(FORCE, "cpu")
    forced_kernels.cache_clear()
    backend.cache_clear()
    with pytest.raises(NotImplementedError, match="these kernels do not run on cuda"):
        backend("cuda")


def test_gpus_before_ampere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(NotImplementedError, match=r"compute capability 7.5, the kernels need 8.0"):
        backend("cuda")


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no kernels for xpu; there are some for cpu, cuda"):
        backend("xpu")


@pytest.mark.usefixtures("hopper")
def test_what_the_kernels_do_not_take_is_refused_by_name() -> None:
    kernels = backend("cuda")
    for size in (264, 100):
        with pytest.raises(NotImplementedError, match=f"head size {size}: the Triton kernels .* of 8 up to 256"):
            kernels.check_head_size(size)
    for groups, name in (((48, 64), "weights"), ((64, 48), "input_activations")):
        with pytest.raises(NotImplementedError, match=f"group_size 48 of {name}: the Triton .* multiples of 32"):
            kernels.check_linear(*groups)
    kernels.check_linear(None, None)
    kernels.check_head_size(256)
