"""Log one line at start-up: which kernels serve the layers, and the memory saved."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import current_platform

from infoquant_vllm.kernels.cpu.library import library
from infoquant_vllm.kernels.dispatch import FORCE, forced_kernels

if TYPE_CHECKING:
    from infoquant_vllm.adapters import AdapterGuard

logger = init_logger("vllm.infoquant")

MIB = 2**20


@dataclass
class Summary:
    """Count a model's quantized layers as they are created and finished, and log after the last."""

    pending: int = 0
    linears: Counter[str] = field(default_factory=Counter)
    mixtures: Counter[str] = field(default_factory=Counter)
    caches: Counter[str] = field(default_factory=Counter)
    held_bytes: int = 0
    bf16_bytes: int = 0
    kv_bytes_per_token_head: int = 0
    kv_bf16_bytes_per_token_head: int = 0
    lm_head_kind: str = ""
    lm_head_bytes: int = 0
    lm_head_bf16_bytes: int = 0
    adapters: "AdapterGuard | None" = None

    def expect(self) -> None:
        """Expect one more layer to report."""
        self.pending += 1

    def dropped(self) -> None:
        """Stop expecting a layer that vLLM has dropped."""
        self._finish()

    def linear(self, kind: str, held: int, bf16: int) -> None:
        """Report a finished linear: its kind ("W4A4 (Triton)"), bytes held and bytes in bf16."""
        self.linears[kind] += 1
        self.held_bytes += held
        self.bf16_bytes += bf16
        self._finish()

    def experts(self, kind: str, count: int, held: int, bf16: int) -> None:
        """Report a finished mixture of experts, like a linear; count: of its experts on this rank."""
        self.mixtures[kind] += count
        self.held_bytes += held
        self.bf16_bytes += bf16
        self._finish()

    def cache(self, kind: str, held: int, bf16: int) -> None:
        """Report a finished attention layer: its kind ("KV4 (torch)"), bytes per token and kv-head, those in bf16."""
        self.caches[kind] += 1
        self.kv_bytes_per_token_head, self.kv_bf16_bytes_per_token_head = held, bf16
        self._finish()

    def lm_head(self, kind: str, held: int, bf16: int) -> None:
        """Report a finished embedding or lm_head, which may share one matrix: its kind ("W8A16 (torch)") and bytes."""
        self.lm_head_kind, self.lm_head_bytes, self.lm_head_bf16_bytes = kind, held, bf16
        self._finish()

    def _finish(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            if self.adapters is not None:
                self.adapters.check()
            logger.info("infoquant: %s", self.line())

    def line(self) -> str:
        """Return the line."""
        parts = [f"{count} linears {kind}" for kind, count in self.linears.items()]
        parts += [f"{count} experts {kind}" for kind, count in self.mixtures.items()]
        parts += [f"{count} caches {kind}" for kind, count in self.caches.items()]
        if self.linears or self.mixtures:
            held, bf16 = self.held_bytes / MIB, self.bf16_bytes / MIB
            parts.append(f"linear weights hold {held:.1f} MiB, {bf16:.1f} MiB in bf16 ({held / bf16:.3f} x)")
        if self.lm_head_kind:
            held, bf16 = self.lm_head_bytes / MIB, self.lm_head_bf16_bytes / MIB
            parts.append(f"lm_head {self.lm_head_kind} holds {held:.1f} MiB, {bf16:.1f} MiB in bf16")
        if self.caches:
            gain = self.kv_bf16_bytes_per_token_head / self.kv_bytes_per_token_head
            parts.append(
                f"{self.kv_bytes_per_token_head} bytes per token and kv-head of the cache, "
                f"{gain:.2f} x the tokens of bf16"
            )
        if forced_kernels() is not None:
            parts.append(f"kernels forced by {FORCE}={forced_kernels()}")
        elif library().problem and current_platform.is_cpu():
            parts.append(f"no native kernels ({library().problem})")
        return ", ".join(parts)
