"""The Triton kernels of the KV cache compiled for GPUs that are not here; what follows about speed is a prediction."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.interpreted import kv4_attention

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a program may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
BYTES_PER_CYCLE = {80: 2039 / 108 / 1.41, 90: 3350 / 132 / 1.83}
"""Of DRAM for each multiprocessor of an A100 (80 GB, SXM) and an H100 (SXM), from their data sheets."""
SHAPES = {
    86: "llama-2-13b",
    80: "llama-3-70b tp 4",
    89: "qwen2.5-7b",
    120: "heads of 64",
    90: "heads of 96",
    100: "heads of 256",
}


def compiled(folder: Path, *words: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("triton"), "llama-3-8b", *map(str, SHARED))


def assert_fits(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["stack"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED[row["arch"]] * 1024, row
        if row["kernel"] in ("kv4_attention", "kv4_decode"):
            assert row["products"], f"no INT8 tensor cores: {row}"


def test_all_of_llama_3_8b_fits_every_architecture(llama: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in llama} == set(SHARED)
    assert_fits(llama)


@pytest.mark.parametrize("arch", SHAPES)
def test_other_shapes_fit(arch: int, tmp_path: Path) -> None:
    assert_fits(compiled(tmp_path, SHAPES[arch], str(arch)))


@pytest.mark.parametrize("arch", BYTES_PER_CYCLE)
def test_decoding_is_bound_by_dram(arch: int, llama: list[dict[str, Any]]) -> None:
    """Prediction: a chunk's instructions, one a cycle in each of four schedulers, take less time than its bytes."""
    row = next(row for row in llama if (row["arch"], row["kernel"]) == (arch, "kv4_decode"))
    issue = row["loop"] * row["warps"] / 4
    dram = 128 * 136 / BYTES_PER_CYCLE[arch]
    print(f"sm_{arch}: {issue:.0f} cycles of issue, {dram:.0f} of DRAM (predicted)")
    assert issue < 0.8 * dram


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(32, 8, 128), (40, 40, 128), (16, 2, 128), (28, 4, 128), (9, 3, 64)]
)
def test_decoding_reads_little_beside_the_cache(heads: int, kv_heads: int, size: int) -> None:
    """Bytes at 16,384 tokens: pages, block tables of every part's three readings, queries, and partial sums again."""
    context, chunk, group, parts = 16384, 128, heads // kv_heads, kv4_attention.parts_of(kv_heads)
    cache = context * kv_heads * (size + 8)
    used = -(-context // chunk // max(-(-context // chunk // parts), group))
    assert used <= parts
    tables, queries = kv_heads * context // 16 * 4, used * heads * size * 2
    partial = used * heads * (size + 2) * 4
    print(f"{(cache + tables + queries + partial) / cache:.4f} of the cache's bytes (predicted), {used} parts")
    assert cache + tables + queries + partial <= 1.05 * cache
