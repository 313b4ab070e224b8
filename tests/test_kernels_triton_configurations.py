"""Which tile serves which product, and the file that says otherwise."""

import json
from pathlib import Path

import pytest

from tests.interpreted import configurations, weights

LAYOUT = weights.layout(4096, 1, 4)
ENTRY = {"arch": 90, "tokens": 16, "channels": 4096, "features": 4096, "group_size": 0, "tile": [32, 16, 128, 2, 5, 4]}


@pytest.mark.parametrize("arch", configurations.CHOICES)
@pytest.mark.parametrize("tokens", [1, 17, 33, 4096])
@pytest.mark.parametrize(("features", "groups"), [(4096, 1), (4096, 32), (576, 9), (96, 3), (13824, 1)])
def test_steps_fill_the_features_and_every_split_has_some(arch: int, tokens: int, features: int, groups: int) -> None:
    layout = weights.layout(features, groups, 4)
    tile = configurations.linear_tile(arch, tokens, 4096, layout, corrected=False)
    assert layout.padded % tile.block_k == 0 or layout.group_size % tile.block_k == 0
    assert tile.splits <= layout.steps(tile.block_k)
    assert (tile.splits > 1) <= (tokens <= configurations.FEW_TOKENS)


def test_a_gpu_between_two_of_the_table_takes_the_older_ones_tiles() -> None:
    assert configurations.linear_tile(103, 64, 4096, LAYOUT, False) == configurations.linear_tile(
        100, 64, 4096, LAYOUT, False
    )


def test_a_file_overrides_the_table_for_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps([ENTRY | {"tokens": 32, "tile": [64, 32, 64, 4, 3, 1]}, ENTRY]))
    table = configurations.linear_tile(90, 1, 2048, LAYOUT, False)
    monkeypatch.setenv(configurations.TILES, str(file))
    assert configurations.linear_tile(90, 16, 4096, LAYOUT, False) == (32, 16, 128, 2, 5, 4)
    assert configurations.linear_tile(90, 17, 4096, LAYOUT, False) == (64, 32, 64, 4, 3, 1)
    assert configurations.linear_tile(90, 1, 2048, LAYOUT, False) == table


@pytest.mark.parametrize("spoilt", ["[", '[{"arch": 90}]', json.dumps([ENTRY | {"tile": [33, 16, 128, 2, 5, 4]}])])
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, spoilt: str) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(spoilt)
    with pytest.raises(ValueError, match="INFOQUANT_TILES"):
        configurations.measured(str(file))
