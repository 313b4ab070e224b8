"""A quantized cache beside unquantized linears: vLLM's own linears, our cache, and what is missing is refused."""

from pathlib import Path

import pytest
import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from infoquant_vllm import register
from infoquant_vllm.format import FormatError
from infoquant_vllm.kernels.cpu import kernels as cpu
from infoquant_vllm.kernels.operands import KVCalibration, KVScheme
from tests.common.checkpoints import write_random
from tests.format.test_checkpoint import PLAIN
from tests.kernels.test_kv_cache import Batch
from tests.plugin.test_layers import LAYER, Model, _rank

TENSORS = ("key_clip_ratio", "value_clip_ratio", "key_mean", "key_feedback")


@pytest.fixture
def model_config(tmp_path: Path) -> ModelConfig:
    register()
    return ModelConfig(str(write_random(tmp_path, PLAIN)), skip_tokenizer_init=True, dtype="float32")


def attention(model: Model, leave_out: str | None = None) -> Attention:
    """An attention layer of this rank, loaded and finished."""
    heads = model.hf["num_attention_heads"], model.hf["num_key_value_heads"]
    prefix = f"{LAYER}.self_attn.attn"
    layer = Attention(heads[0], 64, 0.125, heads[1], quant_config=model.config, prefix=prefix)
    for name in TENSORS:
        if name != leave_out:
            param = getattr(layer, name)
            param.weight_loader(param, model.tensors[f"{prefix}.{name}"])
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"])
def test_linears_are_vllms_own(name: str) -> None:
    with _rank(0, 1):
        assert type(Model(PLAIN).create(name).quant_method) is UnquantizedLinearMethod


def test_the_cache_is_stored_with_every_tensor_of_the_checkpoint(model_config: ModelConfig) -> None:
    model, batch = Model(PLAIN), Batch([1], [24], 4, 2, 64, dtype=torch.float32)
    with _rank(0, 1, model_config):
        layer = attention(model)
        cache, expected = batch.empty_cache(), batch.empty_cache()
        layer.impl.do_kv_cache_update(layer, batch.key, batch.value, cache, batch.slots)
    calibration = KVCalibration(*(model.tensors[f"{LAYER}.self_attn.attn.{name}"] for name in TENSORS))
    cpu.kv_store(batch.key, batch.value, expected, batch.slots, calibration, KVScheme((4, 4), hadamard=True))
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("leave_out", TENSORS)
def test_a_missing_tensor_of_the_cache_is_refused_by_name(leave_out: str, model_config: ModelConfig) -> None:
    with (
        _rank(0, 1, model_config),
        pytest.raises(FormatError, match=rf"{LAYER}.self_attn.attn.{leave_out} is missing"),
    ):
        attention(Model(PLAIN), leave_out)
