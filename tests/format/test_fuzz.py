"""Nothing that a checkpoint's files say gets more than a FormatError out of what reads them.

Hypothesis (MacIver et al. 2019) spoils a sound checkpoint's config, index, and shard, the parsed ones and their bytes.
For a second each, the same every time; with FUZZ_SECONDS set (`make fuzz`) for so long each, and at random.
"""

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infoquant_vllm.format import INDEX_FILE, Checkpoint, FormatError
from tests.common.checkpoints import write_random
from tests.common.corpus import QUANTIZATION, SHARD

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
EXAMPLES = 150
SLOWEST = 5.0
"""Seconds in which a refusal must come."""

NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 4, 7, 8, 16, 64, 2**17, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf")]
)
NAMES = st.sampled_from(
    ["", "a", "q_proj", "lm_head", "model.norm.weight", "..", "/", "\0", "\ud800", "x" * 1000, SHARD]
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, NAMES, st.text(max_size=8), st.integers())
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=8), inner, max_size=3)
)


class Changes:
    """Draws changes of JSON data, of which each is at a random place: another value, none, one more, two exchanged."""

    def __init__(self, draw: Callable[[Any], Any]):
        self._draw = draw

    def apply(self, data: Any) -> Any:
        """`data`, changed in 1 to 3 places."""
        for _ in range(self._draw(st.integers(1, 3))):
            data = self._change(data)
        return data

    def _change(self, data: Any) -> Any:
        if not isinstance(data, dict | list) or not data or self._draw(st.integers(0, 9)) == 0:
            return self._draw(VALUES)
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key, how = self._draw(st.sampled_from(keys)), self._draw(st.sampled_from(["within", "away", "copy", "new"]))
        changed = data.copy()
        if how == "within":
            changed[key] = self._change(data[key])
        elif how == "away":
            del changed[key]
        elif how == "copy":
            changed[key] = data[self._draw(st.sampled_from(keys))]
        elif isinstance(changed, dict):
            changed[self._draw(NAMES)] = self._draw(VALUES)
        else:
            changed.insert(0, self._draw(VALUES))
        return changed


@st.composite
def changed_json(draw: Callable[[Any], Any], data: Any) -> bytes:
    """JSON of `data` with changes; now and then its bytes with some more."""
    text = json.dumps(Changes(draw).apply(data)).encode()
    return draw(changed_bytes(text)) if draw(st.integers(0, 9)) == 0 else text


@st.composite
def changed_bytes(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """`data` with a stretch of it replaced, or cut off."""
    start = draw(st.integers(0, len(data)))
    stop = draw(st.integers(start, min(len(data), start + 64)) | st.just(len(data)))
    return data[:start] + draw(st.binary(max_size=32)) + data[stop:]


@st.composite
def changed_shard(draw: Callable[[Any], Any], data: bytes) -> bytes:
    """A safetensors file with another header, or other bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    if draw(st.booleans()):
        return draw(changed_bytes(data))
    header = draw(changed_json(json.loads(data[8 : 8 + length])))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "sound"
    return write_random(folder, QUANTIZATION, tie_word_embeddings=True, num_hidden_layers=1)


STRATEGIES = {
    "config.json": lambda data: changed_json(json.loads(data)),
    INDEX_FILE: lambda data: changed_json(json.loads(data)),
    SHARD: changed_shard,
}


def read(folder: Path) -> str | None:
    """Read all of a checkpoint; returns what it is refused with."""
    try:
        checkpoint = Checkpoint(folder)
        for tensor in checkpoint.weight_map:
            checkpoint.tensor(tensor)
    except FormatError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_corrupted_file_is_read_or_refused(name: str, sound: Path) -> None:
    file = sound / name
    whole, end = file.read_bytes(), time.monotonic() + SECONDS

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=not SECONDS,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[name](whole))
    def spoil(data: bytes) -> None:
        file.write_bytes(data)
        started = time.process_time()
        refusal = read(sound)
        assert refusal is None or str(sound) in refusal
        assert time.process_time() - started < SLOWEST

    try:
        spoil()
        while time.monotonic() < end:
            spoil()
    finally:
        file.write_bytes(whole)
