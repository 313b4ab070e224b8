"""Record the launches of a public launcher without a GPU, compile them, and read their machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import networkx
import torch
import triton
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infoquant_vllm.kernels.triton import common

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.uint8: "*u8"}
TYPES |= {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}
ALIGNED = 16  # bytes of an address, and what a number must be a multiple of, for Triton to know of it


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its arguments by name, and num_warps and the like."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def programs(self) -> int:
        """Count its programs."""
        total = 1
        for size in self.grid:
            total *= size
        return total

    @property
    def values(self) -> dict[str, Any]:
        """Return its arguments by name, those of tuples by the names of their fields in upper case."""
        return flattened(self.arguments)

    @property
    def nbytes(self) -> int:
        """Sum the bytes of its tensors, each read or written once."""
        return sum(value.nbytes for value in self.arguments.values() if isinstance(value, torch.Tensor))

    def source(self) -> ASTSource:
        """Specialize it as Triton does: addresses and numbers of multiples of 16, ones and None as constants.

        Addresses are assumed to be multiples, as torch's are; parameters not to be specialized have no attributes.
        """
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(self.kernel.params):
            value = self.arguments[param.name]
            kind = "constexpr" if param.is_constexpr or value is None else _type(value)
            specialized = not param.do_not_specialize
            if kind == "constexpr" or (specialized and kind == "i32" and value == 1):
                kind, constants[param.name] = "constexpr", value
            elif specialized and (kind.startswith("*") or (kind == "i32" and value % ALIGNED == 0)):
                attributes[(index,)] = [["tt.divisibility", ALIGNED]]
            signature[param.name] = kind
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)


def flattened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace a named tuple by its fields, their names in upper case."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        fields = value._asdict() if hasattr(value, "_asdict") else None
        found |= {name: value} if fields is None else {field.upper(): each for field, each in fields.items()}
    return found


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launches(call: Callable[[], Any], arch: int) -> list[Launch]:
    """Record what `call`, with tensors on the meta device, launches on a GPU of capability `arch`, 90 for 9.0."""
    recorded: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [param.name for param in kernel.params]
        arguments = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
        recorded.append(Launch(kernel, tuple(grid), arguments, kwargs))

    with patch.object(JITFunction, "run", record), patch.object(common, "architecture", lambda device: arch):
        call()
    return recorded


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
    """The machine code of a kernel; `loop` counts the main loop's instructions by name, `rest` the others."""

    mma: str
    registers: int
    spills: int
    shared: int
    loop: dict[str, int]
    rest: dict[str, int]
    stack: int = 0
    """bytes of a thread, which spills take"""


def compiled(launch: Launch, arch: int) -> Code:
    """Compile a launch; Triton caches the result on disk."""
    source = launch.source()
    options = tuple(sorted(launch.options.items()))
    return _compiled(source.hash(), arch, options, _Source(source))


class _Source:
    """A source as an argument of a cached function whose other arguments identify it."""

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
    """Return bytes of a thread's stack and of a program's shared memory, without disassembling the code."""
    kernel = _compile(launch.source(), arch, launch.options)
    return max(map(int, re.findall(r"STACK:(\d+)", _read(kernel, "cuobjdump", "-res-usage")))), kernel.metadata.shared


def _compile(source: Any, arch: int, options: dict[str, Any]) -> Any:
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _read(kernel: Any, tool: str, *arguments: str) -> str:
    """Run one of NVIDIA's tools on a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(TOOLS / tool), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main_loop(sass: str) -> tuple[Counter[str], Counter[str]]:
    """Count instructions by name within the main loop and outside it, without called functions.

    (Only divisions of denormals are called; behind the code is padding.)

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
    """Return instruction names of the basic blocks, and the edges between blocks."""
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
    """Return the blocks of the loop that the edge from tail to head closes."""
    body, waiting = {head, tail}, [tail] if tail != head else []
    while waiting:
        for before in graph.predecessors(waiting.pop()):
            if before not in body:
                body.add(before)
                waiting.append(before)
    return body
