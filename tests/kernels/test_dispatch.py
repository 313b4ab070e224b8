"""Which kernel is routed to: by device, compute capability, bits, groups, head size, and INFOQUANT_KERNELS."""

from collections.abc import Iterator

import pytest
import torch

from infoquant_vllm import doctor_kernels
from infoquant_vllm.config import InfoQuantConfig
from infoquant_vllm.ops.table import FAMILIES, FORCE, KERNELS, forced_family, has_kernel, kernel, require, served_by
from infoquant_vllm.summary import Summary

OF_TRITON_ALONE = {"kv_decode", "decode_scratch"}
"""Where these are missing, `kv_attention` takes decoding sequences too."""


@pytest.fixture(autouse=True)
def _fresh_choice() -> Iterator[None]:
    forced_family.cache_clear()
    kernel.cache_clear()
    yield
    forced_family.cache_clear()
    kernel.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


def test_every_family_has_every_operation() -> None:
    operations = {operation for operation, _ in KERNELS} - OF_TRITON_ALONE
    expected = {(operation, family) for operation in operations for family in FAMILIES}
    assert set(KERNELS) == expected | {(operation, "triton") for operation in OF_TRITON_ALONE}


@pytest.mark.parametrize("family", ["reference", "cpu"])
def test_a_family_can_be_forced(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setenv(FORCE, family)
    for operation in {operation for operation, _ in KERNELS} - OF_TRITON_ALONE:
        found = kernel(operation, "cpu").__module__.split(".")[2]
        assert found == "torch" or (family == "cpu" and found == "cpu")
    assert f"kernels as {FORCE}={family} has them" in Summary().line()


@pytest.mark.parametrize("hadamard", [0, 64, 192])
def test_the_forced_reference_runs_where_its_tensors_are(monkeypatch: pytest.MonkeyPatch, hadamard: int) -> None:
    monkeypatch.setenv(FORCE, "reference")
    with torch.device("meta"):  # in a GPU's place: whatever is made on the CPU would not go with these
        x, clip, scale = torch.empty(3, 192), torch.empty(1, 2), torch.empty(8, 1)
        packed = torch.empty(8, 96, dtype=torch.uint8)
    out = kernel("linear", "meta")(x, [], hadamard, clip, 4, False, packed, scale, None, None)
    assert out.device.type == "meta"
    assert kernel("rms_norm", "meta")(x, torch.empty(192, device="meta"), 1e-5).device.type == "meta"


def test_forced_triton_is_the_interpreter_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, "triton")
    with pytest.raises(NotImplementedError, match="set TRITON_INTERPRET=1"):
        kernel("kv_store", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel("kv_store", "cpu").__module__ == "infoquant_vllm.kernels.triton.kv4_store"
    assert kernel("kv_attention", "cpu").__module__ == "infoquant_vllm.kernels.triton.kv4_attention"
    assert served_by("kv_store", "kv_attention") == "Triton, interpreted"


def test_a_word_that_is_no_family_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE, "cutlass")
    with pytest.raises(ValueError, match="cutlass: expected one of reference, cpu, triton"):
        InfoQuantConfig()
    finding = next(doctor_kernels.choice())
    assert not finding.in_order
    assert finding.advice == f"unset {FORCE}"


@pytest.mark.usefixtures("hopper")
def test_a_gpu_gets_triton_and_nothing_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel("kv_attention", "cuda").__module__ == "infoquant_vllm.kernels.triton.kv4_attention"
    assert has_kernel("kv_decode", "cuda")
    assert not has_kernel("kv_decode", "cpu")
    assert served_by("kv_store", device="cuda") == "Triton"
    assert kernel("linear", "cuda").__module__ == "infoquant_vllm.kernels.triton.linear"
    with pytest.raises(NotImplementedError, match="no kernel for rms_norm on cuda"):
        kernel("rms_norm", "cuda")
    monkeypatch.setenv(FORCE, "cpu")
    forced_family.cache_clear()
    with pytest.raises(NotImplementedError, match="these kernels do not run on cuda"):
        kernel("kv_store", "cuda")


def test_gpus_before_ampere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(NotImplementedError, match=r"compute capability 7.5, the kernels need 8.0"):
        require("kv_store", "cuda", head_size=64)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("operation", "facts", "problem"),
    [
        ("kv_attention", {"head_size": 264}, "head_size 264: .* serves multiples of 8 up to 256"),
        ("kv_attention", {"head_size": 100}, "head_size 100"),
        ("kv_store", {"head_size": 128, "key_bits": 3}, r"key_bits 3: .* serves \(4, 8\)"),
        ("linear", {"weight_bits": 2, "input_bits": 16}, r"weight_bits 2: .* serves \(4, 8\)"),
        ("linear", {"weight_bits": 4, "input_bits": 4, "input_group": 48}, "input_group 48: .* multiples of 32"),
    ],
)
def test_what_a_kernel_does_not_take_is_refused_by_name(operation: str, facts: dict[str, int], problem: str) -> None:
    with pytest.raises(NotImplementedError, match=problem):
        require(operation, "cuda", **facts)


def test_a_device_that_nothing_is_for_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no kernel for kv_store on xpu; there are cpu, reference, triton"):
        kernel("kv_store", "xpu")
