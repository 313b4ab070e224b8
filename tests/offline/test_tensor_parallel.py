"""`max_tp_size` keeps rotations and groups within the shard of one tensor-parallel rank."""

from pathlib import Path
from typing import Any

import pytest
import torch

from infoquant_vllm.format import ROW_PARALLEL_SITES, SITES, ModelShape, check_tp_divisible
from offline import PRESETS, ToolError, quantize
from offline.model.source import Source
from offline.progress import silent
from offline.recipe import Recipe, Site, Sites
from offline.tensor_parallel import common_share, tp_sizes
from tests.common.tiny import VOCAB_SIZE, write_source
from tests.offline.stages.test_fold import LARGEST_RELATIVE_ERROR, recipe_for, relative_error, transforms_for


def shape(heads: int, kv_heads: int, intermediate: int, head_dim: int = 64) -> ModelShape:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate}
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    fixed: dict[str, Any] = named | {"num_hidden_layers": 1, "vocab_size": 512}
    return ModelShape.from_hf(fixed | sizes | {"hidden_size": heads * head_dim, "head_dim": head_dim})


SMOLLM2, LLAMA_8B = shape(9, 3, 1536), shape(32, 8, 14336, 128)


def test_ranks_share_heads_and_features_evenly() -> None:
    assert tp_sizes(SMOLLM2, 4) == [1, 3]
    assert tp_sizes(LLAMA_8B, 16) == [1, 2, 4, 8, 16]
    assert tp_sizes(shape(6, 2, 768), 6) == [1, 2, 6]


@pytest.mark.parametrize(("model", "most", "share"), [(SMOLLM2, 4, 512), (LLAMA_8B, 8, 1792), (LLAMA_8B, 1, 14336)])
def test_common_share_is_split_by_no_tp_size(model: ModelShape, most: int, share: int) -> None:
    assert common_share(model.intermediate_size, model, most) == share


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_supports_four_ranks(preset: str) -> None:
    groups = PRESETS[preset].model_copy(update={"max_tp_size": 4}).quantization_config(LLAMA_8B).config_groups
    for site in ROW_PARALLEL_SITES:
        _, features = LLAMA_8B.linears()[f"model.layers.0.{SITES[site][0]}"]
        for workers in (1, 2, 4):
            check_tp_divisible(groups[site], features, workers)
    transform = groups["down"].input_transform
    assert transform.block_size == (3584 if transform.type == "hadamard" else None)


def test_per_token_quantization_becomes_per_shard_where_features_are_split() -> None:
    token = Site()
    recipe = Recipe(name="t", transform="none", rounding="rtn", sites=Sites(o=token, down=token), max_tp_size=2)
    assert [recipe.input_activations(site, LLAMA_8B).group_size for site in SITES] == [None, 2048, None, 7168]


def test_model_rotated_for_two_ranks_computes_what_its_source_does(tmp_path: Path) -> None:
    source = Source.open(write_source(tmp_path / "source"))
    tokens = torch.randint(3, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(2))
    recipe = recipe_for("hadamard").model_copy(update={"max_tp_size": 2})
    assert recipe.input_transform("down", source.shape).block_size == source.shape.intermediate_size // 2
    assert relative_error(source, transforms_for(source, recipe, tokens), recipe, tokens) < LARGEST_RELATIVE_ERROR


def test_tp_size_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="max_tp_size is 0"):
        quantize(tmp_path, tmp_path / "out", max_tp_size=0, progress=silent)


def test_groups_that_ranks_would_split_are_refused_before_any_work(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", intermediate_size=320)
    message = r"down_proj with max_tp_size 2: weight group_size 64 does not divide the 160 of 320 input features"
    with pytest.raises(ToolError, match=message):
        quantize(source, tmp_path / "out", preset="best", max_tp_size=2, dry_run=True, progress=silent)
