"""The plugin's methods on vLLM's own layers: sharding, loading, and what is refused by name."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import vllm.model_executor.layers.linear as vllm_linear
import vllm.model_executor.layers.vocab_parallel_embedding as vllm_embedding
import vllm.model_executor.parameter as vllm_parameter
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import set_default_torch_dtype

import infoquant_vllm.kv_cache as infoquant_kv_cache
from infoquant_vllm import register
from infoquant_vllm.config import InfoQuantConfig
from infoquant_vllm.format import FormatError
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from tests.common import oracles
from tests.common.checkpoints import hf_config, quantization_config, random_tensors, write_random

LAYER = "model.layers.0"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@contextmanager
def _rank(rank: int, ranks: int, model: ModelConfig | None = None) -> Iterator[None]:
    """One rank of tensor parallelism, as vLLM's layers and parameters see it."""
    numbers = {"get_tensor_model_parallel_rank": rank, "get_tensor_model_parallel_world_size": ranks}
    with ExitStack() as stack:
        for module in (vllm_linear, vllm_embedding, vllm_parameter, infoquant_kv_cache):
            for name, number in numbers.items():
                stack.enter_context(mock.patch.object(module, name, return_value=number))
        stack.enter_context(set_current_vllm_config(VllmConfig(**({"model_config": model} if model else {}))))
        yield


@pytest.fixture
def model_config(tmp_path: Path) -> ModelConfig:
    """What vLLM's attention layers ask about the model."""
    register()
    return ModelConfig(str(write_random(tmp_path)), skip_tokenizer_init=True)


class Model:
    """One decoder layer's linears, attention and embedding, created and loaded as vLLM does it."""

    def __init__(self, quantization: dict[str, Any] | None = None, **changes: Any):
        self.hf = hf_config(**changes)
        self.hf["quantization_config"] = quantization_config(self.hf, **(quantization or {}))
        self.tensors = random_tensors(self.hf)
        self.config = InfoQuantConfig.from_config(self.hf["quantization_config"])

    def create(self, name: str) -> Any:
        """A layer by the last part of its name."""
        hf, config = self.hf, self.config
        hidden, inner, size = hf["hidden_size"], hf["intermediate_size"], hf["head_dim"]
        heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
        makers: dict[str, Callable[[str], Any]] = {
            "self_attn.qkv_proj": lambda p: vllm_linear.QKVParallelLinear(
                hidden, size, heads, kv_heads, bias=False, quant_config=config, prefix=p
            ),
            "self_attn.o_proj": lambda p: vllm_linear.RowParallelLinear(
                heads * size, hidden, bias=False, quant_config=config, prefix=p
            ),
            "mlp.gate_up_proj": lambda p: vllm_linear.MergedColumnParallelLinear(
                hidden, [inner] * 2, bias=False, quant_config=config, prefix=p
            ),
            "mlp.down_proj": lambda p: vllm_linear.RowParallelLinear(
                inner, hidden, bias=False, quant_config=config, prefix=p
            ),
        }
        return makers[name](f"{LAYER}.{name}")

    def load(self, layer: Any, name: str, leave_out: str = "") -> Any:
        """Feed the checkpoint's tensors to a layer, but for those whose name ends in `leave_out`."""
        parent, last = name.split(".")
        shards = PACKED.get(last, [last])
        ids: list[Any] = list("qkv") if last == "qkv_proj" else list(range(len(shards)))
        for shard, source in zip(ids, shards, strict=True):
            for key, tensor in self.tensors.items():
                module, _, local = key.rpartition(".")
                if module == f"{LAYER}.{parent}.{source}" and not (leave_out and key.endswith(leave_out)):
                    param = getattr(layer, local)
                    param.weight_loader(param, tensor, *([shard] if len(shards) > 1 else []))
        return layer

    def served(self, name: str) -> Any:
        """A loaded and finished layer."""
        layer = self.load(self.create(name), name)
        layer.quant_method.process_weights_after_loading(layer)
        return layer


GROUPED = {"num_bits": 4, "strategy": "group", "group_size": 32}
SHARDABLE = {
    "config_groups": {
        "residual": {
            "targets": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
            "weights": {"num_bits": 4, "symmetric": False},
            "input_activations": {"num_bits": 8, "mean": True},
            "input_transform": {"type": "kronecker", "factors": [12, 64]},
        },
        "out": {
            "targets": ["o_proj"],
            "weights": {"num_bits": 4},
            "input_activations": {"num_bits": 8, "segment_size": 128},
        },
        "down": {
            "targets": ["down_proj"],
            "weights": GROUPED | {"symmetric": False},
            "input_activations": GROUPED | {"segment_size": 64, "mean": True},
            "input_transform": {"type": "blocks", "block_size": 32},
        },
    }
}
WEIGHT_ONLY = {
    "config_groups": {
        name: group | {"input_activations": {"num_bits": 16}} for name, group in SHARDABLE["config_groups"].items()
    }
}
WIDE = {"hidden_size": 768, "intermediate_size": 384, "num_attention_heads": 12, "num_key_value_heads": 3}


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("quantization", [SHARDABLE, WEIGHT_ONLY], ids=["quantized inputs", "weight-only"])
def test_ranks_together_compute_what_one_does(ranks: int, name: str, quantization: dict[str, Any]) -> None:
    model = Model(quantization, **(WIDE | {"num_key_value_heads": 6 if ranks == 2 else 3}))
    torch.manual_seed(0)
    with _rank(0, 1):
        whole = model.served(name)
        x = torch.randn(5, whole.input_size)
        expected = whole.quant_method.apply(whole, x)
    parts = []
    for rank in range(ranks):
        with _rank(rank, ranks):
            layer = model.served(name)
            own = x if layer.input_size_per_partition == x.shape[1] else x.chunk(ranks, 1)[rank]
            parts.append(layer.quant_method.apply(layer, own.contiguous()))
    if name.endswith(("o_proj", "down_proj")):
        steps = expected.abs().max().item() * 1e-4  # each rank has 16-bit codes of its own share of the features
        torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=steps)
        return
    sizes = [768, *[model.hf["num_key_value_heads"] * 64] * 2] if "qkv" in name else [384, 384]
    for index, section in enumerate(expected.split(sizes, 1)):
        copies = max(1, ranks * 64 // section.shape[1])  # of a kv-head that several ranks share
        width = section.shape[1] * copies // ranks
        for rank, part in enumerate(parts):
            offset = sum(size * (copies if size == section.shape[1] else 1) // ranks for size in sizes[:index])
            found = part[:, offset : offset + width]
            assert torch.equal(found, section[:, rank // copies * width : (rank // copies + 1) * width])


@pytest.mark.parametrize(("rank", "ranks", "shares"), [(0, 1, 1), (0, 2, 1), (1, 2, 0)])
def test_the_output_for_the_mean_input_and_the_bias_are_added_once(rank: int, ranks: int, shares: int) -> None:
    model, name = Model(SHARDABLE, **WIDE), "mlp.down_proj"
    torch.manual_seed(0)
    bias, mean = torch.randn(768).bfloat16(), model.tensors[f"{LAYER}.{name}.output_mean"].clone()
    added = []
    for output_mean in (torch.zeros(768), mean):
        model.tensors[f"{LAYER}.{name}.output_mean"] = output_mean
        with _rank(rank, ranks):
            layer = model.load(model.create(name), name)
            layer.bias = torch.nn.Parameter(bias if output_mean is mean else torch.zeros_like(bias))
            layer.quant_method.process_weights_after_loading(layer)
            x = torch.zeros(1, 384 // ranks)
            added.append(layer.quant_method.apply(layer, x, layer.bias if rank == 0 else None))
    torch.testing.assert_close(added[1] - added[0], shares * (mean + bias.float())[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"])
def test_a_bfloat16_model_loads_every_tensor_in_the_dtype_of_the_checkpoint(name: str) -> None:
    model = Model(SHARDABLE, **WIDE)
    with _rank(0, 1), set_default_torch_dtype(torch.bfloat16):  # as vLLM does while it builds a model
        layer = model.create(name)
    dtypes = {full.rpartition(".")[2]: tensor.dtype for full, tensor in model.tensors.items()}
    found = {parameter: data.dtype for parameter, data in layer.named_parameters()}
    assert {"weight_packed", "weight_scale", "input_clip_ratio"} <= found.keys()
    assert found == {parameter: dtypes[parameter] for parameter in found}


@pytest.mark.parametrize(("ranks", "rank", "heads"), [(1, 0, [0, 1]), (2, 1, [1]), (4, 3, [1]), (4, 1, [0])])
def test_kv_clips_follow_their_heads(ranks: int, rank: int, heads: list[int], model_config: ModelConfig) -> None:
    model = Model()
    clip = model.tensors[f"{LAYER}.self_attn.attn.key_clip_ratio"]
    with _rank(rank, ranks, model_config):
        attention = Attention(
            4 // ranks, 64, 0.125, len(heads), quant_config=model.config, prefix=f"{LAYER}.self_attn.attn"
        )
        attention.key_clip_ratio.weight_loader(attention.key_clip_ratio, clip)
        assert torch.equal(attention.key_clip_ratio.data, clip[heads])
        with pytest.raises(FormatError, match=r"self_attn\.attn\.value_clip_ratio is missing"):
            attention.quant_method.process_weights_after_loading(attention)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mlp.down_proj", "weight_scale"),
        ("self_attn.qkv_proj", "k_proj.weight_packed"),
        ("mlp.gate_up_proj", "input_clip_ratio"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(name: str, tensor: str) -> None:
    model = Model()
    with _rank(0, 1):
        layer = model.load(model.create(name), name, leave_out=tensor)
        with pytest.raises(FormatError, match=rf"{LAYER}.*{tensor} is missing"):
            layer.quant_method.process_weights_after_loading(layer)


def test_fused_linears_with_different_clips_are_refused() -> None:
    model = Model()
    model.tensors[f"{LAYER}.self_attn.v_proj.input_clip_ratio"] *= 0.9
    with _rank(0, 1), pytest.raises(FormatError, match=r"v_proj\.input_clip_ratio differs from that of .*q_proj"):
        model.load(model.create("self_attn.qkv_proj"), "self_attn.qkv_proj")


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "nan"), (0.0, "is 0"), (-1.0, "is -1")])
def test_impossible_scales_are_refused_by_place(value: float, said: str) -> None:
    model = Model()
    model.tensors[f"{LAYER}.mlp.up_proj.weight_scale"][7, 0] = value
    with _rank(0, 1), pytest.raises(FormatError, match=rf"up_proj\.weight_scale\[7, 0\].*{said}"):
        model.load(model.create("mlp.gate_up_proj"), "mlp.gate_up_proj")


def test_impossible_multipliers_are_refused_by_place() -> None:
    model = Model(_with_group("residual", weights=GROUPED))
    model.tensors[f"{LAYER}.mlp.up_proj.weight_multiplier"][7, 3] = 16
    with _rank(0, 1):
        layer = model.load(model.create("mlp.gate_up_proj"), "mlp.gate_up_proj")
        with pytest.raises(FormatError, match=r"up_proj\.weight_multiplier\[7, 3\] is 16, expected 1 .. 15"):
            layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_block_that_tensor_parallelism_cuts_is_refused_with_numbers(ranks: int) -> None:
    share = f"the {384 // ranks} of 384 input features on each of {ranks} tensor-parallel ranks"
    message = rf"down_proj: hadamard block_size 384 does not divide {share}; .*--max-tp-size {ranks}"
    with _rank(0, ranks), pytest.raises(FormatError, match=message):
        Model().create("mlp.down_proj")


def test_a_range_per_token_that_tensor_parallelism_cuts_is_refused() -> None:
    model = Model(_with_group("out", input_activations={"num_bits": 8}))
    with (
        _rank(1, 2),
        pytest.raises(FormatError, match=r"o_proj: activation scale per token, of 256 does not divide the 128"),
    ):
        model.create("self_attn.o_proj")


def _with_group(name: str, **changes: Any) -> dict[str, Any]:
    groups = quantization_config(hf_config())["config_groups"]
    return {"config_groups": groups | {name: groups[name] | changes}}


def test_linears_that_vllm_fuses_need_equal_schemes() -> None:
    other = {"targets": ["k_proj"], "weights": {"num_bits": 8}, "input_activations": {"num_bits": 4}}
    groups = _with_group("residual", targets=["q_proj", "v_proj", "gate_proj", "up_proj"])["config_groups"]
    model = Model({"config_groups": groups | {"other": other}})
    with _rank(0, 1), pytest.raises(FormatError, match=r"k_proj and .*q_proj are one linear"):
        model.create("self_attn.qkv_proj")


def test_a_linear_that_nothing_names_is_refused() -> None:
    model = Model()
    model.config.data = model.config.data.model_copy(update={"config_groups": {}})
    with _rank(0, 1), pytest.raises(FormatError, match=rf"{LAYER}\.mlp\.down_proj: no target"):
        model.create("mlp.down_proj")


@pytest.mark.parametrize("transform", [{"type": "none"}, {"type": "hadamard", "block_size": 384}])
def test_a_weight_only_linear_multiplies_its_input_as_it_comes(transform: dict[str, Any]) -> None:
    model = Model(_with_group("down", input_activations={"num_bits": 16}, input_transform=transform))
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    with _rank(0, 1):
        layer = model.served("mlp.down_proj")
        found = layer(x)[0]
    assert not hasattr(layer, "input_clip_ratio")
    packed, scale = (model.tensors[f"{LAYER}.mlp.down_proj.{name}"] for name in ("weight_packed", "weight_scale"))
    inputs = InputQuant([], transform.get("block_size", 0), None, 16, False)
    assert torch.equal(found, oracles.linear(x, inputs, PackedWeight(packed, scale, None, None), None))
    assert model.config.summary.linears == {f"W4A16 ({backend('cpu').name})": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alibi_slopes": [0.5] * 4}, "alibi"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only"),
    ],
)
def test_attention_that_is_not_served_is_refused_by_name(
    changes: dict[str, Any], said: str, model_config: ModelConfig
) -> None:
    config = Model().config
    with _rank(0, 1, model_config), pytest.raises(FormatError, match=rf"{LAYER}\.self_attn\.attn: {said}"):
        Attention(4, 64, 0.125, 2, quant_config=config, prefix=f"{LAYER}.self_attn.attn", **changes)


def _embedding(model: Model) -> tuple[Any, Any]:
    hf = model.hf
    embed = vllm_embedding.VocabParallelEmbedding(
        hf["vocab_size"], hf["hidden_size"], quant_config=model.config, prefix="model.embed_tokens"
    )
    head = vllm_embedding.ParallelLMHead(
        hf["vocab_size"], hf["hidden_size"], quant_config=model.config, prefix="lm_head"
    )
    return embed, head.tie_weights(embed)


def test_a_tied_model_has_one_vocabulary_matrix_and_both_ends_undo_each_other() -> None:
    model = Model(tie_word_embeddings=True)
    matrix = model.tensors["model.embed_tokens.weight"].float()
    with _rank(0, 1):
        embed, head = _embedding(model)
        for name, param in embed.named_parameters():
            param.weight_loader(param, model.tensors[f"model.embed_tokens.{name}"])
        for layer in (embed, head):
            layer.quant_method.process_weights_after_loading(layer)
        assert head.weight.data_ptr() == embed.weight.data_ptr()
        ids = torch.tensor([3, 500, 7])
        rows = embed(ids)
        torch.testing.assert_close(rows, matrix[ids] @ model.tensors["model.embed_tokens.r1"])
        gain = model.tensors["model.embed_tokens.final_norm_weight"]
        torch.testing.assert_close(
            head.quant_method.apply(head, rows), (matrix[ids] * gain) @ matrix.T, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("leave_out", ["r1", "final_norm_weight"])
def test_a_promised_rotation_that_the_file_lacks_is_refused(leave_out: str) -> None:
    model = Model(tie_word_embeddings=True)
    with _rank(0, 1):
        embed, _ = _embedding(model)
        for name, param in embed.named_parameters():
            if name != leave_out:
                param.weight_loader(param, model.tensors[f"model.embed_tokens.{name}"])
        with pytest.raises(FormatError, match=rf"model\.embed_tokens\.{leave_out} is missing"):
            embed.quant_method.process_weights_after_loading(embed)


def test_logits_of_another_dtype_are_refused_where_the_embedding_is_rotated(model_config: ModelConfig) -> None:
    model_config.hf_config.head_dtype = "float32"
    model = Model(tie_word_embeddings=True)
    with _rank(0, 1, model_config), pytest.raises(FormatError, match=r"head_dtype torch\.float32 is not served"):
        vllm_embedding.VocabParallelEmbedding(
            512, 256, params_dtype=torch.bfloat16, quant_config=model.config, prefix="model.embed_tokens"
        )


def test_a_rotation_that_is_none_is_refused() -> None:
    model = Model(tie_word_embeddings=True)
    model.tensors["model.embed_tokens.r1"][0, 0] += 0.1
    with _rank(0, 1):
        embed, _ = _embedding(model)
        for name, param in embed.named_parameters():
            param.weight_loader(param, model.tensors[f"model.embed_tokens.{name}"])
        with pytest.raises(FormatError, match=r"r1 is not orthogonal"):
            embed.quant_method.process_weights_after_loading(embed)


def test_the_cache_reserves_the_bytes_of_its_cells() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from infoquant_vllm.attention import ATTENTION_BACKENDS

    plain = FullAttentionSpec(block_size=16, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    pages = {bits: backend.customize_spec(plain).page_size_bytes for bits, backend in ATTENTION_BACKENDS.items()}
    assert pages == {(4, 4): 48 * 72, (8, 8): 48 * 136, (8, 4): 48 * 104, (4, 8): 48 * 104}
    assert plain.page_size_bytes / pages[4, 4] >= 3.55
