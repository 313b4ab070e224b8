"""The steps of a GPU run: stages in order of importance, their command lines and time limits."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

STAGES = ("smoke", "tests", "kernels", "sanitize", "answer", "served", "profile")
WORKERS = 12
TEST_SECONDS = 60
"""For one test."""
TESTS = "tests/kernels/triton/test_*.py"
DRY_TEST = "tests/kernels/triton/test_kv_store.py::test_ranges_at_their_limits_are_stored_alike"
KERNELS = {"linears": 110, "attention": 70, "layer": 40, "vllm_layers": 80, "experts": 80}
"""Seconds by module."""
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_ERROR = "9"
NCU_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "WarpStateStats")
INTERPRETED = {"TRITON_INTERPRET": "1"}
SECONDS = "{seconds}"
"""In a command: the time that the step has when it starts."""


@dataclass(frozen=True)
class Step:
    """A command with a time limit; `missing` says why it cannot run here."""

    stage: str
    name: str
    command: tuple[str, ...]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run is given: its output folder, the checkpoint that `answer` serves, and whether it is a dry run."""

    output: Path
    checkpoint: Path | None
    dry_run: bool

    @property
    def rows(self) -> Path:
        """Return the file of all rows."""
        return self.output / "rows.jsonl"

    def steps(self, stages: tuple[str, ...]) -> Iterator[Step]:
        """Yield the steps of `stages`, in the order of STAGES."""
        makers = {
            "smoke": self._smoke,
            "tests": self._tests,
            "kernels": self._kernels,
            "sanitize": self._sanitize,
            "answer": self._answer,
            "served": self._served,
            "profile": self._profile,
        }
        for stage in STAGES:
            if stage in stages:
                yield from makers[stage]()

    def _module(self, name: str, *arguments: str, rows: Path | None = None) -> tuple[str, ...]:
        dry = ("--dry-run",) if self.dry_run else ()
        common = ("--rows", str(rows or self.rows), "--seconds", SECONDS, *dry)
        return sys.executable, "-m", f"benchmarks.gpu.{name}", *common, *arguments

    def _environment(self) -> dict[str, str]:
        return dict(INTERPRETED) if self.dry_run else {}

    def _smoke(self) -> Iterator[Step]:
        yield Step("smoke", "smoke", self._module("smoke"), 90, self._environment())

    def _tests(self) -> Iterator[Step]:
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", f"--timeout={TEST_SECONDS}"]
        command += [f"--junitxml={self.output / 'tests.xml'}", "-o", "addopts=-p no:cacheprovider"]
        if self.dry_run:
            yield Step("tests", "tests", (*command, DRY_TEST), 150, {"INFOQUANT_TEST_DEVICE": "cpu"})
            return
        files = sorted(str(file) for file in Path().glob(TESTS))
        command += [f"--numprocesses={WORKERS}", *files]
        yield Step("tests", "tests", tuple(command), 150, {"INFOQUANT_TEST_DEVICE": "cuda"})

    def _kernels(self) -> Iterator[Step]:
        for name, seconds in KERNELS.items():
            yield Step("kernels", name, self._module(name), seconds, self._environment())

    def _sanitize(self) -> Iterator[Step]:
        tool = _tool("compute-sanitizer")
        for kind in SANITIZERS:
            inner = self._module("smoke", rows=self.output / f"{kind}.jsonl")
            command = (tool or "compute-sanitizer", "--tool", kind, "--error-exitcode", SANITIZER_ERROR, *inner)
            missing = "" if tool and not self.dry_run else "no compute-sanitizer here, or a dry run"
            yield Step("sanitize", kind, command, 90, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, missing)

    def _answer(self) -> Iterator[Step]:
        command = self._module("answer", str(self.checkpoint))
        missing = "" if self.checkpoint and not self.dry_run else "no --checkpoint, or a dry run"
        yield Step("answer", "answer", command, 180, missing=missing)

    def _served(self) -> Iterator[Step]:
        models = Path(tempfile.gettempdir()) / "infoquant-models"
        environment = {"CUDA_VISIBLE_DEVICES": ""} if self.dry_run else {}
        yield Step("served", "served", self._module("served", "--models", str(models)), 570, environment)

    def _profile(self) -> Iterator[Step]:
        tool = _tool("ncu")
        command = [tool or "ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv"]
        command += [
            "--log-file",
            str(self.output / "ncu.csv"),
            "--kernel-name",
            "regex:gemm|rotate|kv_|reduce|align|combine",
        ]
        command += [word for section in NCU_SECTIONS for word in ("--section", section)]
        missing = "" if tool and not self.dry_run else "no ncu here, or a dry run"
        yield Step("profile", "profile", (*command, *self._module("profile")), 120, missing=missing)


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
