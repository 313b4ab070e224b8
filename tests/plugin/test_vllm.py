"""Every vLLM name, signature and base class that the plugin uses, against vLLM's Python sources, none imported.

Against the installed vLLM and the releases of requirements/vllm-sources.txt, whose sources `make` unpacks; or only
against a wheel or folder of another release:

    VLLM_SOURCES=vllm-0.34.0-cp38-abi3-manylinux_2_28_x86_64.whl python -m pytest tests/plugin/test_vllm.py
"""

import ast
import importlib.util
import os
import re
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "infoquant_vllm"
UNPACKED = Path(sys.prefix) / "vllm-sources"
PINS = [line for line in (ROOT / "requirements" / "vllm-sources.txt").read_text().splitlines() if line[:1] != "#"]
PINNED = [pin.removeprefix("vllm==") for pin in PINS]
INSTALLED = metadata.version("vllm").partition("+")[0]
RELEASES = [os.environ["VLLM_SOURCES"]] if "VLLM_SOURCES" in os.environ else [INSTALLED, *PINNED]
FIELDS = {
    ("vllm.v1.attention.backend", "CommonAttentionMetadata"): (
        *("query_start_loc", "seq_lens", "block_table_tensor", "num_actual_tokens", "causal"),
    ),
    ("vllm.config", "SchedulerConfig"): ("max_num_seqs",),
    ("vllm.v1.attention.backend", "AttentionMetadataBuilder"): (
        *("reorder_batch_threshold", "_init_reorder_batch_threshold"),
    ),
    ("vllm.v1.worker.workspace", "WorkspaceManager"): ("get_simultaneous",),
    ("vllm.v1.kv_cache_interface", "AttentionSpec"): ("head_size", "dtype", "state_content_bytes", "kv_quant_mode"),
    ("vllm.platforms.interface", "Platform"): ("device_type", "is_cpu"),
    ("vllm.ir.op", "IrOp"): ("register_impl", "get_priority", "set_default"),
    ("vllm.model_executor.custom_op", "CustomOp"): ("register_oot", "forward_cpu"),
    ("vllm.model_executor.layers.rotary_embedding", "RotaryEmbedding"): (
        *("is_neox_style", "head_size", "_match_cos_sin_cache_dtype"),
    ),
    ("vllm.config", "CompilationConfig"): ("custom_ops",),
    ("vllm.config", "ModelConfig"): ("hf_text_config", "head_dtype", "max_model_len"),
    ("vllm.config", "VllmConfig"): ("model_config", "lora_config", "compilation_config"),
    ("vllm.config", "LoRAConfig"): ("target_modules",),
    ("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA"): ("lora_a_stacked", "lora_b_stacked", "lora_config"),
}
"""What the plugin reads of objects that it is handed, which the imports do not tell."""
MAPPING = ("worker_manager", "lora_model", "utils")
SET_IN_INIT = ("num_heads", "num_kv_heads", "head_size", "layer_name", "kv_cache_dtype", "attn_type", "sliding_window")
REPLACED = ("attn_backend", "backend", "impl", "head_size_v", "has_sink", "use_mm_prefix", "use_alibi_sqrt")
"""Attributes of vLLM's Attention that `InfoQuantKVCacheMethod` reads, or sets in the layer's place."""


class Sources:
    """The release that the tests read now: text of a file by its path, and parsed modules by their names."""

    read: Callable[[str], str | None]
    trees: dict[str, ast.Module | None]


@pytest.fixture(scope="module", autouse=True, params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    Sources.read, Sources.trees = staticmethod(reader(request.param)), {}
    return str(request.param)


def reader(release: str) -> Callable[[str], str | None]:
    """Text of a file by its path below the folder of a release's sources, or None."""
    if release.endswith(".whl"):
        wheel = zipfile.ZipFile(release)
        names = set(wheel.namelist())
        return lambda path: wheel.read(path).decode() if path in names else None
    folder = UNPACKED / release if release in PINNED else Path(release)
    if release == INSTALLED:
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent.parent
    assert (folder / "vllm").is_dir(), f"{folder}: no sources of vLLM {release}; run `make .venv/{UNPACKED.name}`"
    return lambda path: (folder / path).read_text() if (folder / path).exists() else None


def tree(module: str) -> ast.Module | None:
    if module not in Sources.trees:
        path = module.replace(".", "/")
        text = Sources.read(f"{path}.py") or Sources.read(f"{path}/__init__.py")
        Sources.trees[module] = None if text is None else ast.parse(text)
    return Sources.trees[module]


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module or class, those under its `if` and `try` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from statements([*node.body, *getattr(node, "orelse", [])])
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)


def names(node: ast.stmt) -> list[str]:
    """That a statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [found.id for target in targets for found in ast.walk(target) if isinstance(found, ast.Name)]


def imported_from(module: str, node: ast.stmt) -> str | None:
    """The module of vLLM's that an import of names reads."""
    if not isinstance(node, ast.ImportFrom) or not node.module:
        return None
    if not node.level:
        return node.module if node.module.startswith("vllm") else None
    is_package = Sources.read(f"{module.replace('.', '/')}.py") is None
    above = module.split(".")[: None if is_package else -1]
    return ".".join([*above[: len(above) - node.level + 1], node.module])


def find(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """Where a module's name is defined, through the imports of it in vLLM."""
    parsed = tree(module)
    for node in () if parsed is None else statements(parsed.body):
        if isinstance(node, ast.ImportFrom) and names(node) == ["*"]:  # as vllm.distributed has it, of its own parts
            found = find(f"{module}.{node.module}" if node.level else str(node.module), name)
            if found is not None:
                return found
        if name not in names(node):
            continue
        source = imported_from(module, node)
        if isinstance(node, ast.ImportFrom) and source is not None:
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return find(source, original) or (module, node)
        return module, node
    if tree(f"{module}.{name}") is not None:
        return f"{module}.{name}", ast.Pass()
    if parsed is not None and any("__getattr__" in names(node) for node in parsed.body):  # which knows names by a table
        known = {node.value for node in ast.walk(parsed) if isinstance(node, ast.Constant)}
        return (module, ast.Pass()) if name in known else None
    return None


def bases(module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and those that it inherits from, as far as they are vLLM's."""
    yield module, node
    for base in node.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        found = find(module, name.id) if isinstance(name, ast.Name) else None
        if found is not None and isinstance(found[1], ast.ClassDef):
            yield from bases(found[0], found[1])


def member(module: str, node: ast.ClassDef, name: str) -> ast.stmt | None:
    return next((s for m, n in bases(module, node) for s in statements(n.body) if name in names(s)), None)


def attributes(module: str, node: ast.ClassDef) -> set[str]:
    """What a class and its bases define, or read and write of any object."""
    classes = [each for _, each in bases(module, node)]
    defined = {name for each in classes for statement in statements(each.body) for name in names(statement)}
    return defined | {found.attr for each in classes for found in ast.walk(each) if isinstance(found, ast.Attribute)}


@dataclass(frozen=True)
class Use:
    """A name of vLLM's that a file of the plugin imports."""

    file: Path
    module: str
    name: str
    local: str


@cache
def uses() -> list[Use]:
    found = []
    for file in sorted(PLUGIN.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                found += [Use(file, node.module, alias.name, alias.asname or alias.name) for alias in node.names]
    assert len(found) > 20
    return found


def problems_of_call(call: ast.Call, function: ast.FunctionDef, is_method: bool) -> str:
    arguments = function.args
    known = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][is_method:]
    keywords = [*known, *(argument.arg for argument in arguments.kwonlyargs)]
    strange = [k.arg for k in call.keywords if k.arg and k.arg not in keywords and arguments.kwarg is None]
    positional = [a for a in call.args if not isinstance(a, ast.Starred)]
    required = known[: len(known) - len(arguments.defaults)]
    given = {*known[: len(positional)], *(k.arg for k in call.keywords)}
    starred = len(positional) < len(call.args) or any(k.arg is None for k in call.keywords)
    missing = [] if starred else [name for name in required if name not in given]
    many = len(positional) > len(known) and arguments.vararg is None
    return "; ".join(filter(None, (strange and f"no {strange}", missing and f"needs {missing}", many and "too many")))


def problems_of_override(ours: ast.FunctionDef, theirs: ast.FunctionDef) -> str:
    if ours.args.vararg and ours.args.kwarg:
        return ""
    mine, base = ([a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)] for f in (ours, theirs))
    if ours.args.kwarg is None and mine[: len(base)] != base:
        return f"is {mine}, vLLM's is {base}"
    extra = mine[len(base) :] if ours.args.kwarg is None and theirs.args.vararg is None else []
    without = len(ours.args.args) - len(ours.args.defaults)
    return f"vLLM does not pass {extra}" if extra and mine.index(extra[0]) < without else ""


@pytest.mark.skipif("VLLM_SOURCES" in os.environ, reason="another release than those of the range")
def test_every_release_of_the_range_is_read(release: str) -> None:
    """The range ends below the minor release that follows the last one read."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = next(r for r in map(Requirement, declared) if r.name == "vllm").specifier
    major, minor, *_ = max(tuple(map(int, each.split("."))) for each in RELEASES)
    assert release in allowed
    assert f"{major}.{minor + 1}" not in allowed
    minors = {tuple(map(int, each.split(".")[:2])) for each in RELEASES}
    assert all((f"{major}.{each}.0" in allowed) == ((major, each) in minors) for each in range(minor + 2))


def test_every_name_is_there() -> None:
    assert not [use for use in uses() if find(use.module, use.name) is None]


def test_every_call_fits_its_signature() -> None:
    problems = []
    for use in uses():
        module, node = find(use.module, use.name) or (use.module, ast.Pass())
        function = member(module, node, "__init__") if isinstance(node, ast.ClassDef) else node
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in ast.walk(ast.parse(use.file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == use.local:
                problem = problems_of_call(call, function, is_method=isinstance(node, ast.ClassDef))
                problems += [f"{use.file.name}:{call.lineno}: {use.name}: {problem}"] if problem else []
    assert not problems


def test_every_method_of_a_base_class_is_overridden_with_its_signature() -> None:
    problems, checked = [], 0
    for file in sorted(PLUGIN.rglob("*.py")):
        imported = {use.local: use for use in uses() if use.file == file}
        for ours in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)):
            names_of_bases = [b.value if isinstance(b, ast.Subscript) else b for b in ours.bases]
            for base in (imported[b.id] for b in names_of_bases if isinstance(b, ast.Name) and b.id in imported):
                module, node = find(base.module, base.name) or (base.module, ast.Pass())
                assert isinstance(node, ast.ClassDef), f"{file.name}: {base.name} is no class"
                for method in (m for m in ours.body if isinstance(m, ast.FunctionDef) and m.name != "__init__"):
                    theirs = member(module, node, method.name)
                    if isinstance(theirs, ast.FunctionDef):
                        checked += 1
                        problem = problems_of_override(method, theirs)
                        problems += [f"{file.name}: {ours.name}.{method.name} {problem}"] if problem else []
    assert not problems
    assert checked >= 20


def test_every_member_of_a_class_or_enumeration_is_there() -> None:
    problems, checked = [], 0
    for use in uses():
        module, node = find(use.module, use.name) or (use.module, ast.Pass())
        if not isinstance(node, ast.ClassDef):
            continue
        for found in ast.walk(ast.parse(use.file.read_text())):
            if isinstance(found, ast.Attribute) and isinstance(found.value, ast.Name) and found.value.id == use.local:
                checked += 1
                is_there = found.attr.startswith("__") or member(module, node, found.attr) is not None
                problems += [] if is_there else [f"{use.file.name}: {use.name}.{found.attr}"]
    assert not problems
    assert checked >= 5


@pytest.mark.parametrize(("module", "name"), FIELDS)
def test_what_is_read_of_vllms_objects_is_there(module: str, name: str) -> None:
    where, node = find(module, name) or (module, ast.Pass())
    assert isinstance(node, ast.ClassDef)
    assert not set(FIELDS[module, name]) - attributes(where, node)


def test_what_the_cache_method_needs_of_an_attention_layer_is_there() -> None:
    where, node = find("vllm.model_executor.layers.attention", "Attention") or ("", ast.Pass())
    assert isinstance(node, ast.ClassDef)
    assert not {*SET_IN_INIT, *REPLACED} - attributes(where, node)


def test_the_names_of_an_adapters_tensors_are_given_to_the_mapper_of_the_model() -> None:
    """Nothing else keeps adapters in the basis of the source from being served (infoquant_vllm/adapters.py)."""
    manager, adapter, naming = (str(Sources.read(f"vllm/lora/{file}.py")) for file in MAPPING)
    assert 'getattr(model, "hf_to_vllm_mapper", None)' in manager
    assert "hf_to_vllm_mapper.get_rename_mapper()" in manager
    assert "weights_mapper=hf_to_vllm_mapper" in manager
    assert re.search(r"parse_fine_tuned_lora_name\(\s*tensor_name, weights_mapper\s*\)", adapter)
    assert naming.count("weights_mapper._map_name(name)") == 2
    where, mapper = find("vllm.model_executor.models.utils", "WeightsMapper") or ("", ast.Pass())
    alias = member(where, mapper, "_map_name") if isinstance(mapper, ast.ClassDef) else None
    assert alias is not None
    assert "self.map_name(key)" in ast.unparse(alias)
