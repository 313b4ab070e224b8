"""Every checkpoint of the corpus is refused: by name, at once, and with no other error than ours."""

import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from infoquant_vllm.format import Checkpoint, FormatError
from offline.evaluate.verify import verify
from tests.common.corpus import (
    AROUND,
    OTHERS,
    SHARD,
    TENSORS,
    Case,
    around_cases,
    cases,
    mixture_cases,
    other_cases,
    write_around_sound,
    write_other_sound,
    write_sound,
    write_sound_mixture,
)

CASES, OTHER_CASES, AROUND_CASES, MIXTURE_CASES = cases(), other_cases(), around_cases(), mixture_cases()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound(tmp_path_factory.mktemp("corpus") / "sound")


@pytest.fixture(scope="module")
def other_sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other_sound(tmp_path_factory.mktemp("others") / "sound")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sound_mixture(tmp_path_factory.mktemp("corpus") / "mixture")


@pytest.fixture(scope="module")
def around_sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_around_sound(tmp_path_factory.mktemp("around") / "sound")


def read(folder: Path) -> int:
    """All that a server or `infoquant verify` reads."""
    checkpoint = Checkpoint(folder)
    return sum(checkpoint.tensor(name).numel() for name in checkpoint.weight_map)


def test_the_sound_one_is_read_and_has_every_kind_of_tensor(sound: Path) -> None:
    assert read(sound) > 0
    assert set(TENSORS.values()) <= Checkpoint(sound).weight_map.keys()
    assert len(CASES) >= 60


def test_the_sound_one_with_norms_behind_is_read_and_has_every_other_tensor(other_sound: Path) -> None:
    assert read(other_sound) > 0
    assert set(OTHERS.values()) <= Checkpoint(other_sound).weight_map.keys()


def test_the_sound_mixture_of_experts_is_read(mixture: Path) -> None:
    assert read(mixture) > 0


def test_the_sound_one_with_norms_around_is_read_and_may_have_gains_of_one(around_sound: Path, tmp_path: Path) -> None:
    assert read(around_sound) > 0
    assert set(AROUND.values()) <= Checkpoint(around_sound).weight_map.keys()
    folder = shutil.copytree(around_sound, tmp_path / "gains of one")
    tensors = load_file(folder / SHARD)
    save_file({name: t * 0 if "norm" in name else t for name, t in tensors.items()}, folder / SHARD)
    assert read(folder) > 0


@pytest.mark.parametrize("name", CASES)
def test_a_broken_one_is_refused(name: str, sound: Path, tmp_path: Path) -> None:
    assert_refused(CASES[name], sound, tmp_path)


@pytest.mark.parametrize("name", OTHER_CASES)
def test_a_broken_one_with_norms_behind_is_refused(name: str, other_sound: Path, tmp_path: Path) -> None:
    assert_refused(OTHER_CASES[name], other_sound, tmp_path)


@pytest.mark.parametrize("name", MIXTURE_CASES)
def test_a_broken_mixture_of_experts_is_refused(name: str, mixture: Path, tmp_path: Path) -> None:
    assert_refused(MIXTURE_CASES[name], mixture, tmp_path)


@pytest.mark.parametrize("name", AROUND_CASES)
def test_a_broken_one_with_norms_around_is_refused(name: str, around_sound: Path, tmp_path: Path) -> None:
    assert_refused(AROUND_CASES[name], around_sound, tmp_path)


def assert_refused(case: Case, sound: Path, tmp_path: Path) -> None:
    """By name, at once, when it is read and by `verify`."""
    folder = shutil.copytree(sound, tmp_path / "broken")
    case.spoil(folder)
    started = time.monotonic()
    with pytest.raises(FormatError) as refused:
        read(folder)
    assert time.monotonic() - started < 5
    for words in (str(folder), *case.says):
        assert words in str(refused.value)
    assert not verify(folder).passed
