"""The GPUs that predictions are for: one of each architecture, figures of its maker's data sheet."""

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Machine:
    """A GPU. Rates are dense, clocks are boost clocks: no kernel reaches all of it."""

    name: str
    arch: int
    sms: int
    clock: float
    """cycles per second"""
    dram: float
    """bytes per second"""
    macs: int
    """of int8 on tensor cores, per cycle and SM"""
    shared_per_sm: int
    """bytes; 1 KiB of them is kept for each program"""
    warps_per_sm: int
    instructions: str
    """How Triton reaches the INT8 tensor cores: part of the PTX."""
    l2: int = 32
    """bytes per cycle and SM from the L2 cache: assumed, half of what an SM can take; no data sheet has it"""

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a program can have."""
        return self.shared_per_sm - 1024

    def occupancy(self, warps: int, registers: int, shared: int) -> int:
        """Programs of so many warps, registers per thread and bytes of shared memory on an SM at once."""
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = 65536 // (per_warp * warps)
        return min(by_registers, self.shared_per_sm // (shared + 1024), self.warps_per_sm // warps, 32)


MMA, WGMMA, TCGEN05 = "mma.sync.aligned.m16n8k32.row.col", "wgmma.mma_async.sync.aligned.m64n", "tcgen05.mma"
MACHINES = MappingProxyType(
    {
        machine.arch: machine
        for machine in (
            Machine("A100 SXM 80 GB", 80, 108, 1.41e9, 2.039e12, 2048, 164 * 1024, 64, MMA),
            Machine("A40", 86, 84, 1.74e9, 0.696e12, 1024, 100 * 1024, 48, MMA),
            Machine("L40S", 89, 142, 2.52e9, 0.864e12, 1024, 100 * 1024, 48, MMA),
            Machine("H100 SXM", 90, 132, 1.83e9, 3.352e12, 4096, 228 * 1024, 64, WGMMA),
            Machine("B200", 100, 148, 1.85e9, 8.0e12, 8192, 228 * 1024, 64, TCGEN05, l2=64),
            Machine("RTX 5090", 120, 170, 2.407e9, 1.792e12, 1024, 100 * 1024, 48, MMA),
        )
    }
)
