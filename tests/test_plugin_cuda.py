"""What the plugin does where vLLM's platform is CUDA, its Python run here: tensors of the CPU, kernels interpreted."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from infoquant_vllm import attention, kv_cache, linear
from infoquant_vllm.attention import KV4Backend
from infoquant_vllm.format import FormatError
from infoquant_vllm.kernels.cpu import kv_cache as cpu
from infoquant_vllm.ops import table
from tests.interpreted import interpreter_only, kv4_attention, kv4_tiles
from tests.test_kernels_kv_cache import Batch
from tests.test_plugin_layers import Model, _rank, model_config

__all__ = ["model_config"]

pytestmark = interpreter_only


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H100, as far as the plugin can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for module in (kv_cache, linear):
        monkeypatch.setattr(module, "current_platform", SimpleNamespace(device_type="cuda", is_cpu=lambda: False))
    monkeypatch.setattr(attention, "kernel", lambda operation, device: table.kernel(operation, "cuda"))
    monkeypatch.setattr(kv4_tiles, "PARTS", 8)  # empty ones cost time here
    table.kernel.cache_clear()
    yield
    table.kernel.cache_clear()


def test_spec_builder_and_kernels_serve_a_batch(model_config: ModelConfig) -> None:
    batch = Batch([1, 20], [40, 20], 4, 2, 64, dtype=torch.float32)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    spec = KV4Backend.customize_spec(spec)
    assert spec.page_size_bytes == 16 * 2 * 72
    config = VllmConfig(model_config=model_config)
    builder = KV4Backend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
    metadata = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=batch.query_starts,
            query_start_loc_cpu=batch.query_starts,
            seq_lens=batch.lens,
            num_reqs=2,
            num_actual_tokens=21,
            max_query_len=20,
            max_seq_len=40,
            block_table_tensor=batch.block_table,
            slot_mapping=batch.slots,
        ),
    )
    impl: Any = KV4Backend.get_impl_cls()(4, 64, 64**-0.5, 2, key_transform="hadamard")
    layer, cache = torch.nn.Module(), batch.empty_cache()
    layer.key_clip, layer.value_clip, layer.key_offset = (*batch.clips, batch.key_offset)
    impl.do_kv_cache_update(layer, batch.key, batch.value, cache, batch.slots)
    assert torch.equal(cache, batch.store(cpu))
    out = torch.zeros(24, 4, 64)
    query = torch.cat((batch.query, torch.full((3, 4, 64), torch.nan)))  # a captured graph's padding
    impl.forward(layer, query, None, None, cache, metadata, out)
    expected = batch.attend(cpu, cache)
    assert (out[:21] - expected).abs().max() <= 5e-4 * expected.abs().max()
    assert not out[21:].any()


def test_cuda_graphs_are_declared_for_every_batch(model_config: ModelConfig) -> None:
    config = VllmConfig(model_config=model_config)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    support = KV4Backend.get_builder_cls().get_cudagraph_support(config, spec)
    assert support == AttentionCGSupport.ALWAYS
    assert KV4Backend.supports_device_cpu_query_lens_mismatch()  # which Model Runner V2 asks for drafts cut on the GPU


def test_launches_take_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would wait for a GPU, or let data decide about an allocation or a grid, is an error here."""
    batch = Batch([1, 1], [40, 20], 2, 1, 64, dtype=torch.float32)
    cache = batch.store(cpu)
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "nonzero", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, _waits)
    grids: list[tuple[int, ...]] = []
    for launcher in (
        kv4_attention.kv4_attention_kernel,
        kv4_attention.kv4_decode_kernel,
        kv4_attention.kv4_reduce_kernel,
    ):
        monkeypatch.setattr(type(launcher), "run", lambda self, *a, grid, **k: grids.append(grid))
    batch.attend(kv4_attention, cache)
    batch.lens[0] = 9
    batch.attend(kv4_attention, cache)
    assert grids[:2] == grids[2:]
    assert grids[0] == (2, 1, 8)


def _waits(*_: object) -> None:
    raise AssertionError("this waits for the device")


def test_a_linear_without_a_kernel_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KERNELS", {})
    with pytest.raises(FormatError, match="o_proj: infoquant: no kernel for linear on cuda"), _rank(0, 1):
        Model().create("self_attn.o_proj")
