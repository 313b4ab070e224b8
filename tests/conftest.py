"""Fixtures of real models, made once and kept in `.demo/`; the order of tests; failure reports with server logs."""

import os
from collections.abc import Generator
from pathlib import Path

import tests.common.interpreted  # isort: skip # noqa: F401 (before anything else imports triton)
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.common.models import language_reference, quantized, source_model
from benchmarks.common.server import Server
from offline.presets import PRESETS
from offline.recipe import CalibrationSize, Psot
from offline.text import text_windows
from tests.common.engine import Engine, running_engine

LOG_TAIL = 3000
LONGEST = (
    *("triton/test_compiled", "server/test_equality", "offline/test_memory", "offline/test_upcycled"),
    *("tests/server/", "tests/engine/"),
)
"""Files of tests by duration; the second makes the quantized model that other servers load."""


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bf16."""
    return source_model()


@pytest.fixture(scope="session")
def fast(smollm2: Path) -> Path:
    """SmolLM2 at W4A4KV4 with the preset `fast`, in a tenth of its steps and calibration text, enough to serve it."""
    update = {"calibration": CalibrationSize(sequences=24, sequence_length=128), "psot": Psot(steps=50)}
    short = PRESETS["fast"].model_copy(update=update)
    recipe = smollm2.with_name("fast-short.yaml")
    recipe.write_text(short.dump())
    return quantized("fast-short", "--recipe", recipe)


@pytest.fixture(scope="session")
def windows(smollm2: Path) -> torch.Tensor:
    """English prose no model here was calibrated on: int64 [4 windows, 512 tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return text_windows(str(language_reference()), tokenizer, len(tokenizer), 4, 512, seed=0)


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels that Triton has compiled in this run, of all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "triton-cache"


@pytest.fixture(scope="session")
def engine() -> Generator[Engine]:
    """vLLM's engine, for one model after another."""
    with running_engine() as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take minutes: a worker that ends with one would leave the others idle."""
    places = {item: [part in item.nodeid for part in LONGEST] for item in items}
    items.sort(key=lambda item: places[item].index(True) if any(places[item]) else len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of a server's log under a failed test that used it."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Server):
                report.sections.append((f"end of {value.log}", value.log.read_text(errors="replace")[-LOG_TAIL:]))
    return report
