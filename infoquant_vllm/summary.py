"""One line at start-up: which kernel serves which layers, and what that saves."""

from collections import Counter
from dataclasses import dataclass, field

from vllm.logger import init_logger
from vllm.platforms import current_platform

from infoquant_vllm.kernels.cpu.library import library
from infoquant_vllm.ops.table import FORCE, forced_family

logger = init_logger("vllm.infoquant")

MIB = 2**20


@dataclass
class Summary:
    """Counts a model's quantized layers as they are created and finished; logs after the last."""

    pending: int = 0
    linears: Counter[str] = field(default_factory=Counter)
    caches: Counter[str] = field(default_factory=Counter)
    held_bytes: int = 0
    bf16_bytes: int = 0
    kv_bytes_per_token_head: int = 0
    cell_bf16_bytes: int = 0
    vocabulary_kind: str = ""
    vocabulary_bytes: int = 0
    vocabulary_bf16_bytes: int = 0

    def expect(self) -> None:
        """One more layer will report."""
        self.pending += 1

    def dropped(self) -> None:
        """A layer that vLLM has dropped will not report."""
        self._finish()

    def linear(self, kind: str, held: int, bf16: int) -> None:
        """A finished linear: its kind ("W4A4 (oneDNN int8)"), bytes held and bytes in bf16."""
        self.linears[kind] += 1
        self.held_bytes += held
        self.bf16_bytes += bf16
        self._finish()

    def cache(self, kind: str, cell: int, bf16: int) -> None:
        """A finished attention layer: its kind ("KV4 (torch)"), bytes per token and kv-head and those in bf16."""
        self.caches[kind] += 1
        self.kv_bytes_per_token_head, self.cell_bf16_bytes = cell, bf16
        self._finish()

    def vocabulary(self, kind: str, held: int, bf16: int) -> None:
        """A finished embedding or lm_head, which may share one matrix: its kind ("W8A16 (torch)") and bytes."""
        self.vocabulary_kind, self.vocabulary_bytes, self.vocabulary_bf16_bytes = kind, held, bf16
        self._finish()

    def _finish(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            logger.info("infoquant: %s", self.line())

    def line(self) -> str:
        """The line's text."""
        parts = [f"{count} linears {kind}" for kind, count in self.linears.items()]
        parts += [f"{count} caches {kind}" for kind, count in self.caches.items()]
        if self.linears:
            held, bf16 = self.held_bytes / MIB, self.bf16_bytes / MIB
            parts.append(f"linear weights hold {held:.1f} MiB, {bf16:.1f} MiB in bf16 ({held / bf16:.3f} x)")
        if self.vocabulary_kind:
            held, bf16 = self.vocabulary_bytes / MIB, self.vocabulary_bf16_bytes / MIB
            parts.append(f"vocabulary {self.vocabulary_kind} holds {held:.1f} MiB, {bf16:.1f} MiB in bf16")
        if self.caches:
            gain = self.cell_bf16_bytes / self.kv_bytes_per_token_head
            parts.append(
                f"{self.kv_bytes_per_token_head} bytes per token and kv-head of the cache, "
                f"{gain:.2f} x the tokens of bf16"
            )
        if forced_family() is not None:
            parts.append(f"kernels as {FORCE}={forced_family()} has them")
        elif library().problem and current_platform.is_cpu():
            parts.append(f"no native kernels ({library().problem})")
        return ", ".join(parts)
