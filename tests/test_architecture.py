"""Imports go in one direction and never in a circle; folders and functions stay small. See docs/architecture.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("infoquant_vllm", "offline", "benchmarks")
MAX_FILES_PER_FOLDER = 20
MAX_PARAMETERS = 8

EXEMPT = (
    "infoquant_vllm.attention:__init__",  # vLLM's interface
    "infoquant_vllm.attention:forward",  # vLLM's interface
    "infoquant_vllm.kernels.ops:_experts",  # the same
    "infoquant_vllm.kernels.ops:_linear",  # the schema of a torch operation, which has no tuples
    "offline.cli.check:evaluate",  # options of a command
    "offline.cli.make:quantize",  # options of a command
    "offline.pipeline:quantize",  # the public function, whose options go by name
)
"""Functions whose parameters are not ours to group, or are options of a user."""

FORMAT, KERNELS = "infoquant_vllm.format", "infoquant_vllm.kernels"
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    FORMAT: (FORMAT,),
    f"{KERNELS}.torch": (FORMAT, f"{KERNELS}.torch", f"{KERNELS}.operands"),
    f"{KERNELS}.triton": (FORMAT, f"{KERNELS}.triton", f"{KERNELS}.operands"),
    f"{KERNELS}.cpu": (FORMAT, f"{KERNELS}.cpu", f"{KERNELS}.operands"),
    KERNELS: (FORMAT, KERNELS),
    "infoquant_vllm": ("infoquant_vllm",),
    "offline.algorithms": ("offline.algorithms", FORMAT, f"{KERNELS}.torch", f"{KERNELS}.operands"),
    "offline.model": ("offline.model", "offline.algorithms", "offline.errors", FORMAT),
    "offline": ("offline", "infoquant_vllm"),
    "benchmarks": ("benchmarks", "offline", "infoquant_vllm"),
}
"""What each package may import of this project; the longest matching key holds."""

NEVER: dict[str, tuple[str, ...]] = {
    FORMAT: ("vllm", "triton", "transformers"),
    f"{KERNELS}.torch": ("vllm", "triton"),
    f"{KERNELS}.triton": ("vllm",),
    f"{KERNELS}.cpu": ("vllm", "triton"),
    "offline": ("vllm", "triton"),
}
"""Packages of others that each package must not import."""


def modules() -> dict[str, ast.Module]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return {name: ast.parse(file.read_text()) for name, file in zip(names, files, strict=True)}


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports, also inside functions and for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def rule(module: str, rules: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    keys = [key for key in rules if within(module, (key,))]
    return rules[max(keys, key=len)] if keys else ()


def test_no_module_imports_against_the_direction() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in MODULES.items()
        for name in imports(tree)
        if within(name, PACKAGES) and not within(name, rule(module, MAY_IMPORT))
    ]
    assert wrong == []


def test_no_package_imports_what_it_must_not_depend_on() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in MODULES.items()
        for name in imports(tree)
        if within(name, rule(module, NEVER))
    ]
    assert wrong == []


def test_imports_make_no_circle() -> None:
    graph = {
        module: {name for name in imports(tree) if name in MODULES and name != module}
        for module, tree in MODULES.items()
    }
    while True:
        leaves = {module for module, needed in graph.items() if not needed}
        if not leaves:
            break
        graph = {module: needed - leaves for module, needed in graph.items() if module not in leaves}
    assert sorted(graph) == []


def test_no_folder_holds_more_files_than_a_reader_takes_in() -> None:
    folders = [folder for package in (*PACKAGES, "tests", "docs") for folder in (ROOT / package).rglob("*")]
    counts = {
        str(folder.relative_to(ROOT)): len([file for file in folder.iterdir() if file.suffix in (".py", ".h", ".cpp")])
        for folder in folders
        if folder.is_dir()
    }
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES_PER_FOLDER} == {}


def is_kernel(function: ast.FunctionDef) -> bool:
    """Return whether Triton compiles a function."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_function_takes_more_parameters_than_a_caller_keeps_in_mind(package: str) -> None:
    wrong = [
        f"{module}:{node.lineno} {node.name} takes {count}"
        for module, tree in MODULES.items()
        if within(module, (package,))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not is_kernel(node) and f"{module}:{node.name}" not in EXEMPT
        if (count := len([arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg not in ("self", "cls")]))
        > MAX_PARAMETERS
    ]
    assert wrong == []
