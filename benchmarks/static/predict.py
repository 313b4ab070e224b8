"""Predictions from a launch, its code and a GPU's data sheet; nothing here was measured."""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from benchmarks.static.cases import Case
from benchmarks.static.kernels import ENTRIES
from benchmarks.static.launches import Launch, flattened
from benchmarks.static.machines import Machine
from benchmarks.static.sass import Code

LATENCY = 800e-9  # seconds from asking DRAM to its answer, under load
SUB_CORES = 4  # of an SM, each issues one instruction of a warp in a cycle


@dataclass(frozen=True)
class Prediction:
    """Seconds that a launch spends at the least on each of its resources.

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
        """Of the resource that takes longest, as if all others hid behind it."""
        return max(self.dram, self.l2, self.issue, self.mma)

    @property
    def bound(self) -> str:
        """Its name."""
        return max(("dram", "l2", "issue", "mma"), key=lambda name: getattr(self, name))


def predict(launch: Launch, code: Code, machine: Machine) -> Prediction:
    """Programs are dealt out to SMs evenly, the busiest SM decides; all of the code outside the main loop runs once.

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
    """All that is known of a launch, for people and for plots."""
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
    """All that its code depends on, in short: the same words mean the same code. What is not named is 0 or false."""
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
    """What was chosen for a launch: its sizes, warps and stages."""
    chosen = ("BLOCK_", "SPLITS", "ROWS", "CHUNK", "KV_SPLITS")
    sizes = {name: value for name, value in launch.values.items() if name.startswith(chosen)}
    return " ".join(f"{name.lower()}={value}" for name, value in {**sizes, **launch.options}.items() if value)
