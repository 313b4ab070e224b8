"""Predict times from a launch, its code and a GPU's data sheet; nothing here was measured."""

from dataclasses import asdict, dataclass
from math import ceil
from types import MappingProxyType
from typing import Any

from benchmarks.static.cases import Case
from benchmarks.static.kernels import ENTRIES
from benchmarks.static.launches import Code, Launch, flattened


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
        """Return the most bytes of shared memory of a program."""
        return self.shared_per_sm - 1024

    def occupancy(self, warps: int, registers: int, shared: int) -> int:
        """Return how many programs of so many warps, registers per thread and shared bytes run on an SM at once."""
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


LATENCY = 800e-9  # seconds from asking DRAM to its answer, under load
SUB_CORES = 4  # of an SM, each issues one instruction of a warp in a cycle


@dataclass(frozen=True)
class Prediction:
    """The least seconds that a launch spends on each of its resources.

    The two ratios are the main loop's cycles of issue over those of tensor cores (None: there are none) and of memory,
    spread over all SMs alike.
    """

    dram: float
    l2: float
    issue: float
    mma: float
    issue_per_mma: float | None
    issue_per_dram: float
    occupancy: int

    @property
    def seconds(self) -> float:
        """Return the time of the slowest resource, as if all others were hidden behind it."""
        return max(self.dram, self.l2, self.issue, self.mma)

    @property
    def bound(self) -> str:
        """Return the name of the slowest resource."""
        return max(("dram", "l2", "issue", "mma"), key=lambda name: getattr(self, name))


def predict(launch: Launch, code: Code, machine: Machine) -> Prediction:
    """Predict a launch: programs are spread over SMs evenly, the busiest decides; code outside the main loop runs once.

    Memory gives what its data sheet says, or what is asked for at once within its latency, if that is less.
    """
    entry = ENTRIES[launch.kernel.__name__]
    warps = launch.options["num_warps"]
    busy, moved = entry.busy(launch), entry.moved(launch)
    per_sm = ceil(busy / machine.sms)
    trips = entry.trips(launch)
    loop, rest = sum(code.loop.values()), sum(code.rest.values())
    issue = per_sm * (trips * loop + rest) * warps / SUB_CORES
    mma = per_sm * entry.macs(launch) / busy / machine.macs
    l2 = per_sm * trips * entry.loaded(launch) / machine.l2
    loop_issue = trips * loop * warps / SUB_CORES
    loop_mma = entry.macs(launch) / busy / machine.macs
    occupancy = machine.occupancy(warps, code.registers, code.shared)
    under_way = min(busy, occupancy * machine.sms) * entry.in_flight(launch)
    return Prediction(
        dram=moved / min(machine.dram, under_way / LATENCY),
        l2=l2 / machine.clock,
        issue=issue / machine.clock,
        mma=mma / machine.clock,
        issue_per_mma=loop_issue / loop_mma if loop_mma else None,
        issue_per_dram=loop_issue * busy / machine.sms / machine.clock / moved * machine.dram,
        occupancy=occupancy,
    )


def row(case: Case, launch: Launch, code: Code, machine: Machine) -> dict[str, Any]:
    """Return the row of a launch, for people and for plots."""
    prediction = predict(launch, code, machine)
    return {
        "kernel": launch.kernel.__name__.removesuffix("_kernel"),
        "model": case.model,
        "layer": case.layer,
        "scheme": case.scheme,
        "tokens": case.tokens,
        "arch": machine.arch,
        "gpu": machine.name,
        "launch": tile(launch),
        "configuration": configuration(launch),
        "programs": launch.programs,
        "bytes": ENTRIES[launch.kernel.__name__].moved(launch),
        "must_read": case.reads,
        "macs": int(ENTRIES[launch.kernel.__name__].macs(launch)),
        "useful_macs": case.macs if ENTRIES[launch.kernel.__name__].macs(launch) else 0,
        **asdict(code),
        "occupancy": prediction.occupancy,
        "issue_per_mma": prediction.issue_per_mma,
        "issue_per_dram": prediction.issue_per_dram,
        "dram_seconds": prediction.dram,
        "l2_seconds": prediction.l2,
        "issue_seconds": prediction.issue,
        "mma_seconds": prediction.mma,
        "bound": prediction.bound,
        "predicted_seconds": prediction.seconds,
    }


def configuration(launch: Launch) -> str:
    """Name all that a launch's code depends on: the same words mean the same code. What is not named is 0 or false."""
    source = launch.source()
    constants = flattened({launch.kernel.arg_names[index[0]]: value for index, value in source.constants.items()})
    words = [f"{name.lower()}={value}" for name, value in constants.items() if name.isupper() and value]
    absent = [name.removesuffix("_ptr") for name, value in constants.items() if value is None]
    specialized = {param.name for param in launch.kernel.params if not param.do_not_specialize}
    numbers = [name for name, kind in source.signature.items() if kind == "i32" and name in specialized]
    aligned = [name for name in numbers if (launch.kernel.arg_names.index(name),) in source.attrs]
    pointers = sorted({kind for kind in source.signature.values() if kind in ("*bf16", "*fp16")})
    parts = [*words, *(f"{name}={value}" for name, value in launch.options.items() if value)]
    parts += [f"no {name}" for name in absent] + [f"unaligned {name}" for name in numbers if name not in aligned]
    return " ".join(parts + pointers)


def tile(launch: Launch) -> str:
    """Name a launch's tile: its sizes, warps and stages."""
    chosen = ("BLOCK_", "SPLITS", "ROWS", "CHUNK", "KV_SPLITS")
    sizes = {name: value for name, value in launch.values.items() if name.startswith(chosen)}
    return " ".join(f"{name.lower()}={value}" for name, value in {**sizes, **launch.options}.items() if value)
