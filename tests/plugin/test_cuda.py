"""What the plugin does where vLLM's platform is CUDA, its Python run here: tensors of the CPU, kernels interpreted."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker import workspace

from infoquant_vllm import attention, kv_cache, linear
from infoquant_vllm.attention import InfoQuantAttentionBackend, InfoQuantAttentionMetadata
from infoquant_vllm.format import FormatError
from infoquant_vllm.kernels import dispatch
from infoquant_vllm.kernels.operands import KVScheme, ScoreParams
from infoquant_vllm.kernels.torch import kv_cache as cpu
from tests.common.interpreted import attention as prompt_kernel
from tests.common.interpreted import decode, interpreter_only, tiles
from tests.kernels.test_kv_cache import Batch
from tests.plugin.test_layers import Model, _rank, model_config

__all__ = ["model_config"]

pytestmark = interpreter_only
SCHEME = KVScheme((4, 4), hadamard=True)


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H100, as far as the plugin can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for module in (kv_cache, linear):
        monkeypatch.setattr(module, "current_platform", SimpleNamespace(device_type="cuda", is_cpu=lambda: False))
    monkeypatch.setattr(attention, "backend", lambda device: dispatch.backend("cuda"))
    monkeypatch.setattr(tiles, "SEQUENCE_SPLITS", 8)  # empty ones cost time here
    dispatch.backend.cache_clear()
    yield
    dispatch.backend.cache_clear()


@pytest.fixture
def config(model_config: ModelConfig) -> VllmConfig:
    return VllmConfig(model_config=model_config)


def builder(config: VllmConfig, drafts: int = 0) -> Any:
    """The builder of an engine that drafts so many tokens."""
    if drafts:
        config.speculative_config = SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    spec = InfoQuantAttentionBackend.customize_spec(spec)
    assert spec.page_size_bytes == 16 * 2 * 72
    return InfoQuantAttentionBackend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))


def common(batch: Batch, tokens: int | None = None) -> CommonAttentionMetadata:
    """What a runner hands to builders, of `tokens` with the padding of a captured graph."""
    starts = batch.query_starts
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=batch.lens,
        num_reqs=len(batch.lens),
        num_actual_tokens=int(starts[-1]) if tokens is None else tokens,
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(batch.lens.max()),
        block_table_tensor=batch.block_table,
        slot_mapping=batch.slots,
    )


def make_impl(config: VllmConfig) -> Any:
    with set_current_vllm_config(config):
        return InfoQuantAttentionBackend.get_impl_cls()(4, 64, 64**-0.5, 2, scheme=SCHEME)


def attend(
    impl: Any, batch: Batch, metadata: InfoQuantAttentionMetadata, cache: torch.Tensor, padding: int = 0
) -> torch.Tensor:
    """The output with the padding of a captured graph."""
    query = torch.cat((batch.query, torch.full((padding, 4, 64), torch.nan)))
    out = torch.zeros(len(query), 4, 64)
    impl.forward(torch.nn.Module(), query, None, None, cache, metadata, out)
    return out


@pytest.mark.parametrize("counts", [[1, 20], [20, 1], [1, 1]])
def test_spec_builder_and_kernels_serve_a_batch(config: VllmConfig, counts: list[int]) -> None:
    batch = Batch(counts, [40, 20], 4, 2, 64, dtype=torch.float32)
    metadata = builder(config).build(0, common(batch))
    impl = make_impl(config)
    layer, cache = torch.nn.Module(), batch.empty_cache()
    layer.key_clip_ratio, layer.value_clip_ratio, layer.key_mean = (*batch.clips, batch.key_mean)
    impl.do_kv_cache_update(layer, batch.key, batch.value, cache, batch.slots)
    assert torch.equal(cache, batch.store(cpu))
    out = attend(impl, batch, metadata, cache, padding=3)
    expected = batch.attend(cpu, cache)
    assert (out[: sum(counts)] - expected).abs().max() <= 5e-4 * expected.abs().max()
    assert not out[sum(counts) :].any()


@pytest.mark.parametrize(
    ("drafts", "counts", "tokens", "expected"),
    [
        (0, [1, 1, 1], None, (3, 3)),
        (0, [1, 1, 30, 5], None, (2, 2)),
        (0, [30, 1], None, (0, 0)),  # of a runner that left the batch in its order
        (0, [1, 1, 0, 0], 4, (4, 4)),  # a captured graph of four sequences
        (3, [4, 4, 2], None, (3, 10)),
        (3, [4, 1, 3, 9, 1], None, (3, 8)),
        (3, [4, 4, 0, 0], 16, (4, 16)),
        (0, [4, 1], None, (0, 0)),
    ],
)
def test_decoding_sequences_are_told_from_prompts(
    config: VllmConfig, drafts: int, counts: list[int], tokens: int | None, expected: tuple[int, int]
) -> None:
    batch = Batch(counts, [max(count, 1) * 2 for count in counts], 1, 1, 64)
    found = builder(config, drafts).build(0, common(batch, tokens))
    assert (found.num_decodes, found.num_decode_tokens) == expected
    assert found.num_actual_tokens == (tokens or sum(counts))


@pytest.mark.parametrize(("drafts", "counts"), [(0, [1, 1, 20, 3]), (3, [4, 2, 1, 20])])
def test_a_prompt_in_the_batch_does_not_change_a_bit_of_decoding_rows(
    config: VllmConfig, drafts: int, counts: list[int]
) -> None:
    batch = Batch(counts, [150, 40, 20, 30], 4, 2, 64, dtype=torch.float32)
    made = builder(config, drafts)
    impl, cache, metadata = make_impl(config), batch.store(cpu), made.build(0, common(batch))
    mixed, decodes, rows = attend(impl, batch, metadata, cache), metadata.num_decodes, metadata.num_decode_tokens
    expected = batch.attend(cpu, cache)
    assert (mixed - expected).abs().max() <= 5e-4 * expected.abs().max()
    batch.query, batch.query_starts = batch.query[:rows], batch.query_starts[: decodes + 1]
    batch.lens, batch.block_table = batch.lens[:decodes], batch.block_table[:decodes]
    alone = made.build(0, common(batch))
    assert alone.num_decodes == decodes == len(counts) - (1 if drafts else 2)
    assert torch.equal(attend(impl, batch, alone, cache), mixed[:rows])


def test_cuda_graphs_are_declared_for_batches_without_prompts(config: VllmConfig) -> None:
    made = builder(config, drafts=3)
    assert made.get_cudagraph_support(config, made.kv_cache_spec) == AttentionCGSupport.UNIFORM_BATCH
    assert made.get_varlen_cudagraph_max_query_len(config, made.kv_cache_spec) == made.reorder_batch_threshold == 4
    # Model Runner V2 asks for this if drafts are cut on the GPU.
    assert InfoQuantAttentionBackend.supports_device_cpu_query_lens_mismatch()


def test_a_device_without_a_kernel_for_decoding_takes_batches_as_they_come(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "backend", dispatch.backend)
    made = builder(config)
    assert made.reorder_batch_threshold is None
    assert made.build(0, common(Batch([1, 1], [5, 9], 1, 1, 64))).num_decodes == 0
    assert make_impl(config).bounds is None


def test_scratch_is_claimed_by_the_run_that_measures_memory(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never grows after it, whatever batch comes."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    workspace.reset_workspace_manager()
    workspace.init_workspace_manager(torch.device("cpu"))
    try:
        config.scheduler_config.max_num_seqs = 6
        made, impl = builder(config, drafts=3), make_impl(config)
        impl.forward(torch.nn.Module(), torch.zeros(9, 4, 64), None, None, None, None, torch.zeros(9, 4, 64))
        claimed = workspace.current_workspace_manager()._current_workspaces[0]
        assert claimed is not None
        numbers = sum(map(torch.Size.numel, map(torch.Size, impl.scratch_shapes)))
        assert claimed.numel() >= 4 * numbers > 0
        workspace.lock_workspace()
        batch = Batch([4] * 6, [400, 4, 30, 20, 10, 5], 4, 2, 64, dtype=torch.float32)
        cache = batch.store(cpu)
        out, expected = attend(impl, batch, made.build(0, common(batch)), cache), batch.attend(cpu, cache)
        assert (out - expected).abs().max() <= 5e-4 * expected.abs().max()
        assert workspace.current_workspace_manager()._current_workspaces[0] is claimed
    finally:
        workspace.reset_workspace_manager()


def test_scratch_of_an_8b_model_stops_growing_where_a_gpu_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SEQUENCE_SPLITS", 256)
    monkeypatch.setattr(tiles.common, "architecture", lambda device: 90)
    heads, kv_heads, size = 32, 8, 128
    for context in (8192, 131072):
        found = {}
        for sequences in (16, 256, 1024):
            bounds = sequences, 1, context
            shapes = decode.decode_scratch(heads, kv_heads, size, None, *bounds, torch.device("cpu"))
            found[sequences] = 4 * sum(map(torch.Size.numel, map(torch.Size, shapes)))
            every = 4 * sequences * heads * tiles.kv_splits(kv_heads) * (size + 2)
            print(f"{sequences} sequences of {context}: {found[sequences]:,} bytes; of every part {every:,}")
        assert found[16] < found[256] == found[1024] <= 70 * 2**20


def test_launches_take_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would wait for a GPU, or let data decide about an allocation or a grid, is an error here."""
    batch = Batch([1, 1], [400, 20], 2, 1, 64, dtype=torch.float32)
    cache, out = batch.store(cpu), torch.empty_like(batch.query)
    shapes = decode.decode_scratch(2, 1, 64, None, 2, 1, 400, torch.device("cpu"))
    scratch = [torch.empty(shape) for shape in shapes]
    rest = cache, batch.sequences, ScoreParams(64**-0.5), SCHEME, out
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "nonzero", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, _waits)
    grids: list[tuple[int, ...]] = []
    launcher = type(prompt_kernel.kv_attention_kernel)
    monkeypatch.setattr(launcher, "run", lambda self, *a, grid, **k: grids.append(grid))
    for _ in range(2):
        decode.kv_decode(batch.query, *rest, 1, scratch)
        prompt_kernel.kv_attention(batch.query, *rest)
        batch.lens[0] = 9
    assert grids[:3] == grids[3:] == [(2, 1, 2), (2, 2, 1), (2, 1)]


def _waits(*_: object) -> None:
    raise AssertionError("this waits for the device")


def test_a_linear_on_a_device_without_kernels_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "current_platform", SimpleNamespace(device_type="xpu"))
    with pytest.raises(FormatError, match="o_proj: infoquant: no kernels for xpu"), _rank(0, 1):
        Model().create("self_attn.o_proj")
