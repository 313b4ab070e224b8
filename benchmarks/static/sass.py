"""A launch compiled for an architecture, and what its machine code holds."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import networkx
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.static.launches import Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MMA_PTX = re.compile(r"(tcgen05\.mma\.\S*kind::\w+|wgmma\.mma_async\.\S+|mma\.sync\.\S+)")
MMA_SASS = ("IMMA", "IGMMA", "UTCIMMA", "HMMA", "HGMMA", "UTCHMMA")
SPILLS = ("STL", "LDL")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
LABEL = re.compile(r"^(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")
ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP")


@dataclass(frozen=True)
class Code:
    """What a kernel was compiled to; `loop` counts the main loop's instructions by name, `rest` the others."""

    mma: str
    registers: int
    spills: int
    shared: int
    loop: dict[str, int]
    rest: dict[str, int]
    stack: int = 0
    """bytes of a thread, which spills take"""


def compiled(launch: Launch, arch: int) -> Code:
    """The code of a launch; Triton keeps what it compiled on disk."""
    source = launch.source()
    options = tuple(sorted(launch.options.items()))
    return _compiled(source.hash(), arch, options, _Source(source))


class _Source:
    """A source as an argument of a cached function that its hash already tells apart."""

    def __init__(self, source: Any):
        self.source = source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source)

    def __hash__(self) -> int:
        return 0


@cache
def _compiled(_key: str, arch: int, options: tuple[tuple[str, Any], ...], source: _Source) -> Code:
    kernel = _compile(source.source, arch, dict(options))
    usage = _read(kernel, "cuobjdump", "-res-usage")
    loop, rest = main_loop(_read(kernel, "nvdisasm", "-c"))
    instructions = MMA_PTX.findall(kernel.asm["ptx"])
    return Code(
        mma=max(instructions, key=instructions.count, default=""),
        registers=max(map(int, re.findall(r"REG:(\d+)", usage))),
        spills=sum(count for name, count in (loop + rest).items() if name.startswith(SPILLS)),
        shared=kernel.metadata.shared,
        loop=dict(loop),
        rest=dict(rest),
        stack=max(map(int, re.findall(r"STACK:(\d+)", usage))),
    )


def stack_and_shared(launch: Launch, arch: int) -> tuple[int, int]:
    """Bytes of a thread's stack and of a program's shared memory; of `compiled` what takes no reading of its code."""
    kernel = _compile(launch.source(), arch, launch.options)
    return max(map(int, re.findall(r"STACK:(\d+)", _read(kernel, "cuobjdump", "-res-usage")))), kernel.metadata.shared


def _compile(source: Any, arch: int, options: dict[str, Any]) -> Any:
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _read(kernel: Any, tool: str, *arguments: str) -> str:
    """What a tool of NVIDIA's says of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(TOOLS / tool), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main_loop(sass: str) -> tuple[Counter[str], Counter[str]]:
    """Instructions by name within the main loop and outside it, of those reached without calls.

    (What is called are divisions of numbers that are hardly any; and behind the code lies padding.)

    That is the innermost loop with most of the tensor cores' instructions, else the one with most instructions. Loops
    are those of the control flow: edges back to a block that lies on all ways to where they start. (Waits for
    barriers jump back from the end of the code without being loops of that kind.)
    """
    blocks, edges = _blocks(sass)
    graph: Any = networkx.DiGraph(edges)
    graph.add_nodes_from(range(len(blocks)))
    dominators = networkx.immediate_dominators(graph, 0)
    loops = [
        _body(graph, tail, head) for tail, head in edges if tail in dominators and _dominates(dominators, head, tail)
    ]
    dominators.setdefault(0, 0)
    total = sum((blocks[index] for index in dominators), Counter[str]())

    def worth(body: set[int]) -> tuple[int, int]:
        names = sum((blocks[index] for index in body), Counter[str]())
        mma = sum(count for name, count in names.items() if name.startswith(MMA_SASS))
        return mma, -sum(names.values()) if mma else sum(names.values())

    chosen = max(loops, key=worth, default=set())
    loop = sum((blocks[index] for index in chosen), Counter[str]())
    return loop, total - loop


def _blocks(sass: str) -> tuple[list[Counter[str]], list[tuple[int, int]]]:
    """Instruction names of the basic blocks, and which follows which."""
    blocks: list[Counter[str]] = [Counter()]
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    falls: list[int] = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            if blocks[-1]:
                falls.append(len(blocks) - 1)
                blocks.append(Counter())
            labels[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.search(line):
            name = found[1].split(".")[0]
            blocks[-1][name] += 1
            if name in ENDS:
                if target := TARGET.search(found[2]):
                    jumps.append((len(blocks) - 1, target[1]))
                if "@" in line.split("*/", 1)[1] or (name == "BRA" and not found[2].lstrip().startswith("`")):
                    falls.append(len(blocks) - 1)
                blocks.append(Counter())
    edges = [(block, labels[label]) for block, label in jumps if label in labels]
    edges += [(block, block + 1) for block in falls if block + 1 < len(blocks)]
    return blocks, edges


def _dominates(dominators: dict[int, int | None], head: int, tail: int) -> bool:
    node: int | None = tail
    while node is not None and node != head:
        above = dominators.get(node)
        node = None if above == node else above
    return node == head


def _body(graph: Any, tail: int, head: int) -> set[int]:
    """The blocks of the loop that the edge from tail to head closes."""
    body, waiting = {head, tail}, [tail] if tail != head else []
    while waiting:
        for before in graph.predecessors(waiting.pop()):
            if before not in body:
                body.add(before)
                waiting.append(before)
    return body
