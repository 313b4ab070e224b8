"""`--load-format dummy` on vLLM's own layers: made-up tensors are valid, and made up for that alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_embedding
from transformers import LlamaConfig
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

from benchmarks.shapes import write_config
from infoquant_vllm import register
from infoquant_vllm.config import InfoQuantConfig
from infoquant_vllm.dummy_weights import fill_dummy_weights
from infoquant_vllm.format import FormatError, check_values
from offline.presets import PRESETS
from tests.common.checkpoints import write_random
from tests.plugin.test_layers import LAYER, SHARDABLE, WEIGHT_ONLY, Model, _rank

VOCAB, HIDDEN = 500, 256
SITES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@contextmanager
def _dummy(model: ModelConfig | None = None) -> Iterator[None]:
    with _rank(0, 1, model):
        get_current_vllm_config().load_config.load_format = "dummy"
        yield


def _initialize(layer: Any) -> Any:
    """What vLLM's dummy loader does to a layer."""
    for param in layer.parameters():
        initialize_single_dummy_weight(param)
    return layer


def _finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("quantization", [{}, SHARDABLE, WEIGHT_ONLY], ids=["fast", "groups and blocks", "16 bits"])
def test_outputs_of_a_linear_are_about_as_large_as_its_inputs(name: str, quantization: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_attention_heads": 12} if quantization else {}
    with _dummy():
        layer = _finish(_initialize(Model(quantization, **sizes).create(name)))
        x = torch.randn(33, layer.input_size)
        out = layer.quant_method.apply(layer, x)
    assert torch.isfinite(out).all()
    assert 0.8 < out.std() < 1.25


@pytest.mark.parametrize("quantized", [True, False])
def test_a_tied_vocabulary_has_a_rotation_and_one_matrix(tmp_path: Path, quantized: bool) -> None:
    register()
    quantization = {"lm_head_bits": 8, "ignore": []} if quantized else {}
    changes = {"tie_word_embeddings": True, "vocab_size": VOCAB}
    vllm = ModelConfig(str(write_random(tmp_path, quantization, **changes)), skip_tokenizer_init=True, dtype="float32")
    with _dummy(vllm):
        arguments = {"quant_config": Model(quantization, **changes).config, "params_dtype": torch.float32}
        embed = vllm_embedding.VocabParallelEmbedding(VOCAB, HIDDEN, prefix="model.embed_tokens", **arguments)
        head = vllm_embedding.ParallelLMHead(VOCAB, HIDDEN, prefix="lm_head", **arguments).tie_weights(embed)
        rows = _finish(_initialize(embed))(torch.arange(VOCAB))
        logits = _finish(head).quant_method.apply(head, torch.randn(5, HIDDEN))
    rotation = embed.r1
    assert torch.equal(rotation @ rotation.T, torch.eye(HIDDEN))
    assert torch.isfinite(rows).all()
    assert rows.std() > 0
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_a_cache_has_clips_and_offsets(tmp_path: Path) -> None:
    register()
    model = Model({"kv_cache": {"key_bits": 4, "value_bits": 4, "key_transform": "hadamard", "key_mean": True}})
    with _dummy(ModelConfig(str(write_random(tmp_path)), skip_tokenizer_init=True)):
        attention = Attention(4, 64, 0.125, 2, quant_config=model.config, prefix=f"{LAYER}.self_attn.attn")
        _finish(_initialize(attention))
    for name in ("key_clip_ratio", "value_clip_ratio", "key_mean"):
        check_values(getattr(attention, name).data, name, "made up")
    assert not attention.key_mean.any()


def test_codes_are_uniform_and_the_same_for_a_name() -> None:
    made = [torch.empty(96, 101, dtype=torch.uint8) for _ in range(3)]
    for data, module in zip(made, ("a", "a", "b"), strict=True):
        fill_dummy_weights({"weight_packed": data}, module, 4)
    assert torch.equal(made[0], made[1])
    assert (made[0] == made[2]).float().mean() < 0.02
    for nibbles in (made[0] & 15, made[0] >> 4):
        assert torch.bincount(nibbles.flatten().int(), minlength=16).min() > 96 * 101 / 16 * 0.8


def test_a_tensor_that_is_missing_from_weights_that_came_is_refused() -> None:
    model = Model()
    with _dummy():
        layer = model.load(_initialize(model.create("mlp.down_proj")), "mlp.down_proj", leave_out="weight_scale")
        with pytest.raises(FormatError, match=r"down_proj\.weight_scale is missing"):
            _finish(layer)


def test_tensors_are_made_up_once_and_not_for_a_reload_that_brings_none() -> None:
    with _dummy():
        layer = _finish(_initialize(Model().create("mlp.down_proj")))
        layer.infoquant_tracker.arrived.clear()
        with pytest.raises(FormatError, match=r"down_proj\.weight_packed is missing"):
            layer.infoquant_tracker.finish(layer, 4)


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "dummy"])
def test_a_config_alone_is_served_by_dummy_weights_or_refused_by_name(load_format: str, tmp_path: Path) -> None:
    register()
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=64, **sizes)
    write_config(config.to_dict(), tmp_path / "shape", PRESETS["fast"])
    args = EngineArgs(model=str(tmp_path / "shape"), skip_tokenizer_init=True, load_format=load_format)
    quantization = args.create_engine_config().quant_config
    assert isinstance(quantization, InfoQuantConfig)
    layer, name = torch.nn.Module(), "model.layers.0.mlp.down_proj"
    with _rank(0, 1):
        get_current_vllm_config().load_config.load_format = load_format
        if load_format == "dummy":
            assert quantization.get_quant_method(layer, name) is None
        else:
            with pytest.raises(FormatError, match=r"shape: holds no weights .* or pass --load-format dummy"):
                quantization.get_quant_method(layer, name)
