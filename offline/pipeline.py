"""`quantize`: from a source model to a checkpoint folder, one decoder layer in memory at a time."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from infoquant_vllm.format import Checkpoint, FormatError
from offline.algorithms.rotations import Transforms, orthogonality_error
from offline.errors import ToolError
from offline.memory import check_memory, make_plan
from offline.model.source import Source
from offline.output.atomic import atomic_folder, check_writable
from offline.output.copied_files import copied_files
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
from offline.stages.quantize_layers import quantized_layers
from offline.stages.rotate import make_transforms
from offline.training.student import Layer, Student

SHARD_BYTES = 5 * 10**9
TOKENS, ROTATION = "tokens", "rotation"
"""Names of what is kept of the first stages."""


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
    shard_bytes: int = SHARD_BYTES,
    log: str | Path | None = None,
    progress: ProgressReport | None = None,
) -> Report:
    """Quantize a model of a known class into a checkpoint folder that `vllm serve` loads.

    Args:
        source: folder or hub id of the unquantized model.
        output: the folder to make; whole or not there at all, whatever interrupts the run.
        preset: name of a built-in recipe, used where `recipe` is None.
        recipe: a `Recipe`, or the path of a YAML file that holds one.
        calibration: "self", a text or JSONL file, or a data set name (see `calibration_tokens`).
        seed: same seed, source and calibration: same bytes, on the same machine.
        max_tp_size: largest tensor-parallel size that may serve the checkpoint; None: that of the recipe, mostly 1.
        device: "cpu", "cuda", or "auto" for all visible CUDA devices where there are any.
        overwrite: replace an output that this tool wrote earlier.
        resume: keep what is done in `OUTPUT.resume` beside the output and go on from what an earlier run, ended
            by whatever, kept there; gives the bytes of a run that nothing ended.
        dry_run: check everything, compute sizes and memory (see `make_plan`), but write nothing. A source that
            is a config.json and no weights will do.
        shard_bytes: how large a file of the output may be, unless one tensor is larger.
        log: a file that gets a line of JSON for every step, beside what is shown (see `JsonLog`).
        progress: called while the run goes on; None draws bars on standard error.

    Returns the run's figures. Raises ToolError, naming what is wrong, before anything is changed.
    """
    chosen = preset_named(preset) if recipe is None else recipe
    chosen = chosen if isinstance(chosen, Recipe) else load_recipe(chosen)
    if max_tp_size is not None:
        if max_tp_size < 1:
            raise ToolError(f"max_tp_size is {max_tp_size}, expected a number of workers from 1 on")
        chosen = chosen.model_copy(update={"max_tp_size": max_tp_size})
    model, devices = Source.open(source, headers_only=dry_run), _devices(device)
    marks = fingerprint(model, chosen, calibration, seed, devices[0]) if resume else {}
    if resume and finished_before(Path(output), marks):
        return Report.model_validate_json((Path(output) / REPORT_FILE).read_text(encoding="utf-8"))
    check_output(Path(output), model.folder, overwrite)
    copied_files(model.folder)  # or refused, before any work
    source_modules(model.folder)
    try:
        config = chosen.quantization_config(model.shape)
        specs = checkpoint_specs(model, config)
    except FormatError as error:
        raise ToolError(f"recipe '{chosen.name}' does not suit {model.folder}: {error}") from None
    figures = Report(
        source=model.folder.name if Path(source).is_dir() else str(source),
        recipe=chosen.name,
        calibration=Path(calibration).name,
        seed=seed,
        dry_run=dry_run,
        **checkpoint_sizes(model, config, specs),
    )
    if dry_run:
        plan = make_plan(model, chosen, specs, calibration, shard_bytes, figures.total_bytes)
        return figures.model_copy(update={"plan": plan})
    check_memory(model, chosen, calibration)
    check_writable(Path(output))
    check_space(Path(output), figures.total_bytes * (2 if resume else 1))
    events = None if log is None else JsonLog(Path(log))
    with console_progress() if progress is None else nullcontext(progress) as shown:
        folder = resumable_folder(Path(output), marks) if resume else atomic_folder(Path(output))
        with folder as partial:
            store = Store(resume_folder(Path(output)), persistent=True) if resume else Store(partial / "work")
            reports = shown if events is None else both(shown, events.progress)
            run = Run(model, chosen, config, seed, devices, reports, store, events)
            writer = Writer(partial, specs, shard_bytes)
            return _write_checkpoint(run, writer, figures, calibration, Path(output).name)


def _write_checkpoint(run: Run, writer: Writer, figures: Report, calibration: str, name: str) -> Report:
    tokens = _calibration(run, calibration) if run.recipe.needs_calibration else None
    transforms = _transforms(run, tokens)
    if transforms is not None and transforms.residual is not None:
        run.orthogonality_errors["residual"] = orthogonality_error(transforms.residual)
    for tensor_name, tensor in fold_embeddings(run.source, transforms):
        writer.add(quantize_lm_head(tensor_name, tensor, run.config, run.source.shape))
    layers = quantized_layers(run, tokens, transforms)
    if run.recipe.distillation is not None and tokens is not None:
        layers = _distilled(run, run.recipe.distillation, list(layers), tokens, transforms)
    for index, tensors in enumerate(layers):
        writer.add({f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()})
    if not run.store.persistent:
        shutil.rmtree(run.store.folder)
    figures = figures.model_copy(
        update={
            "calibration_tokens": 0 if tokens is None else tokens.numel(),
            "calibration_sha256": None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "errors": run.errors,
            "orthogonality_errors": run.orthogonality_errors,
            "seconds": run.watch.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }
    )
    writer.copy_from(run.source.folder)
    write_modules(writer.folder, run.source, None if transforms is None else transforms.residual)
    writer.write_text("README.md", model_card(name, run.recipe, figures))
    writer.write_text("infoquant_recipe.yaml", run.recipe.dump())
    writer.write_text(REPORT_FILE, figures.model_dump_json(indent=2, exclude={"plan"}) + "\n")
    quantization_config = run.config.model_dump(mode="json", exclude_none=True)
    writer.finish(run.source.hf_config | {"quantization_config": quantization_config})
    Checkpoint(writer.folder)  # reads the headers back: every tensor there, of the right shape and type
    return figures


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
    """The model's rotations; learned ones of the residual stream are kept, those of layers keep themselves."""
    if run.store.exists(ROTATION):
        kept = run.store.load(ROTATION)
        return Transforms(kept["residual"], kept["heads"])
    with run.watch("rotation"):
        transforms = make_transforms(run, tokens)
    if run.store.persistent and run.recipe.transform == "psot-shared" and transforms is not None:
        assert transforms.residual is not None  # that is what was learned
        assert transforms.heads is not None
        run.store.save(ROTATION, {"residual": transforms.residual, "heads": transforms.heads})
    return transforms


def _distilled(
    run: Run, args: Distillation, layers: list[Layer], tokens: torch.Tensor, transforms: Transforms | None
) -> Iterator[Layer]:
    """The layers with what distillation changed."""
    with run.watch("distillation"):
        student = Student(run.source, run.config, layers, transforms)
        distill(student, run.source, tokens, args, run.seed, run.progress)
    for index, tensors in enumerate(layers):
        yield tensors | student.tensors(index)


def _devices(name: str) -> list[torch.device]:
    """What works, on the first of which everything is but the copies of a layer that batches run through."""
    if name not in ("auto", "cpu", "cuda"):
        raise ToolError(f"device is {name!r}, expected auto, cpu or cuda")
    found = torch.cuda.device_count()
    if name == "cuda" and not found:
        raise ToolError("device is cuda, but torch finds no CUDA device; choose auto or cpu")
    if name == "cpu" or not found:
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(found if name == "auto" else 1)]
