"""Quantize a source model into a checkpoint folder, with one decoder layer in memory at a time."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from infoquant_vllm.format import Checkpoint, FormatError
from offline.algorithms.rotations import Transforms, orthogonality_error
from offline.budget import apply_budget, check_budget
from offline.budget_problem import Problem
from offline.errors import ToolError
from offline.goal import Budget
from offline.memory import check_memory, make_plan
from offline.model.copied_files import copied_files, copy_files
from offline.model.source import Source
from offline.output.adapter_basis import write_basis
from offline.output.atomic import atomic_folder, check_writable
from offline.output.model_card import model_card
from offline.output.report import REPORT_FILE, Report, checkpoint_sizes, peak_memory_bytes
from offline.output.resume import fingerprint, finished_before, resumable_folder, resume_folder
from offline.output.sentence_modules import source_modules, write_modules
from offline.output.shards import checkpoint_specs
from offline.output.store import Store
from offline.output.writer import Writer, check_output, check_space
from offline.presets import preset_named
from offline.progress import JsonLog, ProgressReport, both, console_progress
from offline.recipe import Distillation, Recipe, load_recipe
from offline.run import Run
from offline.stages.calibrate import calibration_tokens
from offline.stages.distill import distill
from offline.stages.fold import fold_embeddings
from offline.stages.lm_head import quantize_lm_head
from offline.stages.quantize_layers import SCALES, quantized_layers
from offline.stages.rotate import make_transforms
from offline.training.fake_quant_layer import Layer
from offline.training.student import Student

SHARD_BYTES = 5 * 10**9
TOKENS, ROTATION = "tokens", "rotation"
"""Entries of the store that the first stages save."""


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    preset: str = "fast",
    recipe: Recipe | str | Path | None = None,
    calibration: str = "self",
    seed: int = 0,
    max_tp_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    budget: Budget | None = None,
    shard_bytes: int = SHARD_BYTES,
    log: str | Path | None = None,
    progress: ProgressReport | None = None,
) -> Report:
    """Quantize a model of a known class into a checkpoint folder that `vllm serve` loads.

    Args:
        source: folder or hub id of the unquantized model.
        output: folder to write; it appears whole or not at all, whatever interrupts the run.
        preset: name of a built-in recipe, used where `recipe` is None.
        recipe: a `Recipe`, or the path of a YAML file with one.
        calibration: "self", a text or JSONL file, or a data set name (see `calibration_tokens`).
        seed: the same seed, source and calibration give the same bytes on the same machine.
        max_tp_size: largest tensor-parallel size that can serve the checkpoint; None: the recipe's, by default 1.
        device: "cpu", "cuda" (one device), or "auto": all visible CUDA devices, or the CPU where there are none.
        overwrite: replace an output that this tool wrote earlier.
        resume: keep finished steps in `OUTPUT.resume` beside the output, and continue from those of an interrupted
            run; the bytes are those of an uninterrupted run.
        dry_run: check everything and compute sizes and memory (see `make_plan`), but write nothing. The source may
            be a config.json without weights.
        budget: choose the formats of each layer by it (see `Budget`); preset or recipe are the base, whose speed
            class stays.
        shard_bytes: largest size of an output file, unless one tensor is larger.
        log: file that gets a line of JSON for every step (see `JsonLog`).
        progress: called for every step; None draws bars on standard error.

    Returns the run's figures. Raises ToolError, naming what is wrong, before anything is changed.
    """
    output, chosen = Path(output), _recipe(preset, recipe, max_tp_size)
    model, devices = Source.open(source, headers_only=dry_run), _devices(device)
    if budget is not None:
        check_budget(chosen, model)
    marks = fingerprint(model, chosen, calibration, seed, devices[0]) if resume else {}
    marks |= {"budget": budget.goal} if resume and budget is not None else {}
    if resume and finished_before(output, marks):
        return Report.model_validate_json((output / REPORT_FILE).read_text(encoding="utf-8"))
    check_output(output, model.folder, overwrite)
    copied_files(model.folder)  # raises for files that cannot be copied, before any work
    source_modules(model.folder)
    try:
        config = chosen.quantization_config(model.shape)
        specs = checkpoint_specs(model, config)
        bits = None if budget is None else Problem(model, chosen, budget).check()
    except FormatError as error:
        raise ToolError(f"recipe '{chosen.name}' does not suit {model.folder}: {error}") from None
    figures = Report(
        source=model.folder.name if Path(source).is_dir() else str(source),
        recipe=chosen.name,
        calibration=Path(calibration).name,
        seed=seed,
        dry_run=dry_run,
        **checkpoint_sizes(model, chosen, specs),
    )
    if dry_run:
        plan = make_plan(model, chosen, specs, calibration, shard_bytes, figures.total_bytes, bits)
        return figures.model_copy(update={"plan": plan})
    check_memory(model, chosen, calibration, budget is not None)
    check_writable(output)
    check_space(output, figures.total_bytes * (2 if resume else 1))
    events = None if log is None else JsonLog(Path(log))
    with (
        console_progress() if progress is None else nullcontext(progress) as shown,
        resumable_folder(output, marks) if resume else atomic_folder(output) as partial,
    ):
        store = Store(resume_folder(output), persistent=True) if resume else Store(partial / "work")
        reports = shown if events is None else both(shown, events.progress)
        run = Run(model, chosen, config, seed, devices, reports, store, events)
        tokens = _calibration(run, calibration) if chosen.needs_calibration else None
        transforms = _transforms(run, tokens)
        if budget is not None and tokens is not None:
            figures = _chosen(run, budget, tokens, transforms, figures)
            check_space(output, figures.total_bytes * (2 if resume else 1))
        writer = Writer(partial, checkpoint_specs(model, run.config), shard_bytes, model.shape.norm_offset)
        return _write_checkpoint(run, writer, figures, tokens, transforms, output.name)


def _recipe(preset: str, recipe: Recipe | str | Path | None, max_tp_size: int | None) -> Recipe:
    chosen = preset_named(preset) if recipe is None else recipe
    chosen = chosen if isinstance(chosen, Recipe) else load_recipe(chosen)
    if max_tp_size is None:
        return chosen
    if max_tp_size < 1:
        raise ToolError(f"max_tp_size is {max_tp_size}, expected at least 1")
    return chosen.model_copy(update={"max_tp_size": max_tp_size})


def _chosen(run: Run, budget: Budget, tokens: torch.Tensor, transforms: Transforms | None, figures: Report) -> Report:
    """Give the run the recipe that keeps the budget; return the report with its sizes."""
    found = apply_budget(run, budget, tokens, transforms)
    sizes = checkpoint_sizes(run.source, run.recipe, checkpoint_specs(run.source, run.config))
    return figures.model_copy(update=sizes | {"recipe": run.recipe.name, "budget": found})


def _write_checkpoint(
    run: Run,
    writer: Writer,
    figures: Report,
    tokens: torch.Tensor | None,
    transforms: Transforms | None,
    name: str,
) -> Report:
    if transforms is not None and transforms.residual is not None:
        run.orthogonality_errors["residual"] = orthogonality_error(transforms.residual)
    for tensor_name, tensor in fold_embeddings(run.source, transforms):
        writer.add(quantize_lm_head(tensor_name, tensor, run.config, run.source.shape))
    layers = quantized_layers(run, tokens, transforms)
    if run.recipe.distillation is not None and tokens is not None:
        layers = _distilled(run, run.recipe.distillation, list(layers), tokens, transforms)
    scales = _write_layers(writer, layers)
    if not run.store.persistent:
        shutil.rmtree(run.store.folder)
    figures = figures.model_copy(
        update={
            "calibration_tokens": 0 if tokens is None else tokens.numel(),
            "calibration_sha256": None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "errors": run.errors,
            "orthogonality_errors": run.orthogonality_errors,
            "expert_tokens": run.expert_tokens,
            "seconds": run.watch.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }
    )
    copy_files(run.source.folder, writer.folder)
    write_modules(writer.folder, run.source, None if transforms is None else transforms.residual)
    write_basis(writer.folder, run.source, run.recipe, transforms, scales)
    writer.write_text("README.md", model_card(name, run.recipe, figures))
    writer.write_text("infoquant_recipe.yaml", run.recipe.dump())
    writer.write_text(REPORT_FILE, figures.model_dump_json(indent=2, exclude={"plan"}) + "\n")
    quantization_config = run.config.model_dump(mode="json", exclude_none=True)
    writer.finish(run.source.hf_config | {"quantization_config": quantization_config})
    Checkpoint(writer.folder)  # reads the headers back: every tensor exists with the right shape and dtype
    return figures


def _write_layers(writer: Writer, layers: Iterable[Layer]) -> Layer:
    """Write the tensors of all layers; return those for the basis of adapters, by their names in it."""
    scales: Layer = {}
    for index, tensors in enumerate(layers):
        prefix, found = f"model.layers.{index}.", {name for name in tensors if name.startswith(SCALES)}
        scales |= {prefix + name.removeprefix(SCALES): tensors[name] for name in found}
        writer.add({prefix + name: tensor for name, tensor in tensors.items() if name not in found})
    return scales


def _calibration(run: Run, spec: str) -> torch.Tensor:
    size = run.recipe.calibration
    if run.store.exists(TOKENS):
        return run.store.load(TOKENS)[TOKENS]
    with run.watch("calibration"):
        tokens = calibration_tokens(
            spec,
            run.source,
            size.sequences,
            size.sequence_length,
            run.seed,
            lambda done, total: run.progress("calibration", done, total),
        )
    if run.store.persistent:
        run.store.save(TOKENS, {TOKENS: tokens})
    return tokens


def _transforms(run: Run, tokens: torch.Tensor | None) -> Transforms | None:
    """Return the model's rotations; a learned R1 is saved here, learned rotations of layers by their own stage."""
    if run.store.exists(ROTATION):
        kept = run.store.load(ROTATION)
        return Transforms(kept["residual"], kept["heads"])
    with run.watch("rotation"):
        transforms = make_transforms(run, tokens)
    if run.store.persistent and run.recipe.transform == "psot-shared" and transforms is not None:
        assert transforms.residual is not None  # the rotation that was learned
        assert transforms.heads is not None
        run.store.save(ROTATION, {"residual": transforms.residual, "heads": transforms.heads})
    return transforms


def _distilled(
    run: Run, args: Distillation, layers: list[Layer], tokens: torch.Tensor, transforms: Transforms | None
) -> Iterator[Layer]:
    """Distill, and yield the layers with the tensors that distillation changed."""
    with run.watch("distillation"):
        student = Student(run.source, run.config, layers, transforms)
        distill(run, student, tokens, args)
    for index, tensors in enumerate(layers):
        yield tensors | student.tensors(index)


def _devices(name: str) -> list[torch.device]:
    """Return the devices to use; the first holds everything but the replicas of a layer that run batches."""
    if name not in ("auto", "cpu", "cuda"):
        raise ToolError(f"device is {name!r}, expected auto, cpu or cuda")
    found = torch.cuda.device_count()
    if name == "cuda" and not found:
        raise ToolError("device is cuda, but torch finds no CUDA device; choose auto or cpu")
    if name == "cpu" or not found:
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(found if name == "auto" else 1)]
