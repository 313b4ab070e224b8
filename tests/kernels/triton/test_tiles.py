"""Which tile serves which product, and the file that says otherwise."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.common.interpreted import common, tiles, weights

LAYOUT = weights.layout(4096, 1)
ENTRY = {"arch": 90, "tokens": 16, "channels": 4096, "features": 4096, "grouped": False, "tile": [32, 16, 128, 2, 5, 4]}


@pytest.mark.parametrize("arch", tiles.TILE_TABLE)
@pytest.mark.parametrize("tokens", [1, 17, 33, 300, 4096])
@pytest.mark.parametrize(
    ("features", "segments", "group_size"),
    [(4096, 1, None), (4096, 2, 64), (576, 1, 64), (96, 3, 32), (96, 1, None), (13824, 1, 128), (14336, 8, 32)],
)
def test_steps_fill_the_features_and_every_split_has_some(
    arch: int, tokens: int, features: int, segments: int, group_size: int | None
) -> None:
    layout = weights.layout(features, segments, group_size)
    tile = tiles.linear_tile(arch, tokens, 4096, layout)
    assert layout.padded % tile.block_k == 0
    assert group_size is None or tile.block_k % layout.run == 0
    assert tile.splits <= layout.steps(tile.block_k)


@pytest.mark.parametrize("arch", tiles.TILE_TABLE)
@pytest.mark.parametrize(("features", "channels"), [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)])
@pytest.mark.parametrize("group_size", [None, 64])
def test_programs_fill_at_least_half_of_the_sms_whatever_the_tokens(
    arch: int, features: int, channels: int, group_size: int | None
) -> None:
    layout, sms = weights.layout(features, 1, group_size), tiles.TILE_TABLE[arch].sms
    for tokens in (1, 16, 17, 32, 33, 64, 65, 128, 256, 512, 8192):
        tile = tiles.linear_tile(arch, tokens, channels, layout)
        programs = -(-channels // tile.block_n) * -(-tokens // tile.block_m) * tile.splits
        assert 2 * programs > sms


@pytest.mark.parametrize("tokens", [17, 33, 65, 129, 1000])
def test_all_tokens_of_a_class_have_one_tile(tokens: int) -> None:
    last = tiles.token_class(tokens)
    assert last / 2 < tokens <= last
    layout = weights.layout(4096, 1, 64)
    assert tiles.linear_tile(90, tokens, 4096, layout) == tiles.linear_tile(90, last, 4096, layout)


def test_a_device_without_an_index_is_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        SimpleNamespace(major=9, minor=0, multi_processor_count=132),
        SimpleNamespace(major=10, minor=0, multi_processor_count=148),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    common._properties.cache_clear()
    for current, expected in ((0, (90, 132)), (1, (100, 148))):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        for device in (torch.device("cuda"), torch.device("cuda", current)):
            assert (common.architecture(device), tiles.multiprocessors(device)) == expected
    common._properties.cache_clear()


def test_a_gpu_between_two_of_the_table_takes_the_older_ones_tiles() -> None:
    assert tiles.linear_tile(103, 64, 4096, LAYOUT) == tiles.linear_tile(100, 64, 4096, LAYOUT)


def test_a_file_overrides_the_table_for_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps([ENTRY | {"tokens": 32, "tile": [64, 32, 64, 4, 3, 1]}, ENTRY]))
    table = tiles.linear_tile(90, 1, 2048, LAYOUT)
    monkeypatch.setenv(tiles.TILES, str(file))
    assert tiles.linear_tile(90, 16, 4096, LAYOUT) == (32, 16, 128, 2, 5, 4)
    assert tiles.linear_tile(90, 17, 4096, LAYOUT) == (64, 32, 64, 4, 3, 1)
    assert tiles.linear_tile(90, 1, 2048, LAYOUT) == table


def test_a_file_overrides_the_table_for_its_attention_beside_linears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiles.json"
    given = {"arch": 90, "kernel": "kv_decode", "head_size": 128, "group": 4, "tile": [16, 64, 2, 4]}
    file.write_text(json.dumps([ENTRY, given]))
    table = tiles.attention_tile(90, "kv_attention", 128, 4)
    monkeypatch.setenv(tiles.TILES, str(file))
    assert tiles.attention_tile(90, "kv_decode", 128, 4) == (16, 64, 2, 4)
    assert tiles.attention_tile(90, "kv_attention", 128, 4) == table
    assert tiles.linear_tile(90, 16, 4096, LAYOUT) == (32, 16, 128, 2, 5, 4)


@pytest.mark.parametrize("arch", tiles.TILE_TABLE)
@pytest.mark.parametrize("group", [1, 7, 12, 40])
def test_a_tile_has_rows_for_all_heads_of_a_kv_head(arch: int, group: int) -> None:
    for kernel in ("kv_attention", "kv_decode"):
        assert tiles.attention_tile(arch, kernel, 128, group).rows >= group


@pytest.mark.parametrize(
    "corrupted",
    [
        "[",
        '[{"arch": 90}]',
        json.dumps([ENTRY | {"tile": [33, 16, 128, 2, 5, 4]}]),
        json.dumps([ENTRY | {"tokens": 24}]),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, corrupted: str) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(corrupted)
    with pytest.raises(ValueError, match="INFOQUANT_TILES"):
        tiles.measured(str(file))
