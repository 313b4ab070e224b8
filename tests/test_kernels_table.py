"""Which kernel is routed to: by device, compute capability, bits, groups, head size, and INFOQUANT_KERNELS."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from infoquant_vllm import doctor
from infoquant_vllm.config import InfoQuantConfig
from infoquant_vllm.kernels.reference import quantized_linear, rotate_quantize
from infoquant_vllm.ops import table
from infoquant_vllm.ops.table import FAMILIES, FORCE, KERNELS, forced_family, kernel, require, served_by
from infoquant_vllm.summary import Summary


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
    operations = {operation for operation, _ in KERNELS}
    assert set(KERNELS) == {(operation, family) for operation in operations for family in FAMILIES}


@pytest.mark.parametrize("family", ["reference", "cpu"])
def test_a_family_can_be_forced(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setenv(FORCE, family)
    for operation, _ in KERNELS:
        found = kernel(operation, "cpu").__module__.split(".")[2]
        assert found == family or (family == "cpu" and found in ("native", "reference"))
    assert f"kernels as {FORCE}={family} has them" in Summary().line()


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
    finding = next(doctor.choice())
    assert not finding.in_order
    assert finding.advice == f"unset {FORCE}"


@pytest.mark.usefixtures("hopper")
def test_a_gpu_gets_triton_and_nothing_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel("kv_attention", "cuda").__module__ == "infoquant_vllm.kernels.triton.kv4_attention"
    assert served_by("kv_store", device="cuda") == "Triton"
    with pytest.raises(NotImplementedError, match="no kernel for weight_rows on cuda"):
        kernel("weight_rows", "cuda")
    monkeypatch.setenv(FORCE, "cpu")
    forced_family.cache_clear()
    with pytest.raises(NotImplementedError, match="these kernels do not run on cuda"):
        kernel("kv_store", "cuda")


@pytest.mark.usefixtures("hopper")
def test_linears_on_a_gpu_need_their_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    exists = table._exists
    monkeypatch.setattr(table, "_exists", lambda module: module != "triton.int4_linear" and exists(module))
    with pytest.raises(NotImplementedError, match=r"triton.int4_linear.* not in this release"):
        require("linear", "cuda", weight_bits=4)


@pytest.mark.usefixtures("hopper")
def test_linears_on_a_gpu_are_those_kernels_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_exists", lambda module: True)
    for name, function in (
        ("int4_linear", quantized_linear.quantized_linear),
        ("rotate_quantize", rotate_quantize.rotate_quantize),
    ):
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"infoquant_vllm.kernels.triton.{name}", module)
    monkeypatch.delitem(sys.modules, "infoquant_vllm.kernels.triton.linear", raising=False)
    torch.manual_seed(0)
    packed, scale = torch.randint(0, 256, (8, 32), dtype=torch.uint8), torch.rand(8, 1)
    weight = kernel("prepare_weight", "cuda")(packed, 4, True, 1)
    rest = ([], 64, torch.ones(1, 2), 4, False, weight, kernel("prepare_grid", "cuda")(scale), None, None)
    x = torch.randn(3, 64)
    assert torch.equal(kernel("linear", "cuda")(x, *rest), kernel("linear", "cpu")(x, *_on_cpu(rest, packed, scale)))
    with pytest.raises(NotImplementedError, match="input_bits 16"):
        kernel("linear", "cuda")(x, [], 0, None, 16, True, packed, scale, None, None)
    monkeypatch.delitem(sys.modules, "infoquant_vllm.kernels.triton.linear")


def _on_cpu(rest: tuple[object, ...], packed: torch.Tensor, scale: torch.Tensor) -> tuple[object, ...]:
    weight = kernel("prepare_weight", "cpu")(packed, 4, True, 1)
    matrices = kernel("prepare_matrices", "cpu")([], 64)
    return (matrices, *rest[1:5], weight, kernel("prepare_grid", "cpu")(scale), *rest[7:])


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
        ("linear", {"weight_bits": 4, "input_bits": 16}, "input_bits 16"),
        ("linear", {"weight_bits": 4, "input_bits": 4, "input_group": 32}, "input_group 32"),
    ],
)
def test_what_a_kernel_does_not_take_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, operation: str, facts: dict[str, int], problem: str
) -> None:
    monkeypatch.setattr(table, "_exists", lambda module: True)
    with pytest.raises(NotImplementedError, match=problem):
        require(operation, "cuda", **facts)


def test_a_device_that_nothing_is_for_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no kernel for kv_store on xpu; there are cpu, reference, triton"):
        kernel("kv_store", "xpu")
