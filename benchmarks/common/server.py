"""Start `vllm serve` on a free loopback port, wait until it answers, and stop all of its processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil
from openai import OpenAI

from benchmarks.common.programs import VLLM

START_SECONDS = 600
GRACE_SECONDS = 45  # a server that is compiling honors SIGTERM late
LOG_TAIL = 4000


class ServerError(RuntimeError):
    """Say why a server did not start; the message ends with the end of its log."""


@dataclass
class Server:
    """A `vllm serve` process, leader of a process group that holds all of its workers."""

    model: Path
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """The address without a path."""
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> OpenAI:
        """Return a client that does not retry."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def kv_tokens(self) -> int:
        """Read the number of tokens that fit into the KV cache from the server's log."""
        return int(self.logged(r"KV cache size: ([\d,]+) tokens").replace(",", ""))

    def logged(self, pattern: str) -> str:
        """Return the first group of the first match of `pattern` in the server's log."""
        found = re.search(pattern, self.log.read_text(errors="replace"))
        if found is None:
            raise ServerError(f"{self.log}: no line matches {pattern!r}")
        return found[1]

    def metric(self, name: str) -> float:
        """Read a counter from /metrics, summed over its labels."""
        return sum(self.metrics(name))

    def metrics(self, name: str) -> list[float]:
        """Read a counter from /metrics, for each set of labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        return [float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line)]

    def is_healthy(self) -> bool:
        """Return whether /health answers 200."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def members(self) -> list[psutil.Process]:
        """Return the live processes of the server's group."""
        return [p for p in psutil.process_iter() if _group(p) == self.process.pid]

    def gone_within(self, seconds: float) -> bool:
        """Wait for all processes of the group to end; return False if one is left after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def stop(self) -> None:
        """Send SIGTERM to the server, and SIGKILL to its group after GRACE_SECONDS or at a second Ctrl-C."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.gone_within(GRACE_SECONDS)
        finally:
            for member in self.members():
                member.kill()
            self.process.wait()


@contextmanager
def serve(
    model: Path,
    log: Path,
    *arguments: str,
    kv_gib: int = 1,
    environment: Mapping[str, str] = MappingProxyType({}),
    seconds: float = START_SECONDS,
) -> Iterator[Server]:
    """Serve `model` until the block is left; it is ready to answer when the block begins.

    Args:
        model: checkpoint folder.
        log: file for the server's output.
        arguments: further arguments of `vllm serve`.
        kv_gib: memory for the KV cache of a CPU, GiB.
        environment: further variables.
        seconds: how long the start may take.

    Raises ServerError if the server exits or does not answer within `seconds`.
    """
    with started(model, log, *arguments, kv_gib=kv_gib, environment=environment) as server:
        wait_until_healthy(server, seconds)
        yield server


@contextmanager
def started(
    model: Path, log: Path, *arguments: str, kv_gib: int = 1, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Server]:
    """Serve `model` until the block is left, which may begin before the server answers (see `serve`)."""
    server = start(model, log, *arguments, kv_gib=kv_gib, environment=environment)
    try:
        yield server
    finally:
        server.stop()


def start(
    model: Path, log: Path, *arguments: str, kv_gib: int = 1, environment: Mapping[str, str] = MappingProxyType({})
) -> Server:
    """Start a server and do not wait; the caller stops it."""
    port = free_port()
    command = [*VLLM, "serve", str(model), "--host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**vllm_environment(kv_gib), **environment},
            start_new_session=True,
        )
    return Server(model, port, log, process)


def vllm_environment(kv_gib: int = 1) -> dict[str, str]:
    """Return the environment of a process that runs vLLM: GiB for its KV cache, no usage statistics, no downloads."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": str(kv_gib), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | settings


def wait_until_healthy(server: Server, seconds: float = START_SECONDS) -> None:
    """Poll /health; raises ServerError with the end of the log if the server exits or hangs."""
    deadline = time.monotonic() + seconds
    while not server.is_healthy():
        exited = server.process.poll()
        if exited is not None or time.monotonic() > deadline:
            what = f"exited with code {exited}" if exited is not None else f"did not answer in {seconds:.0f} s"
            tail = server.log.read_text(errors="replace")[-LOG_TAIL:]
            raise ServerError(f"vllm serve {server.model} {what}; the end of {server.log}:\n{tail}")
        time.sleep(0.5)


def stop_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that `serve` blocks stop their servers."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _group(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None
