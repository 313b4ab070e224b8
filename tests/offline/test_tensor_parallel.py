"""`max_tp_size` keeps rotations and groups within the shard of one tensor-parallel rank."""

from pathlib import Path
from typing import Any

import pytest
import torch

from infoquant_vllm.format import ROW_PARALLEL_SITES, SITES, ModelShape, check_tp_divisible
from offline import PRESETS, ToolError, quantize
from offline.formats import Site, Sites
from offline.model.source import Source
from offline.progress import silent
from offline.recipe import Recipe
from offline.tensor_parallel import common_shard_size, tp_sizes
from tests.common.tiny import VOCAB_SIZE, write_source
from tests.offline.stages.test_fold import LARGEST_RELATIVE_ERROR, recipe_for, relative_error, transforms_for


def shape(heads: int, kv_heads: int, intermediate: int, head_dim: int = 64) -> ModelShape:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate}
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    fixed: dict[str, Any] = named | {"num_hidden_layers": 1, "vocab_size": 512}
    return ModelShape.from_hf(fixed | sizes | {"hidden_size": heads * head_dim, "head_dim": head_dim})


SMOLLM2, LLAMA_8B = shape(9, 3, 1536), shape(32, 8, 14336, 128)


def test_tp_sizes_shard_heads_and_features_evenly() -> None:
    assert tp_sizes(SMOLLM2, 4) == [1, 3]
    assert tp_sizes(LLAMA_8B, 16) == [1, 2, 4, 8, 16]
    assert tp_sizes(shape(6, 2, 768), 6) == [1, 2, 6]


@pytest.mark.parametrize(
    ("model", "max_tp_size", "shard"), [(SMOLLM2, 4, 512), (LLAMA_8B, 8, 1792), (LLAMA_8B, 1, 14336)]
)
def test_the_common_shard_is_split_by_no_tp_size(model: ModelShape, max_tp_size: int, shard: int) -> None:
    assert common_shard_size(model.intermediate_size, model, max_tp_size) == shard


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_made_for_tp_size_four(preset: str) -> None:
    groups = PRESETS[preset].model_copy(update={"max_tp_size": 4}).quantization_config(LLAMA_8B).config_groups
    if preset == "kv4":
        assert not groups
        return
    for site in ROW_PARALLEL_SITES:
        _, features = LLAMA_8B.linears()[f"model.layers.0.{SITES[site][0]}"]
        for tp_size in (1, 2, 4):
            check_tp_divisible(groups[site], features, tp_size)
    transform = groups["down"].input_transform
    assert transform.block_size == (3584 if transform.type == "hadamard" else None)


def test_a_range_per_token_becomes_one_per_shard_in_row_parallel_linears() -> None:
    token = Site()
    recipe = Recipe(name="t", transform="none", rounding="rtn", sites=Sites(o=token, down=token), max_tp_size=2)
    assert [recipe.input_activations(site, LLAMA_8B, None).segment_size for site in SITES] == [None, 2048, None, 7168]


def test_a_model_rotated_for_tp_size_two_computes_what_its_source_does(tmp_path: Path) -> None:
    source = Source.open(write_source(tmp_path / "source"))
    tokens = torch.randint(3, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(2))
    recipe = recipe_for("hadamard").model_copy(update={"max_tp_size": 2})
    assert recipe.input_transform("down", source.shape).block_size == source.shape.intermediate_size // 2
    assert relative_error(source, transforms_for(source, recipe, tokens), recipe, tokens) < LARGEST_RELATIVE_ERROR


def test_tp_size_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="max_tp_size is 0"):
        quantize(tmp_path, tmp_path / "out", max_tp_size=0, progress=silent)


def test_groups_across_ranks_are_refused_before_anything_runs(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", intermediate_size=320)
    message = r"down_proj with max_tp_size 2: weight group_size 64 does not divide the 160 of 320 input features"
    with pytest.raises(ToolError, match=message):
        quantize(source, tmp_path / "out", preset="best", max_tp_size=2, dry_run=True, progress=silent)
